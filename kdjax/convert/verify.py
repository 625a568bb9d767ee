"""Compares a model's logits with those that another program computed from the same weights. Exit code 1 if they differ.

FILE.npz holds `input_ids` [B, T], `logits` [B, T, V] and optionally `positions` [B, T]. To make it with transformers:

    logits = AutoModelForCausalLM.from_pretrained(IN, dtype=torch.float32)(torch.tensor(input_ids)).logits
    numpy.savez("logits.npz", input_ids=input_ids, logits=logits.detach().numpy())
"""

import argparse
import dataclasses
import functools
import zipfile
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kdjax.checkpoint import load_params, read_model_config
from kdjax.config import ModelConfig
from kdjax.model import Params, bind
from kdjax.types import UserError

# float32: sums in another order. bfloat16: eight bits of mantissa, and logits of a few units.
TOLERANCES = {"float32": 2e-5, "bfloat16": 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("--logits", metavar="FILE.npz", type=Path, required=True, help="input_ids and logits")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="float32", help="dtype of the computation")
    defaults = ", ".join(f"{tolerance:g} for {dtype}" for dtype, tolerance in TOLERANCES.items())
    parser.add_argument("--tolerance", type=float, help=f"largest absolute difference allowed; default: {defaults}")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two arrays of logits."""

    largest: float  # absolute; nan if either holds one
    mean: float  # absolute
    agreement: float  # fraction of positions whose largest logit is the same token's


def run(arguments: argparse.Namespace) -> int:
    """Computes the logits, compares and prints; returns 0 if all differences are within the tolerance."""
    tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    config = dataclasses.replace(read_model_config(arguments.model), dtype=arguments.dtype)
    found = compare(arguments.model, config, *_read(arguments.logits, config))
    within = found.largest <= tolerance  # false for nan
    print(
        f"{arguments.model}: largest difference {found.largest:.3g}, mean {found.mean:.3g}, "
        f"same top token at {found.agreement:.2%} of positions: "
        f"{'within' if within else 'NOT WITHIN'} {tolerance:g}"
    )
    return 0 if within else 1


def _read(path: Path, config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns input_ids, logits and positions. Raises UserError for a file that does not hold them."""
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--logits {path} cannot be read as an .npz file: {error}") from error
    if not {"input_ids", "logits"} <= arrays.keys():
        raise UserError(f"--logits {path} holds {', '.join(arrays) or 'nothing'}; it must hold input_ids and logits")
    input_ids, logits, positions = arrays["input_ids"], arrays["logits"], arrays.get("positions")
    columns = {config.vocab_size, config.vocab_rows}
    if input_ids.ndim != 2 or logits.shape[:-1] != input_ids.shape or logits.shape[-1] not in columns:
        wanted = " or ".join(str(count) for count in sorted(columns))
        raise UserError(
            f"--logits {path}: input_ids {input_ids.shape} and logits {logits.shape}; they must be [B, T] and "
            f"[B, T, V] with V = {wanted}"
        )
    if positions is not None and positions.shape != input_ids.shape:
        raise UserError(f"--logits {path}: positions {positions.shape} must have input_ids' shape, {input_ids.shape}")
    return input_ids, logits, positions


def compare(
    model: Path, config: ModelConfig, input_ids: np.ndarray, logits: np.ndarray, positions: np.ndarray | None
) -> Difference:
    """Compares the model's logits with given ones, padded columns included if those have them, one row at a time."""
    config = dataclasses.replace(config, vocab_size=logits.shape[-1])
    params = load_params(model, config)
    largest, total, agreed = 0.0, 0.0, 0
    for row in range(len(input_ids)):
        one = slice(row, row + 1)
        own = np.asarray(_forward(config, params, input_ids[one], None if positions is None else positions[one]))
        difference = np.abs(own - logits[one].astype(np.float32))
        largest = max(largest, float(difference.max())) if np.isfinite(difference).all() else float("nan")
        total += float(difference.sum())
        agreed += int((own.argmax(-1) == logits[one].argmax(-1)).sum())
    return Difference(largest, total / logits.size, agreed / input_ids.size)


@functools.partial(jax.jit, static_argnames="config")
def _forward(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None
) -> Float[Array, "B T V"]:
    return bind(config, params)(tokens, positions)
