"""Small models of random weights, their logits, and the student that the export tests share."""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import toy_problem as toy

from kdjax import config as configs
from kdjax.checkpoint import load_params, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.model import bind, param_shapes
from kdjax.train import run

HF_GOLDENS = Path(__file__).parent.parent / "fixtures" / "hf"
PADDING = 3  # rows of the student's vocabulary that are not true tokens


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
    return np.asarray(_forward(config, load_params(model, config), tokens, positions))


@functools.partial(jax.jit, static_argnames="config")
def _forward(config: ModelConfig, params: Any, tokens: Any, positions: Any) -> Any:
    return bind(config, params)(tokens, positions)


def assert_same_params(one: Path, other: Path) -> None:
    """Asserts that two model directories have the same architecture and load to the same arrays."""
    first, second = read_model_config(one), read_model_config(other)
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, load_params(one, first), load_params(other, second))


def train_student(root: Path) -> Path:
    """Trains a run of two steps from two of the golden Llama's three layers, saving each step. Returns its directory.

    The teacher in root/teacher has a vocabulary padded by `PADDING` rows, which the softmax includes.
    """
    golden = root / "golden"
    shutil.copytree(HF_GOLDENS / "llama", golden)
    settings = json.loads((golden / "config.json").read_text())
    settings["rope_parameters"]["original_max_position_embeddings"] = 8192  # the only value that Megatron has
    (golden / "config.json").write_text(json.dumps(settings))
    vocabulary = settings["vocab_size"]
    padded = ["--arch", f"vocab_size={vocabulary - PADDING}", "--arch", f"padded_vocab_size={vocabulary}"]
    with contextlib.redirect_stdout(io.StringIO()):
        main(["from-hf", str(golden), str(root / "teacher"), *padded])
        config = toy.config(root, model__init_from=str(root / "teacher"), model__keep_layers=(2, 0))
        config = configs.replace(
            config,
            loss__include_vocab_padding=True,
            batch__global_size=2,
            train__steps=2,
            train__val_every=1,
            train__save_every=1,
            optim__warmup_steps=0,
        )
        run(config, root / "run", devices=jax.devices()[:1])
    return root / "run"
