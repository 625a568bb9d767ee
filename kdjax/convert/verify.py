"""Holds a model against logits that another program computed with the same weights. Exit code 1 when they differ.

FILE.npz holds `input_ids` [B, T], `logits` [B, T, V] and optionally `positions` [B, T]. Made with transformers:

    logits = AutoModelForCausalLM.from_pretrained(IN, dtype=torch.float32)(torch.tensor(input_ids)).logits
    numpy.savez("logits.npz", input_ids=input_ids, logits=logits.detach().numpy())
"""

import argparse
import dataclasses
import zipfile
from pathlib import Path

import jax
import numpy as np

from kdjax.checkpoint import load_params, read_model_config
from kdjax.config import ModelConfig
from kdjax.model import bind
from kdjax.types import UserError

# Of float32: sums in another order; of bfloat16: eight bits of mantissa and logits of a few units.
TOLERANCES = {"float32": 2e-5, "bfloat16": 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("model", metavar="OUT", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("--logits", metavar="FILE.npz", type=Path, required=True, help="input_ids and logits")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="float32", help="of the computation")
    told = ", ".join(f"{tolerance:g} for {dtype}" for dtype, tolerance in TOLERANCES.items())
    parser.add_argument("--tolerance", type=float, help=f"largest absolute difference allowed; default: {told}")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two arrays of logits are apart."""

    largest: float  # nan where either holds one
    mean: float
    agreement: float  # share of positions with the same first choice


def run(arguments: argparse.Namespace) -> int:
    """Computes, compares, prints; 0 when everything lies within the tolerance."""
    tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    config = dataclasses.replace(read_model_config(arguments.model), dtype=arguments.dtype)
    found = compare(arguments.model, config, *_read(arguments.logits, config))
    within = found.largest <= tolerance  # false for nan
    print(
        f"{arguments.model}: largest difference {found.largest:.3g}, mean {found.mean:.3g}, "
        f"same first choice at {found.agreement:.2%} of positions: "
        f"{'within' if within else 'NOT WITHIN'} {tolerance:g}"
    )
    return 0 if within else 1


def _read(path: Path, config: ModelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """input_ids, logits and positions. Raises UserError for a file that does not hold them."""
    try:
        with np.load(path) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--logits {path}: not an .npz file that can be read: {error}") from error
    if not {"input_ids", "logits"} <= arrays.keys():
        raise UserError(f"--logits {path} holds {', '.join(arrays) or 'nothing'}; it must hold input_ids and logits")
    input_ids, logits, positions = arrays["input_ids"], arrays["logits"], arrays.get("positions")
    columns = {config.vocab_size, config.vocab_rows}
    if input_ids.ndim != 2 or logits.shape[:-1] != input_ids.shape or logits.shape[-1] not in columns:
        wanted = " or ".join(str(count) for count in sorted(columns))
        raise UserError(
            f"--logits {path}: input_ids {input_ids.shape} and logits {logits.shape}; they must be [B, T] and "
            f"[B, T, V], V being {wanted}"
        )
    if positions is not None and positions.shape != input_ids.shape:
        raise UserError(f"--logits {path}: positions {positions.shape}; they must be as input_ids, {input_ids.shape}")
    return input_ids, logits, positions


def compare(
    model: Path, config: ModelConfig, input_ids: np.ndarray, logits: np.ndarray, positions: np.ndarray | None
) -> Difference:
    """The model's own logits against these, padded columns included where the file has them; a row at a time."""
    config = dataclasses.replace(config, vocab_size=logits.shape[-1])
    params = load_params(model, config)
    forward = jax.jit(lambda params, tokens, positions: bind(config, params)(tokens, positions))
    largest, total, agreed = 0.0, 0.0, 0
    for row in range(len(input_ids)):
        one = slice(row, row + 1)
        mine = np.asarray(forward(params, input_ids[one], None if positions is None else positions[one]))
        apart = np.abs(mine - logits[one].astype(np.float32))
        largest = max(largest, float(apart.max())) if np.isfinite(apart).all() else float("nan")
        total += float(apart.sum())
        agreed += int((mine.argmax(-1) == logits[one].argmax(-1)).sum())
    return Difference(largest, total / logits.size, agreed / input_ids.size)
