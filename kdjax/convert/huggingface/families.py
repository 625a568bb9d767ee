"""The Hugging Face model families that kdjax converts, a table for each: Llama, Qwen2, Qwen3, Mistral and GPT-2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Family:
    """How one of transformers' model classes states its architecture."""

    model_type: str
    architecture: str  # the name of the class
    keys: Mapping[str, str]  # kdjax key -> key of config.json
    defaults: Mapping[str, Any]  # key of config.json -> transformers' default; None: `read_architecture` derives it
    constants: Mapping[str, Any]  # kdjax key -> its value in every model of the family
    required: Mapping[str, Any]  # key of config.json -> the only value that kdjax computes


LLAMA_KEYS = {
    "vocab_size": "vocab_size", "layers": "num_hidden_layers", "d_model": "hidden_size",
    "n_heads": "num_attention_heads", "n_groups": "num_key_value_heads", "head_dim": "head_dim",
    "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
LLAMA_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
LLAMA_CONSTANTS = {
    "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False, "qk_norm": False,
}  # fmt: skip
GATED = {"hidden_act": "silu"}
QWEN_WINDOW = {
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768,
}  # fmt: skip

GPT2_KEYS = {
    "vocab_size": "vocab_size", "max_positions": "n_positions", "layers": "n_layer", "d_model": "n_embd",
    "n_heads": "n_head", "d_ff": "n_inner", "norm_eps": "layer_norm_epsilon", "activation": "activation_function",
    "tied": "tie_word_embeddings",
}  # fmt: skip
GPT2_CONSTANTS = {"position": "learned", "norm": "layernorm", "bias": True, "qkv_bias": False, "qk_norm": False}
GPT2_REQUIRED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GPT2_DEFAULTS = GPT2_REQUIRED | {
    "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            LLAMA_KEYS | {"bias": "attention_bias"},
            LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
            {key: value for key, value in LLAMA_CONSTANTS.items() if key != "bias"},
            GATED,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            LLAMA_KEYS,
            LLAMA_DEFAULTS | QWEN_WINDOW,
            LLAMA_CONSTANTS | {"qkv_bias": True},
            GATED,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            LLAMA_KEYS,
            LLAMA_DEFAULTS | QWEN_WINDOW | {"head_dim": 128, "attention_bias": False},
            LLAMA_CONSTANTS | {"qk_norm": True},
            GATED | {"attention_bias": False},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            LLAMA_KEYS,
            LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
            LLAMA_CONSTANTS,
            GATED,
        ),
        Family("gpt2", "GPT2LMHeadModel", GPT2_KEYS, GPT2_DEFAULTS, GPT2_CONSTANTS, GPT2_REQUIRED),
    )
}
# kdjax's activation -> transformers' names of it; the first is the one that is written.
ACTIVATIONS = {"gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu": ("gelu",)}


def family_of(settings: Mapping[str, Any], source: str) -> Family:
    """Returns the family of a config.json. Raises UserError, naming the file `source`, if kdjax does not know it."""
    family = FAMILIES.get(settings.get("model_type", ""))
    classes = settings.get("architectures") or ([family.architecture] if family else [])
    if family is None or family.architecture not in classes:
        known = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
        raise UserError(
            f"{source}: architectures = {classes}, model_type = {settings.get('model_type')!r}: kdjax converts {known}"
        )
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method")
        raise UserError(f"{source}: quantization_config ({method}): convert the checkpoint from which it was quantised")
    return family
