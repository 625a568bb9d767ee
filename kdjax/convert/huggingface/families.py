"""config.json to kdjax's architecture and back, one table a family.

A family can express a model exactly if reading back what would be written for it gives the same architecture; so
`choose` needs no second table of what each can do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kdjax.config import ModelConfig
from kdjax.convert.architecture import KEYS, Stated, settle
from kdjax.types import UserError

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one of transformers' model classes states its architecture."""

    model_type: str
    architecture: str
    keys: Mapping[str, str]  # kdjax key -> key of config.json
    defaults: Mapping[str, Any]  # what transformers takes where config.json is silent; None: see `stated`
    constants: Mapping[str, Any]  # kdjax key -> what every model of the family has
    required: Mapping[str, Any]  # key of config.json -> the only value that kdjax computes


LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA_CONSTANTS = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
}
GATED = {"hidden_act": "silu"}
QWEN_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

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
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            {
                "vocab_size": "vocab_size",
                "max_positions": "n_positions",
                "layers": "n_layer",
                "d_model": "n_embd",
                "n_heads": "n_head",
                "d_ff": "n_inner",
                "norm_eps": "layer_norm_epsilon",
                "activation": "activation_function",
                "tied": "tie_word_embeddings",
            },
            {
                "n_inner": None,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
                "tie_word_embeddings": True,
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            {"position": "learned", "norm": "layernorm", "bias": True, "qkv_bias": False, "qk_norm": False},
            {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        ),
    )
}
# transformers' names of GPT-2's activations, the one that is written first.
ACTIVATIONS = {"gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu": ("gelu",)}


def family_of(settings: Settings, where: str) -> Family:
    """The family of a config.json. Raises UserError for one that kdjax does not know."""
    family = FAMILIES.get(settings.get("model_type", ""))
    classes = settings.get("architectures") or ([family.architecture] if family else [])
    if family is None or family.architecture not in classes:
        known = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
        raise UserError(
            f"{where}: architectures = {classes}, model_type = {settings.get('model_type')!r}: kdjax converts {known}"
        )
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method")
        raise UserError(f"{where}: quantization_config ({method}): convert the checkpoint it was quantised from")
    return family


def stated(settings: Settings, family: Family, where: str, *, full_attention: bool = False) -> dict[str, Stated]:
    """What config.json says of the architecture. Raises UserError for what kdjax's model cannot express.

    `full_attention` takes a sliding window for full attention, which it is in sequences no longer than the window.
    """
    given = dict(family.defaults) | dict(settings)
    for key, only in family.required.items():
        if given[key] != only:
            raise UserError(f"{where}: {key} = {given[key]!r}: kdjax's model has {only!r} only")
    found: dict[str, Stated] = {key: Stated(value, family.model_type) for key, value in family.constants.items()}
    for key, name in family.keys.items():
        if name not in given:
            raise UserError(f"{where}: no {name}; a complete config.json has one")
        if given[name] is not None:
            by = name if settings.get(name) is not None else f"{name} (transformers' default)"
            found[key] = Stated(given[name], by)
    if family.model_type == "gpt2":
        found |= _gpt2(given, where)
    else:
        if given.get("mlp_bias", given.get("attention_bias")) != given.get("attention_bias"):
            both = f"attention_bias = {given['attention_bias']}, mlp_bias = {given['mlp_bias']}"
            raise UserError(f"{where}: {both}: kdjax's model has biases on all linear maps or on none of these")
        if "sliding_window" in family.defaults and not full_attention:
            _refuse_sliding_window(given, where)
        found |= _rope(given, where)
    return found


def _gpt2(given: Settings, where: str) -> dict[str, Stated]:
    """What GPT-2's config.json says in words of its own."""
    known = {theirs: ours for ours, names in ACTIVATIONS.items() for theirs in names}
    activation = given["activation_function"]
    if activation not in known:
        raise UserError(f"{where}: activation_function = {activation!r}: kdjax converts {', '.join(known)}")
    found = {"activation": Stated(known[activation], f"activation_function {activation}")}
    if given["n_inner"] is None:
        found["d_ff"] = Stated(4 * given["n_embd"], "4 n_embd")
    return found


def _refuse_sliding_window(given: Settings, where: str) -> None:
    window, first = given["sliding_window"], given.get("max_window_layers", 0)  # the first layer that has one
    slides = given.get("use_sliding_window", True) and window is not None and window < given["max_position_embeddings"]
    if given.get("layer_types") is not None:
        slides = "sliding_attention" in given["layer_types"]
    elif given["num_hidden_layers"] <= first:
        slides = False
    if slides:
        raise UserError(
            f"{where}: sliding_window = {window}: kdjax attends to everything. In sequences of up to {window} tokens "
            "that is the same; --full-attention converts on these terms"
        )


def _rope(given: Settings, where: str) -> dict[str, Stated]:
    """The rotary frequencies, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {"rope_theta": Stated(theta, "rope_theta")}
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise UserError(f"{where}: partial_rotary_factor = {share}: these families rotate whole heads in transformers")
    if kind == "linear":
        found["rope_linear_factor"] = Stated(_scaling(rope, "factor", where), "rope_type linear")
    elif kind == "llama3":
        original = rope.get("original_max_position_embeddings", given.get("max_position_embeddings"))
        values = *(_scaling(rope, name, where) for name in ("factor", "low_freq_factor", "high_freq_factor")), original
        found["rope_llama3"] = Stated(values, "rope_type llama3")
    elif kind != "default":
        raise UserError(f"{where}: rope_type = {kind!r}: kdjax scales rotary frequencies by linear and llama3 only")
    return found


def _scaling(rope: Settings, name: str, where: str) -> float:
    if name not in rope:
        raise UserError(f"{where}: the scaling of its rotary frequencies, {dict(rope)}, has no {name}")
    return rope[name]


def settings(config: ModelConfig, family: Family, max_positions: int, dtype: str) -> dict[str, Any]:
    """The keys of config.json that state this architecture, `dtype` being the tensors'."""
    values = {name: getattr(config, key) for key, name in family.keys.items()}
    if family.model_type == "gpt2":
        values["activation_function"] = ACTIVATIONS.get(config.activation, (config.activation,))[0]
    else:
        values |= {"head_dim": config.head_width, "hidden_act": "silu", "max_position_embeddings": max_positions}
        values |= _rope_settings(config)
        values |= {"mlp_bias": config.bias} if "mlp_bias" in family.defaults else {}
        values |= {"sliding_window": None} if "sliding_window" in family.defaults else {}
        if "use_sliding_window" in family.defaults:
            values |= {"use_sliding_window": False, "layer_types": ["full_attention"] * config.layers}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "dtype": dtype,
        **family.required,
        **values,
    }


def _rope_settings(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: transformers 5 reads `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    scaling: dict[str, Any] | None = None
    if config.rope_llama3 is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = dict(zip(names, config.rope_llama3, strict=True))
        scaling |= {"original_max_position_embeddings": int(config.rope_llama3[3]), "rope_type": "llama3"}
    elif config.rope_linear_factor != 1:
        scaling = {"factor": config.rope_linear_factor, "rope_type": "linear"}
    parameters = {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"})
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


# Of no consequence to the function that the model computes, or said in another way (vocabulary padding).
NOT_COMPARED = {"padded_vocab_size", "tokenizer_sha256"}


def misfits(config: ModelConfig, family: Family) -> list[str]:
    """What of this architecture the family cannot state; nothing if it can be written as one of its models."""
    positions = config.max_positions or 1
    try:
        written = settings(config, family, positions, "float32")
        read, _ = settle(stated(written, family, "config.json"), [])
    except UserError as error:
        return [str(error)]
    ignored = NOT_COMPARED | ({"max_positions"} if config.position == "rope" else {"rope_theta", "rope_fraction"})
    mine = dataclasses.replace(config, n_groups=config.groups, head_dim=config.head_width)
    return [
        f"{key} = {getattr(mine, key)!r} (it has {getattr(read, key)!r})"
        for key in KEYS
        if key not in ignored and getattr(mine, key) != getattr(read, key)
    ]


def choose(config: ModelConfig, preferred: str | None) -> Family:
    """The family that the model came from if it still fits, else the first that does.

    Raises UserError with what keeps each of them from it.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    problems = {family.model_type: misfits(config, family) for family in order}
    for family in order:
        if not problems[family.model_type]:
            return family
    told = "\n".join(f"  {name}: {', '.join(lines)}" for name, lines in problems.items())
    raise UserError(f"no Hugging Face family that kdjax writes can express this model:\n{told}")
