"""Reads the architecture from Megatron's args, NeMo's YAML or a model provider of Megatron-Bridge and NeMo 2.

Each function returns the values that are stated, by kdjax's keys, and raises UserError for features that kdjax's model
does not have. A value that is not stated gets kdjax's default, and the printed table says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from kdjax.convert.architecture import Stated
from kdjax.types import UserError

# Llama 3.1's low and high factor and original length, fixed in Megatron's
# megatron/core/models/common/embeddings/rotary_pos_embedding.py.
LLAMA3_SCALING = (1.0, 4.0, 8192.0)

# Settings of features that kdjax's model does not have, from any of the three configurations.
UNSUPPORTED = {
    "num_experts": "mixture of experts",
    "num_moe_experts": "mixture of experts",
    "multi_latent_attention": "multi-latent attention",
    "mtp_num_layers": "multi-token prediction",
    "rotary_interleaved": "interleaved rotary positions",
    "no_rope_freq": "layers without rotary positions",
    "mrope_section": "multimodal rotary positions",
    "apply_residual_connection_post_layernorm": "post-norm residual connections",
    "attention_output_gate": "gated attention outputs",
    "qk_l2_norm": "L2-normed queries and keys",
    "softmax_type": "attention sinks",
    "window_size": "sliding-window attention",
    "linear_attention_freq": "linear attention",
    "experimental_attention_variant": "experimental attention variants",
    "is_hybrid_model": "hybrid (Mamba) layers",
    "hybrid_override_pattern": "hybrid (Mamba) layers",
    "heterogeneous_layers_config_path": "layers of different shapes",
    "heterogeneous_layers_config_encoded_json": "layers of different shapes",
    "glu_linear_offset": "offset gated units",
    "activation_func_clamp_value": "clamped activations",
    "quick_geglu": "quick GEGLU",
    "transformer_block_type": "layers that are not pre-norm",
    "softmax_scale": "attention scale other than 1 / sqrt(head width)",
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "mcore_customization_config": "layers of another model family",
    "apply_embedding_scaling": "scaled embeddings",
    "headscale": "scaled heads",
    "attention_type": "attention other than multi-head",
}
SUPPORTED_VALUES = {"softmax_type": "vanilla", "transformer_block_type": "pre_ln", "attention_type": "multihead"}
UNUSED: tuple[Any, ...] = (None, False, 0, 0.0, [], "", "none")  # values of the other settings


class Settings:
    """The settings of a configuration by name, and `stated`: what they say of the architecture, by kdjax's keys."""

    def __init__(self, values: Mapping[str, Any], label: str, source: str):
        self.values, self.label, self.source = values, label, source
        self.stated: dict[str, Stated] = {}

    def get(self, *names: str, default: Any = None) -> Any:
        """Returns the value of the first of these settings that has one."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def state(self, key: str, value: Any, *names: str) -> None:
        """Records that `key` has a value because of the settings `names`. None records nothing."""
        if value is not None:
            shown = [f"{name} {self.values.get(name)}" for name in names if name in self.values]
            self.stated[key] = Stated(value, f"{self.label}: {', '.join(shown) or 'not stated, Megatron default'}")

    def copy(self, key: str, *names: str) -> None:
        """Records that `key` has the value of the first of these settings that has one."""
        name = next((name for name in names if self.values.get(name) is not None), None)
        if name is not None:
            self.state(key, self.values[name], name)

    def unsupported(self, name: str, feature: str) -> UserError:
        """Returns the error for a setting whose feature kdjax's model does not have."""
        return UserError(f"{self.source}: {name} = {self.values.get(name)!r}: kdjax's model has no {feature}")

    def refuse_unsupported(self) -> None:
        """Raises UserError for a feature in `UNSUPPORTED`."""
        for name, feature in UNSUPPORTED.items():
            accepted = (None, SUPPORTED_VALUES[name]) if name in SUPPORTED_VALUES else UNUSED
            if self.values.get(name) not in accepted:
                raise self.unsupported(name, feature)


def from_args(args: Mapping[str, Any], source: str) -> dict[str, Stated]:
    """Reads Megatron-LM's `args`, of any release that writes `checkpoint_version`; `source` is for error messages."""
    settings = Settings(args, "args", source)
    settings.refuse_unsupported()
    _sizes(settings)
    grouped = settings.get("group_query_attention", default=False)  # num_query_groups is 1 where this is off
    groups = settings.get("num_query_groups" if grouped else "num_attention_heads")
    settings.state("n_groups", groups, "group_query_attention", *(["num_query_groups"] if grouped else []))
    rotary = settings.get("use_rotary_position_embeddings", default=False)
    _position(settings, "rope" if rotary else settings.get("position_embedding_type", default="learned_absolute"))
    if settings.get("use_rope_scaling"):
        _llama3(settings, "use_rope_scaling", "rope_scaling_factor")
    settings.copy("rope_linear_factor", "rotary_seq_len_interpolation_factor")
    centred = [name for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p") if settings.get(name)]
    _norm(settings, settings.get("normalization", default="LayerNorm"), centred)
    bias = bool(settings.get("add_bias_linear", default=True))
    _biases(settings, "add_bias_linear", bias, "add_qkv_bias")
    flags = {"swiglu": "swiglu", "squared_relu": "squared_relu", "openai_gelu": "gelu_tanh"}
    flag = next((flag for flag in flags if settings.get(flag)), None)
    if flag is not None:
        settings.state("activation", flags[flag], flag)
    else:  # the fused kernel is the tanh approximation, and takes a bias (megatron/core/fusions/fused_bias_gelu.py)
        fused = bias and settings.get("bias_gelu_fusion", default=False)
        settings.state("activation", "gelu_tanh" if fused else "gelu", "bias_gelu_fusion", "add_bias_linear")
    untied = "untie_embeddings_and_output_weights"
    settings.state("tied", not settings.get(untied, default=False), untied)
    settings.copy("padded_vocab_size", "padded_vocab_size")
    if settings.get("tokenizer_type") in ("NullTokenizer", "NullMultimodalTokenizer") and settings.get("vocab_size"):
        # It counts its end-of-document token on top of --vocab-size.
        settings.state("vocab_size", int(settings.get("vocab_size")) + 1, "vocab_size", "tokenizer_type")
    else:
        settings.copy("vocab_size", "vocab_size")
    return settings.stated


def from_nemo(yaml: Mapping[str, Any], source: str) -> dict[str, Stated]:
    """Reads a `model_config.yaml` of NeMo 1."""
    settings = Settings(yaml, "model_config.yaml", source)
    settings.refuse_unsupported()
    _sizes(settings)
    settings.state("n_groups", settings.get("num_query_groups", "num_attention_heads"), "num_query_groups")
    _position(settings, settings.get("position_embedding_type", default="learned_absolute"))
    if settings.get("scale_positional_embedding"):
        _llama3(settings, "scale_positional_embedding", "scale_factor")
    settings.copy("rope_linear_factor", "seq_len_interpolation_factor")
    kinds = {"layernorm": "LayerNorm", "low_precision_layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
    kind = str(settings.get("normalization", default="layernorm"))
    _norm(settings, kinds.get(kind, kind), ["normalization"] if kind == "layernorm1p" else [])
    bias = bool(settings.get("bias", default=True))
    _biases(settings, "bias", bias, "qkv_bias")
    activation = str(settings.get("activation", default="gelu"))
    fused = activation == "gelu" and bias and settings.get("bias_activation_fusion", default=True)
    names = {"swiglu": "swiglu", "fast-swiglu": "swiglu", "squared-relu": "squared_relu", "gelu": "gelu"}
    if activation == "openai_gelu" or settings.get("openai_gelu") or fused:
        settings.state("activation", "gelu_tanh", "activation", "bias_activation_fusion", "openai_gelu")
    elif activation in names:
        settings.state("activation", names[activation], "activation", "bias_activation_fusion")
    else:
        raise settings.unsupported("activation", f"such activation; it has {', '.join(names)}")
    shared = "share_embeddings_and_output_weights"
    settings.state("tied", bool(settings.get(shared, default=True)), shared)
    settings.copy("vocab_size", "override_vocab_size")
    return settings.stated


def from_provider(model: Mapping[str, Any], label: str, source: str) -> dict[str, Stated]:
    """Reads the model section of Megatron-Bridge's run_config.yaml, or of NeMo 2's context/model.yaml (`config`).

    `label` is what the table of the architecture calls the file.
    """
    settings = Settings(model, label, source)
    settings.refuse_unsupported()
    if "gemma" in str(settings.get("_target_", default="")).lower():  # in its code, not in its values
        raise settings.unsupported("_target_", "scaled embeddings, as Gemma's")
    _sizes(settings)
    settings.state("n_groups", settings.get("num_query_groups", "num_attention_heads"), "num_query_groups")
    _position(settings, settings.get("position_embedding_type", default="learned_absolute"))
    if settings.get("use_rope_scaling", "rope_scaling"):
        _llama3(settings, "use_rope_scaling", "rope_scaling", "rope_scaling_factor")
    elif settings.get("scale_factor"):
        _llama3(settings, "scale_factor")
    settings.copy("rope_linear_factor", "seq_len_interpolation_factor")
    centred = [name for name in ("layernorm_zero_centered_gamma",) if settings.get(name)]
    _norm(settings, settings.get("normalization", default="LayerNorm"), centred)
    bias = bool(settings.get("add_bias_linear", default=True))
    _biases(settings, "add_bias_linear", bias, "add_qkv_bias")
    function = settings.get("activation_func", default="gelu")
    function = str(function.get("_target_") if isinstance(function, Mapping) else function).rpartition(".")[2]
    gated = bool(settings.get("gated_linear_unit", default=False))
    fused = bias and settings.get("bias_activation_fusion", "bias_gelu_fusion", default=False)
    plain = {"gelu": "gelu_tanh" if fused else "gelu", "openai_gelu": "gelu_tanh", "fast_gelu": "gelu_tanh"}
    names = {"silu": "swiglu"} if gated else plain | {"squared_relu": "squared_relu"}
    if function not in names:
        raise settings.unsupported("activation_func", f"such {'gated ' * gated}activation; it has {', '.join(names)}")
    settings.state("activation", names[function], "activation_func", "gated_linear_unit", "bias_activation_fusion")
    shared = "share_embeddings_and_output_weights"
    settings.state("tied", bool(settings.get(shared, default=True)), shared)
    settings.copy("vocab_size", "vocab_size")
    return settings.stated


def _sizes(settings: Settings) -> None:
    settings.copy("layers", "num_layers", "encoder_num_layers")
    settings.copy("d_model", "hidden_size")
    settings.copy("n_heads", "num_attention_heads")
    settings.copy("head_dim", "kv_channels")
    settings.copy("norm_eps", "layernorm_epsilon", "norm_epsilon")
    width = settings.get("ffn_hidden_size", default=4 * settings.get("hidden_size", default=0) or None)
    settings.state("d_ff", width, "ffn_hidden_size")
    settings.copy("rope_theta", "rotary_base")
    settings.copy("rope_fraction", "rotary_percent", "rotary_percentage")


def _position(settings: Settings, kind: str) -> None:
    known = {"rope": "rope", "learned_absolute": "learned"}
    if kind not in known:
        raise settings.unsupported("position_embedding_type", f"such positions; it has {', '.join(known)}")
    settings.state("position", known[kind], "position_embedding_type", "use_rotary_position_embeddings")
    if kind == "learned_absolute":
        settings.copy("max_positions", "max_position_embeddings", "encoder_seq_length", "seq_length")


def _llama3(settings: Settings, *names: str) -> None:
    factor = settings.get(*(name for name in names if "factor" in name), default=8.0)
    constants = zip(("low_freq_factor", "high_freq_factor", "old_context_len"), LLAMA3_SCALING, strict=True)
    values = (factor, *(settings.get(name, default=default) for name, default in constants))
    settings.state("rope_llama3", tuple(map(float, values)), *names)


def _norm(settings: Settings, kind: str, centred: Iterable[str]) -> None:
    """`centred` are the settings by which stored scales are the true ones minus 1."""
    kind, centred = kind.lower(), list(centred)
    if kind not in ("layernorm", "rmsnorm"):
        raise settings.unsupported("normalization", "such norm; it has LayerNorm and RMSNorm")
    if kind == "rmsnorm" and centred:
        raise settings.unsupported(centred[0], "RMSNorm with zero-centred scales")
    settings.state("norm", "layernorm_1p" if centred else kind, "normalization", *centred)
    if settings.get("qk_layernorm"):
        if kind != "rmsnorm":
            raise settings.unsupported("qk_layernorm", "LayerNorm on queries and keys; it has RMSNorm there")
        settings.state("qk_norm", True, "qk_layernorm")


def _biases(settings: Settings, name: str, bias: bool, qkv_name: str) -> None:
    settings.state("bias", bias, name)
    if settings.get(qkv_name) and not bias:
        settings.state("qkv_bias", True, qkv_name)
