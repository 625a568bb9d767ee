"""Writes an architecture as Megatron's args, which `kdjax.convert.megatron.args_reader.from_args` reads back."""

import math
from typing import Any

from kdjax.config import ModelConfig
from kdjax.convert.megatron.args_reader import LLAMA3_SCALING
from kdjax.types import UserError

MEGATRON_DIVISOR = 128  # the default of --make-vocab-size-divisible-by


def to_args(config: ModelConfig, sequence_length: int | None = None) -> dict[str, Any]:
    """Returns Megatron's args for a model, under the names of its newer and older releases.

    `sequence_length` is the length that a model without learned positions was trained on; None leaves it out.
    Raises UserError for an architecture that Megatron's GPT does not have.
    """
    _refuse_inexpressible(config)
    rows, groups = config.vocab_rows, config.groups
    grouped, rope = groups != config.n_heads, config.position == "rope"
    centred = config.norm == "layernorm_1p"
    positions = config.max_positions or sequence_length
    lengths = {} if positions is None else {"seq_length": positions, "max_position_embeddings": positions}
    llama3, linear = config.rope_llama3, int(config.rope_linear_factor) if config.rope_linear_factor != 1 else None
    return lengths | {
        "num_layers": config.layers,
        "hidden_size": config.d_model,
        "ffn_hidden_size": config.d_ff,
        "num_attention_heads": config.n_heads,
        "kv_channels": config.head_width,
        "group_query_attention": grouped,
        "num_query_groups": groups if grouped else 1,  # as Megatron leaves it without the flag
        "vocab_size": config.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": _divisor(config.vocab_size, rows),
        "position_embedding_type": "rope" if rope else "learned_absolute",
        "add_position_embedding": not rope,
        "use_rotary_position_embeddings": False,  # older releases' way of stating rope
        "rotary_base": int(config.rope_theta),
        "rotary_percent": config.rope_fraction,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": linear,
        "use_rope_scaling": llama3 is not None,
        "rope_scaling_factor": 8.0 if llama3 is None else float(llama3[0]),
        "normalization": "RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": config.norm_eps,
        "norm_epsilon": config.norm_eps,
        "layernorm_zero_centered_gamma": centred,
        "apply_layernorm_1p": centred,
        "qk_layernorm": config.qk_norm,
        "swiglu": config.activation == "swiglu",
        "squared_relu": config.activation == "squared_relu",
        "openai_gelu": False,
        "bias_gelu_fusion": config.activation == "gelu_tanh",  # the fused kernel is the approximation
        "add_bias_linear": config.bias,
        "add_qkv_bias": config.bias or config.qkv_bias,
        "untie_embeddings_and_output_weights": not config.tied,
        "apply_residual_connection_post_layernorm": False,
        "num_experts": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "tokenizer_type": None,
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _refuse_inexpressible(config: ModelConfig) -> None:
    fixed = ", ".join(f"{value:g}" for value in LLAMA3_SCALING)
    fractions = [key for key in ("rope_theta", "rope_linear_factor") if getattr(config, key) % 1]
    mixed_norms = config.qk_norm and config.norm != "rmsnorm"
    approximate = config.activation == "gelu_tanh" and not config.bias
    scaled = config.rope_llama3 is not None and config.rope_llama3[1:] != LLAMA3_SCALING
    for inexpressible, setting, reason in (
        (mixed_norms, f"qk_norm with model.norm = {config.norm!r}", "its queries and keys get its layers' norm"),
        (approximate, "activation = 'gelu_tanh' without model.bias", "it approximates GELU only where it adds a bias"),
        (scaled, f"rope_llama3 = {config.rope_llama3}", f"it fixes all but the factor, to {fixed}"),
        *(
            (config.position == "rope", f"{key} = {getattr(config, key)}", "it must be a whole number")
            for key in fractions
        ),
    ):
        if inexpressible:
            raise UserError(
                f"model.{setting}: Megatron's GPT does not have it: {reason}; try to-hf, which has other families"
            )


def _divisor(vocab_size: int, rows: int) -> int:
    """Returns a --make-vocab-size-divisible-by that pads the vocabulary to this number of rows."""
    return MEGATRON_DIVISOR if math.ceil(vocab_size / MEGATRON_DIVISOR) * MEGATRON_DIVISOR == rows else rows
