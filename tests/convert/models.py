"""Small models of random weights, what they compute, and how to compare them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from kdjax.checkpoint import load_params, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.model import bind, param_shapes

HF_GOLDENS = Path(__file__).parent.parent / "fixtures" / "hf"
HF_NAMES = sorted(path.name for path in HF_GOLDENS.iterdir())


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Returns random parameters; no bias is zero and no scale is one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param_shapes(config))


def save_random_model(path: Path, config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Writes a model directory of random parameters, and returns them."""
    params = random_params(config, seed)
    save_model(path, config, params)
    return params


def logits(model: Path, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Returns a model directory's logits in float32, from a forward pass that is compiled once per architecture."""
    config = dataclasses.replace(read_model_config(model), dtype="float32", tokenizer_sha256=None)
    return np.array(_forward(config, load_params(model, config), tokens, positions))


@functools.partial(jax.jit, static_argnames="config")
def _forward(config: ModelConfig, params: Any, tokens: Any, positions: Any) -> Any:
    return bind(config, params)(tokens, positions)


def safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns the tensors in a directory's safetensors files, read by the safetensors package."""
    found: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return found


def assert_same_params(one: Path, other: Path) -> None:
    """Asserts that two model directories have the same architecture and load to the same arrays."""
    first, second = read_model_config(one), read_model_config(other)
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, load_params(one, first), load_params(other, second))
