"""Weights and logits of two small Megatron-Core GPTs, as kdjax parameters.

The arrays were written by megatron-core 0.16.1 (`torch_dist`, bfloat16-representable) and its own float32 forward pass.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kdjax.config import ModelConfig

DATA = Path(__file__).parent / "data" / "trajectory"
VARIANTS = ("gpt2ish", "llamaish")

SHAPE = ModelConfig(
    layers=4,
    d_model=64,
    n_heads=4,
    head_dim=16,
    vocab_size=500,
    padded_vocab_size=512,
    dtype="float32",
    remat="none",
)
ARCHITECTURES = {
    "gpt2ish": dataclasses.replace(
        SHAPE,
        n_groups=4,
        d_ff=256,
        position="learned",
        max_positions=32,
        norm="layernorm",
        activation="gelu",
        bias=True,
    ),
    "llamaish": dataclasses.replace(SHAPE, n_groups=2, d_ff=160, tied=False),
}


def trajectory(variant: str) -> dict[str, Any]:
    """The recorded training runs of a variant."""
    return json.loads((DATA / variant / "trajectory.json").read_text())


def params(variant: str) -> dict[str, Any]:
    """The variant's initial weights in kdjax's canonical layout."""
    config = ARCHITECTURES[variant]
    with np.load(DATA / variant / "initial_weights_bf16.npz") as stored:
        raw = {name: stored[name].view(ml_dtypes.bfloat16).astype(np.float32) for name in stored}
    layer = {name.removeprefix("decoder.layers."): array for name, array in raw.items() if "decoder.layers." in name}
    L, G, H, D = config.layers, config.n_groups, config.head_dim, config.d_model
    per_group = config.n_heads // G + 2  # a group's query heads, then its key, then its value

    def qkv(kind: str) -> dict[str, Any]:
        grouped = layer[f"self_attention.linear_qkv.{kind}"].reshape(L, G, per_group, H, -1)
        parts = {
            "q": grouped[:, :, :-2].reshape(L, -1, H, grouped.shape[-1]),
            "k": grouped[:, :, -2],
            "v": grouped[:, :, -1],
        }
        if kind == "bias":
            return {name: part[..., 0] for name, part in parts.items()}
        return {name: np.moveaxis(part, -1, 1) for name, part in parts.items()}

    def kernel(name: str) -> np.ndarray:
        return np.moveaxis(layer[f"{name}.weight"], -1, 1)

    def norm(prefix: str, source: dict[str, Any]) -> dict[str, Any]:
        found = {"scale": source[f"{prefix}weight"]}
        return found | ({"bias": source[f"{prefix}bias"]} if f"{prefix}bias" in source else {})

    attn = {name: {"kernel": array} for name, array in qkv("weight").items()}
    attn["o"] = {"kernel": kernel("self_attention.linear_proj").reshape(L, config.n_heads, H, D)}
    fc1 = kernel("mlp.linear_fc1")
    mlp = {"down": {"kernel": kernel("mlp.linear_fc2")}}
    if config.activation == "swiglu":
        mlp["gate"], mlp["up"] = ({"kernel": half} for half in np.split(fc1, 2, axis=-1))
    else:
        mlp["up"] = {"kernel": fc1}
    if config.bias:
        for name, array in qkv("bias").items():
            attn[name]["bias"] = array
        attn["o"]["bias"] = layer["self_attention.linear_proj.bias"]
        mlp["up"]["bias"], mlp["down"]["bias"] = layer["mlp.linear_fc1.bias"], layer["mlp.linear_fc2.bias"]
    tree = {
        "embed": raw["embedding.word_embeddings.weight"],
        "layers": {
            "attn": attn,
            "attn_norm": norm("self_attention.linear_qkv.layer_norm_", layer),
            "mlp": mlp,
            "mlp_norm": norm("mlp.linear_fc1.layer_norm_", layer),
        },
        "final_norm": norm("decoder.final_layernorm.", raw),
    }
    if config.position == "learned":
        tree["positions"] = raw["embedding.position_embeddings.weight"]
    if not config.tied:
        tree["unembed"] = raw["output_layer.weight"]
    return tree
