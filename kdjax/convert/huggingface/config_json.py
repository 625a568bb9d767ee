"""Reads an architecture from config.json, writes it, and chooses the family for a model.

A family can express a model exactly if reading back what would be written for it gives the same architecture. So no
second table says what each family can do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kdjax.config import ModelConfig
from kdjax.convert.architecture import KEYS, Stated, resolve
from kdjax.convert.huggingface.families import ACTIVATIONS, FAMILIES, Family
from kdjax.types import UserError


def read_architecture(
    settings: Mapping[str, Any], family: Family, source: str, *, full_attention: bool = False
) -> dict[str, Stated]:
    """Returns what config.json states of the architecture, by kdjax's keys.

    Args:
        source: what error messages call the file.
        full_attention: accept a sliding window. In sequences no longer than the window it makes no difference.

    Raises UserError for what kdjax's model does not have.
    """
    given = dict(family.defaults) | dict(settings)
    for key, only in family.required.items():
        if given[key] != only:
            raise UserError(f"{source}: {key} = {given[key]!r}: kdjax's model has only {only!r}")
    found: dict[str, Stated] = {key: Stated(value, family.model_type) for key, value in family.constants.items()}
    for key, name in family.keys.items():
        if name not in given:
            raise UserError(f"{source}: {name} is missing; a complete config.json has it")
        if given[name] is not None:
            origin = name if settings.get(name) is not None else f"{name} (transformers' default)"
            found[key] = Stated(given[name], origin)
    if family.model_type == "gpt2":
        found |= _read_gpt2(given, source)
    else:
        if given.get("mlp_bias", given.get("attention_bias")) != given.get("attention_bias"):
            both = f"attention_bias = {given['attention_bias']}, mlp_bias = {given['mlp_bias']}"
            raise UserError(f"{source}: {both}: kdjax's model has biases in both attention and MLP, or in neither")
        if "sliding_window" in family.defaults and not full_attention:
            _refuse_sliding_window(given, source)
        found |= _read_rope(given, source)
    return found


def _read_gpt2(given: Mapping[str, Any], source: str) -> dict[str, Stated]:
    """Returns what GPT-2 states in its own way: the activation and the MLP's width."""
    known = {theirs: ours for ours, names in ACTIVATIONS.items() for theirs in names}
    activation = given["activation_function"]
    if activation not in known:
        raise UserError(f"{source}: activation_function = {activation!r}: kdjax converts {', '.join(known)}")
    found = {"activation": Stated(known[activation], f"activation_function {activation}")}
    if given["n_inner"] is None:
        found["d_ff"] = Stated(4 * given["n_embd"], "4 n_embd")
    return found


def _refuse_sliding_window(given: Mapping[str, Any], source: str) -> None:
    window, first = given["sliding_window"], given.get("max_window_layers", 0)  # the first layer with a window
    slides = given.get("use_sliding_window", True) and window is not None and window < given["max_position_embeddings"]
    if given.get("layer_types") is not None:
        slides = "sliding_attention" in given["layer_types"]
    elif given["num_hidden_layers"] <= first:
        slides = False
    if slides:
        raise UserError(
            f"{source}: sliding_window = {window}: kdjax attends to all earlier tokens. In sequences of up to {window} "
            "tokens that is the same; --full-attention converts the model anyway"
        )


def _read_rope(given: Mapping[str, Any], source: str) -> dict[str, Stated]:
    """Returns what `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4) state."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {"rope_theta": Stated(theta, "rope_theta")}
    fraction = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor = {fraction}: in transformers these families rotate whole heads"
        )
    if kind == "linear":
        found["rope_linear_factor"] = Stated(_scaling(rope, "factor", source), "rope_type linear")
    elif kind == "llama3":
        original = rope.get("original_max_position_embeddings", given.get("max_position_embeddings"))
        values = *(_scaling(rope, name, source) for name in ("factor", "low_freq_factor", "high_freq_factor")), original
        found["rope_llama3"] = Stated(values, "rope_type llama3")
    elif kind != "default":
        raise UserError(f"{source}: rope_type = {kind!r}: kdjax has only the rotary scalings linear and llama3")
    return found


def _scaling(rope: Mapping[str, Any], name: str, source: str) -> float:
    if name not in rope:
        raise UserError(f"{source}: {name} is missing in the scaling of the rotary frequencies, {dict(rope)}")
    return rope[name]


def write_architecture(config: ModelConfig, family: Family, max_positions: int, dtype: str) -> dict[str, Any]:
    """Returns the keys of config.json that state an architecture and its tensors' dtype."""
    values = {name: getattr(config, key) for key, name in family.keys.items()}
    if family.model_type == "gpt2":
        values["activation_function"] = ACTIVATIONS.get(config.activation, (config.activation,))[0]
    else:
        values |= {"head_dim": config.head_width, "hidden_act": "silu", "max_position_embeddings": max_positions}
        values |= _write_rope(config)
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


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """Returns the rotary frequencies for transformers 5 (`rope_parameters`) and, again, for transformers 4."""
    scaling: dict[str, Any] | None = None
    if config.rope_llama3 is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = dict(zip(names, config.rope_llama3, strict=True))
        scaling |= {"original_max_position_embeddings": int(config.rope_llama3[3]), "rope_type": "llama3"}
    elif config.rope_linear_factor != 1:
        scaling = {"factor": config.rope_linear_factor, "rope_type": "linear"}
    parameters = {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"})
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


# Keys that do not change what the model computes, or that a family states in another way (vocabulary padding).
NOT_COMPARED = {"padded_vocab_size", "tokenizer_sha256"}


def _inexpressible(config: ModelConfig, family: Family) -> list[str]:
    """Returns the values of the architecture that the family cannot express; empty if the model can be one of it."""
    try:
        written = write_architecture(config, family, config.max_positions or 1, "float32")
        read, _ = resolve(read_architecture(written, family, "config.json"), [])
    except UserError as error:
        return [str(error)]
    ignored = NOT_COMPARED | ({"max_positions"} if config.position == "rope" else {"rope_theta", "rope_fraction"})
    mine = dataclasses.replace(config, n_groups=config.groups, head_dim=config.head_width)
    return [
        f"{key} = {getattr(mine, key)!r} (it has {getattr(read, key)!r})"
        for key in KEYS
        if key not in ignored and getattr(mine, key) != getattr(read, key)
    ]


def choose_family(config: ModelConfig, preferred: str | None) -> Family:
    """Returns the family that can express a model: `preferred`, a model_type, if it can, else the first that can.

    Raises UserError, listing what each family cannot express, if none can.
    """
    order = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    problems = {family.model_type: _inexpressible(config, family) for family in order}
    for family in order:
        if not problems[family.model_type]:
            return family
    listed = "\n".join(f"  {name}: {', '.join(values)}" for name, values in problems.items())
    raise UserError(f"no Hugging Face family that kdjax writes can express this model:\n{listed}")
