"""Writes checkpoints for tests with the writers of `to-megatron`, whose output check_megatron.py has Megatron load."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.convert.megatron.dcp_writer import Shard, namespace, write_checkpoint
from kdjax.convert.pytorch import torch_file

__all__ = ["namespace", "save", "save_distributed"]


def save(path: Path, content: Any) -> None:
    """Writes what torch.save(content, path) would write, arrays as tensors."""
    with path.open("wb") as file:
        torch_file.save(file, content)


def save_distributed(directory: Path, tensors: dict[str, np.ndarray], common: dict[str, Any]) -> None:
    """Writes a torch_dist checkpoint with each tensor in up to two shards along its first axis."""
    directory.mkdir(parents=True)
    write_checkpoint(directory, _halves(tensors), {}, common)


def _halves(tensors: dict[str, np.ndarray]) -> Iterator[Shard]:
    for name, array in tensors.items():
        middle = array.shape[0] // 2
        for first, part in ((0, array[:middle]), (middle, array[middle:])):
            if len(part):
                yield Shard(name, array.shape, (first, *[0] * (array.ndim - 1)), part)
