"""Prints a model's architecture, provenance and parameters, and checks the parameters against their digests.

PATH is a model directory, a run directory (its best step, else its last) or one step of it. Exit code 1 if a parameter
differs from what provenance.json says.
"""

import argparse
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.checkpoint import params_directory, read_model_config
from kdjax.checkpoint.arrays import StoredArray, open_arrays
from kdjax.cli import Progress
from kdjax.convert.architecture import KEYS
from kdjax.convert.provenance import PROVENANCE, read_provenance
from kdjax.types import UserError

HASHED_ROWS = 4096  # of a parameter outside the layers, in memory at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("--no-digests", action="store_true", help="do not read the arrays to check their digests")


def run(arguments: argparse.Namespace) -> int:
    """Prints the model; returns 0 if every recorded digest is correct."""
    path = arguments.path
    config, directory = read_model_config(path), params_directory(path)
    stored, provenance = open_arrays(directory), read_provenance(directory.parent)
    recorded = provenance.pop("leaves", {})
    print(f"{directory}\n\narchitecture")
    for key in KEYS:
        print(f"  {key:<20} {getattr(config, key)}")
    print("\nprovenance" if provenance else f"\nno {PROVENANCE}: not written by a converter")
    for key, value in provenance.items():
        print(f"  {key:<20} {value}")
    print("\nparameters")
    verdicts = {} if arguments.no_digests or not recorded else check_digests(stored, recorded)
    width = max(len(name) for name in stored)
    for name, array in stored.items():
        size = f"{array.nbytes / 1e6:,.2f} MB"
        print(f"  {name:<{width}}  {array.dtype!s:<8}  {array.shape!s:<20}  {size:>14}  {verdicts.get(name, '')}")
    count = sum(math.prod(array.shape) for array in stored.values())
    nbytes = sum(array.nbytes for array in stored.values())
    print(f"  {count:,} parameters in {len(stored)} arrays, {nbytes / 1e9:.3f} GB")
    missing = sorted(recorded.keys() - stored.keys())
    wrong = [name for name, verdict in verdicts.items() if verdict != CORRECT] + missing
    if wrong:
        print(f"differs from {PROVENANCE}: {', '.join(wrong)}; convert the model again")
    return 1 if wrong else 0


CORRECT = "digest correct"


def check_digests(stored: Mapping[str, StoredArray], recorded: Mapping[str, Any]) -> dict[str, str]:
    """Returns for each array whether its bytes, dtype and shape are the recorded ones: `CORRECT`, or what is wrong."""
    verdicts = {}
    with Progress("checking digests", sum(array.nbytes for array in stored.values()), "B", delay_s=2.0) as progress:
        for name, array in stored.items():
            verdicts[name] = _verdict(array, recorded.get(name))
            progress.add(array.nbytes)
    return verdicts


def _verdict(array: StoredArray, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "NOT RECORDED"
    if entry["dtype"] != str(array.dtype) or tuple(entry["shape"]) != array.shape:
        return f"RECORDED AS {entry['dtype']} {tuple(entry['shape'])}"
    try:
        return CORRECT if digest(array) == entry["sha256"] else "DIGEST WRONG"
    except UserError as error:
        return f"DAMAGED: {error}"


def digest(array: StoredArray) -> str:
    """Returns the sha256 of an array's bytes in C order, reading one layer or `HASHED_ROWS` rows at a time."""
    found = hashlib.sha256()
    step = 1 if array.name.startswith("layers/") else HASHED_ROWS
    for start in range(0, array.shape[0], step):
        rows = array.read((slice(start, min(start + step, array.shape[0])),))
        found.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return found.hexdigest()
