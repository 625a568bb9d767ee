"""Checkpoints of two small GPTs that megatron-core 0.16.1 wrote, with its own float32 logits, losses and gradients.

Each archive in tests/fixtures/megatron holds one model saved in every layout; tests/fixtures/trajectory holds training
runs that start from them. The weights are random and representable in bfloat16.
"""

import contextlib
import dataclasses
import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.checkpoint import load_params, read_model_config
from kdjax.config import ModelConfig
from kdjax.convert.from_megatron import convert
from kdjax.convert.megatron.checkpoint import open_checkpoint

DATA = Path(__file__).parent / "fixtures" / "trajectory"
ARCHIVES = Path(__file__).parent / "fixtures" / "megatron"
VARIANTS = ("gpt2ish", "llamaish")
_KEPT: list[Any] = []  # temporary directories


def trajectory(variant: str) -> dict[str, Any]:
    """Returns the recorded training runs of a variant."""
    return json.loads((DATA / variant / "trajectory.json").read_text())


def temporary() -> Path:
    """Returns a new directory that is removed when the process ends."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="kdjax_megatron_"))
    return Path(_KEPT[-1].name)


@functools.cache
def unpacked(variant: str) -> Path:
    """Returns the directory of a variant's checkpoints and golden files."""
    root = temporary()
    with tarfile.open(ARCHIVES / f"{variant}.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / variant


def golden(variant: str, name: str = "golden_tp1pp1") -> dict[str, np.ndarray]:
    """Returns the arrays of one of the variant's npz files."""
    with np.load(unpacked(variant) / f"{name}.npz") as stored:
        return dict(stored)


def args(variant: str) -> dict[str, Any]:
    """Returns those of Megatron's args that describe the variant's model."""
    return json.loads((unpacked(variant) / "config.json").read_text())


def tensors(variant: str) -> dict[str, np.ndarray]:
    """Returns the variant's arrays by Megatron's canonical names."""
    return dict(_tensors(variant))


@functools.cache
def _tensors(variant: str) -> dict[str, np.ndarray]:
    found = open_checkpoint(unpacked(variant) / "torch_dist_tp1pp1").read_tensors(architecture(variant))
    return {name: tensor.read() for name, tensor in found.items() if tensor.nbytes}


@functools.cache
def converted(variant: str, checkpoint: str = "torch_dist_tp1pp1", *arch: str) -> Path:
    """Returns the model directory converted from one of the variant's checkpoints."""
    out = temporary() / variant
    with contextlib.redirect_stdout(io.StringIO()):
        convert(unpacked(variant) / checkpoint, out, arch)
    return out


def architecture(variant: str) -> ModelConfig:
    """Returns the variant's architecture, computing in float32."""
    return dataclasses.replace(read_model_config(converted(variant)), dtype="float32", remat="none")


def params(variant: str) -> dict[str, Any]:
    """Returns the variant's parameters."""
    return load_params(converted(variant), architecture(variant))
