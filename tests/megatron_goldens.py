"""Checkpoints of two small GPTs written by megatron-core 0.16.1, with its own float32 logits, losses and gradients.

tests/fixtures/megatron/*.tar.xz hold one model each, saved in every layout; tests/fixtures/trajectory, training runs
that start from them. Weights are random and representable in bfloat16.
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

DATA = Path(__file__).parent / "fixtures" / "trajectory"
ARCHIVES = Path(__file__).parent / "fixtures" / "megatron"
VARIANTS = ("gpt2ish", "llamaish")
_KEPT: list[Any] = []  # temporary directories, removed when the process ends


def trajectory(variant: str) -> dict[str, Any]:
    """The recorded training runs of a variant."""
    return json.loads((DATA / variant / "trajectory.json").read_text())


def temporary() -> Path:
    """A directory that lasts as long as the process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="kdjax_megatron_"))
    return Path(_KEPT[-1].name)


@functools.cache
def unpacked(variant: str) -> Path:
    """The variant's checkpoints and golden files."""
    root = temporary()
    with tarfile.open(ARCHIVES / f"{variant}.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / variant


def golden(variant: str, name: str = "golden_tp1pp1") -> dict[str, np.ndarray]:
    """One of the variant's npz files."""
    with np.load(unpacked(variant) / f"{name}.npz") as stored:
        return dict(stored)


@functools.cache
def converted(variant: str, checkpoint: str = "torch_dist_tp1pp1", *arch: str) -> Path:
    """A model directory made of one of the variant's checkpoints."""
    out = temporary() / variant
    with contextlib.redirect_stdout(io.StringIO()):
        convert(unpacked(variant) / checkpoint, out, arch)
    return out


def architecture(variant: str) -> ModelConfig:
    """The variant's architecture, computing in float32."""
    return dataclasses.replace(read_model_config(converted(variant)), dtype="float32", remat="none")


def params(variant: str) -> dict[str, Any]:
    """The variant's weights in kdjax's canonical layout."""
    return load_params(converted(variant), architecture(variant))
