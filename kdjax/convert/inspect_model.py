"""What a checkpoint holds: architecture, tree, shapes, sizes, dtypes, provenance, and whether its digests are right.

PATH is a model directory, a run directory (its best step, else its last) or one step of it. Exit code 1 when a leaf is
not what provenance.json says.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.checkpoint import params_directory, read_model_config
from kdjax.checkpoint.arrays import Leaf, open_leaves
from kdjax.convert.architecture import KEYS
from kdjax.convert.model_writer import PROVENANCE, Progress
from kdjax.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("path", metavar="PATH", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("--no-digests", action="store_true", help="do not read the arrays, only what they are")


def run(arguments: argparse.Namespace) -> int:
    """Prints it all; 0 when every digest that is recorded is right."""
    path = arguments.path
    config, directory = read_model_config(path), params_directory(path)
    leaves, provenance = open_leaves(directory), _provenance(directory.parent)
    recorded = provenance.pop("leaves", {})
    print(f"{directory}\n\narchitecture")
    for key in KEYS:
        print(f"  {key:<20} {getattr(config, key)}")
    print("\nprovenance" if provenance else f"\nno {PROVENANCE}: not the work of a converter")
    for key, value in provenance.items():
        print(f"  {key:<20} {value}")
    print("\nparameters")
    verdicts = {} if arguments.no_digests or not recorded else judge(leaves, recorded)
    width = max(len(name) for name in leaves)
    for name, leaf in leaves.items():
        size = f"{leaf.nbytes / 1e6:,.2f} MB"
        print(f"  {name:<{width}}  {leaf.dtype!s:<8}  {leaf.shape!s:<20}  {size:>14}  {verdicts.get(name, '')}")
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    print(
        f"  {count:,} parameters in {len(leaves)} arrays, {sum(leaf.nbytes for leaf in leaves.values()) / 1e9:.3f} GB"
    )
    missing = sorted(recorded.keys() - leaves.keys())
    wrong = [name for name, verdict in verdicts.items() if verdict != RIGHT] + missing
    if wrong:
        print(f"not as {PROVENANCE} says: {', '.join(wrong)}; convert again")
    return 1 if wrong else 0


RIGHT = "digest right"


def judge(leaves: Mapping[str, Leaf], recorded: Mapping[str, Any]) -> dict[str, str]:
    """For each leaf whether its bytes, dtype and shape are those recorded."""
    verdicts = {}
    progress = Progress(sum(leaf.nbytes for leaf in leaves.values()), done="read")
    for name, leaf in leaves.items():
        verdicts[name] = _verdict(leaf, recorded.get(name))
        progress.add(leaf.nbytes)
    progress.close()
    return verdicts


def _verdict(leaf: Leaf, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "NOT RECORDED"
    if entry["dtype"] != str(leaf.dtype) or tuple(entry["shape"]) != leaf.shape:
        return f"RECORDED AS {entry['dtype']} {tuple(entry['shape'])}"
    try:
        return RIGHT if digest(leaf) == entry["sha256"] else "DIGEST WRONG"
    except UserError as error:
        return f"DAMAGED: {error}"


def digest(leaf: Leaf) -> str:
    """sha256 of the array's bytes in C order, read a layer (or a few thousand rows) at a time."""
    found = hashlib.sha256()
    step = 1 if leaf.name.startswith("layers/") else 4096
    for start in range(0, leaf.shape[0], step):
        piece = leaf.read((slice(start, min(start + step, leaf.shape[0])),))
        found.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _provenance(directory: Path) -> dict[str, Any]:
    path = directory / PROVENANCE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
