"""Checkpoints for tests, by the writers that `to-megatron` uses; check_megatron.py has Megatron read theirs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.convert.megatron.dcp_writer import Shard, namespace, write
from kdjax.convert.pytorch import file as torch_file

__all__ = ["namespace", "save", "save_distributed"]


def save(path: Path, thing: Any) -> None:
    """What torch.save(thing, path) writes, arrays as tensors."""
    with path.open("wb") as file:
        torch_file.save(file, thing)


def save_distributed(directory: Path, tensors: dict[str, np.ndarray], common: dict[str, Any]) -> None:
    """A torch_dist checkpoint, each tensor in up to two shards along its leading axis."""
    directory.mkdir(parents=True)
    write(directory, _halves(tensors), {}, common)


def _halves(tensors: dict[str, np.ndarray]) -> Iterator[Shard]:
    for name, array in tensors.items():
        middle = array.shape[0] // 2
        for first, part in ((0, array[:middle]), (middle, array[middle:])):
            if len(part):
                yield Shard(name, array.shape, (first, *[0] * (array.ndim - 1)), part)
