"""The architecture as Megatron's args, NeMo's YAML and Megatron-Bridge's (or NeMo 2's) configuration state it.

Each function returns what is stated, key by key, and raises UserError for features that kdjax's model does not have.
What a checkpoint leaves unstated gets kdjax's default and is shown as such in the table.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kdjax.convert.architecture import Stated
from kdjax.types import UserError

# Llama 3.1's constants, fixed in megatron/core/models/common/embeddings/rotary_pos_embedding.py: low, high, original.
LLAMA3_SCALING = (1.0, 4.0, 8192.0)

Feature = tuple[str, Callable[[Any], bool], str]


def _set(value: Any) -> bool:
    return value not in (None, False, 0, 0.0, [], "", "none")


# Features without a counterpart, under the names of any of the three dialects.
ABSENT: tuple[Feature, ...] = (
    ("num_experts", _set, "mixtures of experts"),
    ("num_moe_experts", _set, "mixtures of experts"),
    ("multi_latent_attention", _set, "multi-latent attention"),
    ("mtp_num_layers", _set, "multi-token prediction"),
    ("rotary_interleaved", _set, "interleaved rotary positions"),
    ("no_rope_freq", _set, "layers without rotary positions"),
    ("mrope_section", _set, "multimodal rotary positions"),
    ("apply_residual_connection_post_layernorm", _set, "post-norm residual connections"),
    ("attention_output_gate", _set, "gated attention outputs"),
    ("qk_l2_norm", _set, "L2-normed queries and keys"),
    ("softmax_type", lambda value: value not in (None, "vanilla"), "attention sinks"),
    ("window_size", _set, "sliding-window attention"),
    ("linear_attention_freq", _set, "linear attention"),
    ("experimental_attention_variant", _set, "experimental attention variants"),
    ("is_hybrid_model", _set, "hybrid (Mamba) layers"),
    ("hybrid_override_pattern", _set, "hybrid (Mamba) layers"),
    ("heterogeneous_layers_config_path", _set, "layers of different shapes"),
    ("heterogeneous_layers_config_encoded_json", _set, "layers of different shapes"),
    ("glu_linear_offset", _set, "offset gated units"),
    ("activation_func_clamp_value", _set, "clamped activations"),
    ("quick_geglu", _set, "quick GEGLU"),
    ("transformer_block_type", lambda value: value not in (None, "pre_ln"), "other layers than pre-norm ones"),
    ("softmax_scale", _set, "attention scale of its own"),
    ("attn_logit_softcapping", _set, "soft-capped attention"),
    ("final_logit_softcapping", _set, "soft-capped logits"),
    ("mcore_customization_config", _set, "layers of another model family"),
    ("apply_embedding_scaling", _set, "scaled embeddings"),
    ("headscale", _set, "scaled heads"),
    ("attention_type", lambda value: value not in (None, "multihead"), "other attention than multi-head"),
)


class Told:
    """Values by name, looked up under several names, and remembered with the one that stated them."""

    def __init__(self, values: Mapping[str, Any], label: str, where: str):
        self.values, self.label, self.where = values, label, where
        self.stated: dict[str, Stated] = {}

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the names that has a value."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def state(self, key: str, value: Any, *names: str) -> None:
        """`key` is `value`, because of the values of `names`; None states nothing."""
        if value is not None:
            shown = [f"{name} {self.values.get(name)}" for name in names if name in self.values]
            self.stated[key] = Stated(value, f"{self.label}: {', '.join(shown) or 'not stated, Megatron default'}")

    def same(self, key: str, *names: str) -> None:
        """`key` is what the first of the names says."""
        name = next((name for name in names if self.values.get(name) is not None), None)
        if name is not None:
            self.state(key, self.values[name], name)

    def refuse(self, name: str, what: str) -> UserError:
        return UserError(f"{self.where}: {name} = {self.values.get(name)!r}: kdjax's model has no {what}")

    def refuse_absent(self) -> None:
        """Raises UserError for a feature in `ABSENT`."""
        for name, used, what in ABSENT:
            if used(self.values.get(name)):
                raise self.refuse(name, what)


def from_args(args: Mapping[str, Any], where: str) -> dict[str, Stated]:
    """Megatron-LM's `args`, of any release that writes `checkpoint_version`."""
    told = Told(args, "args", where)
    told.refuse_absent()
    _sizes(told)
    grouped = told.get("group_query_attention", default=False)  # num_query_groups is 1 where this is off
    told.state(
        "n_groups",
        told.get("num_query_groups" if grouped else "num_attention_heads"),
        "group_query_attention",
        *(["num_query_groups"] if grouped else []),
    )
    rotary = told.get("use_rotary_position_embeddings", default=False)
    _position(told, "rope" if rotary else told.get("position_embedding_type", default="learned_absolute"))
    if told.get("use_rope_scaling"):
        _llama3(told, "use_rope_scaling", "rope_scaling_factor")
    told.same("rope_linear_factor", "rotary_seq_len_interpolation_factor")
    centred = [name for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p") if told.get(name)]
    _norm(told, told.get("normalization", default="LayerNorm"), centred)
    bias = bool(told.get("add_bias_linear", default=True))
    _biases(told, "add_bias_linear", bias, "add_qkv_bias")
    if told.get("swiglu"):
        told.state("activation", "swiglu", "swiglu")
    elif told.get("squared_relu"):
        told.state("activation", "squared_relu", "squared_relu")
    elif told.get("openai_gelu"):
        told.state("activation", "gelu_tanh", "openai_gelu")
    else:  # the fused kernel is the tanh approximation, and takes a bias (megatron/core/fusions/fused_bias_gelu.py)
        fused = bias and told.get("bias_gelu_fusion", default=False)
        told.state("activation", "gelu_tanh" if fused else "gelu", "bias_gelu_fusion", "add_bias_linear")
    untied = "untie_embeddings_and_output_weights"
    told.state("tied", not told.get(untied, default=False), untied)
    told.same("padded_vocab_size", "padded_vocab_size")
    if told.get("tokenizer_type") in ("NullTokenizer", "NullMultimodalTokenizer") and told.get("vocab_size"):
        # It counts its end-of-document token on top of --vocab-size.
        told.state("vocab_size", int(told.get("vocab_size")) + 1, "vocab_size", "tokenizer_type")
    else:
        told.same("vocab_size", "vocab_size")
    return told.stated


def from_nemo(yaml: Mapping[str, Any], where: str) -> dict[str, Stated]:
    """A NeMo 1 `model_config.yaml`."""
    told = Told(yaml, "model_config.yaml", where)
    told.refuse_absent()
    _sizes(told)
    told.state("n_groups", told.get("num_query_groups", "num_attention_heads"), "num_query_groups")
    _position(told, told.get("position_embedding_type", default="learned_absolute"))
    if told.get("scale_positional_embedding"):
        _llama3(told, "scale_positional_embedding", "scale_factor")
    told.same("rope_linear_factor", "seq_len_interpolation_factor")
    kinds = {"layernorm": "LayerNorm", "low_precision_layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
    kind = str(told.get("normalization", default="layernorm"))
    _norm(told, kinds.get(kind, kind), ["normalization"] if kind == "layernorm1p" else [])
    bias = bool(told.get("bias", default=True))
    _biases(told, "bias", bias, "qkv_bias")
    activation = str(told.get("activation", default="gelu"))
    fused = activation == "gelu" and bias and told.get("bias_activation_fusion", default=True)
    names = {"swiglu": "swiglu", "fast-swiglu": "swiglu", "squared-relu": "squared_relu", "gelu": "gelu"}
    if activation == "openai_gelu" or told.get("openai_gelu") or fused:
        told.state("activation", "gelu_tanh", "activation", "bias_activation_fusion", "openai_gelu")
    elif activation in names:
        told.state("activation", names[activation], "activation", "bias_activation_fusion")
    else:
        raise told.refuse("activation", f"such activation; it has {', '.join(names)}")
    told.state(
        "tied",
        bool(told.get("share_embeddings_and_output_weights", default=True)),
        "share_embeddings_and_output_weights",
    )
    told.same("vocab_size", "override_vocab_size")
    return told.stated


def from_provider(model: Mapping[str, Any], label: str, where: str) -> dict[str, Stated]:
    """The model section of Megatron-Bridge's run_config.yaml, or NeMo 2's context/model.yaml (`config`)."""
    told = Told(model, label, where)
    told.refuse_absent()
    if "gemma" in str(told.get("_target_", default="")).lower():  # in its code, not in its values
        raise told.refuse("_target_", "scaled embeddings, as Gemma's")
    _sizes(told)
    told.state("n_groups", told.get("num_query_groups", "num_attention_heads"), "num_query_groups")
    _position(told, told.get("position_embedding_type", default="learned_absolute"))
    if told.get("use_rope_scaling", "rope_scaling"):
        _llama3(told, "use_rope_scaling", "rope_scaling", "rope_scaling_factor")
    elif told.get("scale_factor"):
        _llama3(told, "scale_factor")
    told.same("rope_linear_factor", "seq_len_interpolation_factor")
    centred = [name for name in ("layernorm_zero_centered_gamma",) if told.get(name)]
    _norm(told, told.get("normalization", default="LayerNorm"), centred)
    bias = bool(told.get("add_bias_linear", default=True))
    _biases(told, "add_bias_linear", bias, "add_qkv_bias")
    function = told.get("activation_func", default="gelu")
    function = str(function.get("_target_") if isinstance(function, Mapping) else function).rpartition(".")[2]
    gated = bool(told.get("gated_linear_unit", default=False))
    fused = bias and told.get("bias_activation_fusion", "bias_gelu_fusion", default=False)
    plain = {"gelu": "gelu_tanh" if fused else "gelu", "openai_gelu": "gelu_tanh", "fast_gelu": "gelu_tanh"}
    names = {"silu": "swiglu"} if gated else plain | {"squared_relu": "squared_relu"}
    if function not in names:
        raise told.refuse("activation_func", f"such {'gated ' * gated}activation; it has {', '.join(names)}")
    told.state("activation", names[function], "activation_func", "gated_linear_unit", "bias_activation_fusion")
    shared = "share_embeddings_and_output_weights"
    told.state("tied", bool(told.get(shared, default=True)), shared)
    told.same("vocab_size", "vocab_size")
    return told.stated


def _sizes(told: Told) -> None:
    told.same("layers", "num_layers", "encoder_num_layers")
    told.same("d_model", "hidden_size")
    told.same("n_heads", "num_attention_heads")
    told.same("head_dim", "kv_channels")
    told.same("norm_eps", "layernorm_epsilon", "norm_epsilon")
    width = told.get("ffn_hidden_size", default=4 * told.get("hidden_size", default=0) or None)
    told.state("d_ff", width, "ffn_hidden_size")
    told.same("rope_theta", "rotary_base")
    told.same("rope_fraction", "rotary_percent", "rotary_percentage")


def _position(told: Told, kind: str) -> None:
    known = {"rope": "rope", "learned_absolute": "learned"}
    if kind not in known:
        raise told.refuse("position_embedding_type", f"such positions; it has {', '.join(known)}")
    told.state("position", known[kind], "position_embedding_type", "use_rotary_position_embeddings")
    if kind == "learned_absolute":
        told.same("max_positions", "max_position_embeddings", "encoder_seq_length", "seq_length")


def _llama3(told: Told, *names: str) -> None:
    factor = told.get(*(name for name in names if "factor" in name), default=8.0)
    low, high, original = LLAMA3_SCALING
    told.state(
        "rope_llama3",
        (
            float(factor),
            float(told.get("low_freq_factor", default=low)),
            float(told.get("high_freq_factor", default=high)),
            float(told.get("old_context_len", default=original)),
        ),
        *names,
    )


def _norm(told: Told, kind: str, centred: Iterable[str]) -> None:
    """`centred` names the values that make the stored scales 1 too small."""
    kind, centred = kind.lower(), list(centred)
    if kind not in ("layernorm", "rmsnorm"):
        raise told.refuse("normalization", "such norm; it has LayerNorm and RMSNorm")
    if kind == "rmsnorm" and centred:
        raise told.refuse(centred[0], "RMSNorm with zero-centred scales")
    told.state("norm", "layernorm_1p" if centred else kind, "normalization", *centred)
    if told.get("qk_layernorm"):
        if kind != "rmsnorm":
            raise told.refuse("qk_layernorm", "LayerNorm on queries and keys; it has RMSNorm there")
        told.state("qk_norm", True, "qk_layernorm")


def _biases(told: Told, name: str, bias: bool, qkv_name: str) -> None:
    told.state("bias", bias, name)
    if told.get(qkv_name) and not bias:
        told.state("qkv_bias", True, qkv_name)
