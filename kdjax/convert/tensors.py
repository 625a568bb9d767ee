"""Tensors that stay on disk until they are read: a shape, a dtype, a file and a function that reads rows of it.

Readers join the shards of a parallel run, take layers out of a stack and reorder rows by wrapping such tensors, so that
a conversion never holds more than one tensor in memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. `rows(start, stop)` reads [start:stop] of its first axis and nothing else."""

    shape: tuple[int, ...]
    dtype: np.dtype
    label: str  # the file, for error messages
    rows: Callable[[int, int], np.ndarray]
    name: str = ""  # the name it is stored under, for error messages: readers may know it by another

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Returns the whole tensor. Raises UserError when the file ends too early."""
        length = self.shape[0] if self.shape else 1
        return self.rows(0, length).reshape(self.shape)

    def slice(self, start: int, stop: int) -> "LazyTensor":
        """Returns [start:stop] of the first axis, still unread."""
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, rows=lambda a, b: self.rows(start + a, start + b))

    def layer(self, index: int) -> "LazyTensor":
        """Returns [index] of the first axis, still unread. Reading some of its rows reads the whole layer."""
        return transform(self.slice(index, index + 1), self.shape[1:], lambda array: array[0])


Tensors = Mapping[str, LazyTensor]  # by name


def tensor_in_file(
    path: Path,
    offset: int,
    shape: Sequence[int],
    dtype: np.dtype,
    strides: Sequence[int] | None = None,
    label: str = "",
    name: str = "",
) -> LazyTensor:
    """Returns the tensor at a byte offset of a file.

    Args:
        strides: one for each axis, counted in items and not negative; None: C order.
        label: what error messages call the file; default: its path.
    """
    shape, dtype, label = tuple(shape), np.dtype(dtype), label or str(path)
    axes = shape or (1,)  # a scalar is read as one row
    steps = tuple(strides or (math.prod(axes[axis + 1 :]) for axis in range(len(axes))))

    def rows(start: int, stop: int) -> np.ndarray:
        size = (stop - start, *axes[1:])
        first, count = offset + start * steps[0] * dtype.itemsize, span(size, steps)
        items = np.fromfile(path, dtype, count, offset=first)
        if items.size < count:
            raise UserError(
                f"{label}: a tensor of shape {shape} extends to byte {first + count * dtype.itemsize} of {path.name}, "
                f"which has {path.stat().st_size} bytes: the file is truncated; copy it again"
            )
        strided = np.lib.stride_tricks.as_strided(items, size, [step * dtype.itemsize for step in steps])
        return np.ascontiguousarray(strided)

    return LazyTensor(shape, dtype, label, rows, name)


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Returns the number of items from the first to the last one of an array."""
    return 0 if 0 in shape else 1 + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))


def tensor_in_memory(array: np.ndarray, label: str = "memory", name: str = "") -> LazyTensor:
    """Returns an array that was read already as a tensor."""
    return LazyTensor(array.shape, array.dtype, label, lambda a, b: np.atleast_1d(array)[a:b], name)


def placeholder(label: str, name: str) -> LazyTensor:
    """Returns an empty tensor, which stands for an entry that holds no weights."""
    return tensor_in_memory(np.zeros(0, np.uint8), label, name)


def transform(tensor: LazyTensor, shape: Sequence[int], change: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
    """Returns the tensor after `change`, which gets the whole array and returns one of `shape`."""
    shape = tuple(shape)

    def rows(start: int, stop: int) -> np.ndarray:
        return np.atleast_1d(change(tensor.read()).reshape(shape))[start:stop]

    return dataclasses.replace(tensor, shape=shape, rows=rows)


def assemble(shape: Sequence[int], shards: Sequence[tuple[Sequence[int], LazyTensor]]) -> LazyTensor:
    """Returns one tensor made of box-shaped shards, each given with the index of its first element.

    Raises UserError unless the shards have one dtype and fill `shape` without gaps or overlaps: a gap would come out
    as uninitialised memory.
    """
    shape, first = tuple(shape), shards[0][1]
    if len({shard.dtype for _, shard in shards}) > 1 or not _tiles(shape, shards):
        listed = ", ".join(
            f"{shard.shape} {shard.dtype} at {tuple(offsets)} ({shard.label})" for offsets, shard in shards
        )
        raise UserError(f"{first.name or 'a tensor'}: its shards do not make up {shape}: {listed}")

    def rows(start: int, stop: int) -> np.ndarray:
        if len(shards) == 1:
            return first.rows(start, stop)
        whole = np.empty((stop - start, *shape[1:]), first.dtype)
        for offsets, shard in shards:
            low, high = max(start, offsets[0]), min(stop, offsets[0] + shard.shape[0])
            if low < high:
                box = tuple(slice(o, o + n) for o, n in zip(offsets[1:], shard.shape[1:], strict=True))
                whole[(slice(low - start, high - start), *box)] = shard.rows(low - offsets[0], high - offsets[0])
        return whole

    return dataclasses.replace(first, shape=shape, rows=rows)


def _tiles(shape: tuple[int, ...], shards: Sequence[tuple[Sequence[int], LazyTensor]]) -> bool:
    """Returns whether the shards lie inside `shape`, have its volume and do not overlap."""
    starts = np.array([offsets for offsets, _ in shards]).reshape(len(shards), len(shape))
    stops = starts + np.array([shard.shape for _, shard in shards]).reshape(starts.shape)
    inside = (starts >= 0).all() and (stops <= np.array(shape, int)).all()
    volume = sum(math.prod(shard.shape) for _, shard in shards)
    if not inside or volume != math.prod(shape):
        return False
    overlaps = [
        ((starts < stop) & (start < stops)).all(axis=1).sum() for start, stop in zip(starts, stops, strict=True)
    ]
    return max(overlaps) <= 1  # a shard overlaps itself


def concatenate(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Returns the tensors joined along an axis."""
    shards, position = [], 0
    for tensor in tensors:
        shards.append(((0,) * axis + (position,) + (0,) * (len(tensor.shape) - axis - 1), tensor))
        position += tensor.shape[axis]
    shape = list(tensors[0].shape)
    shape[axis] = position
    return assemble(shape, shards)


COMPARED_ROWS = 4096  # at a time


def same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    """Returns whether two tensors are identical, holding at most `COMPARED_ROWS` rows of each in memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bounds = [(row, min(row + COMPARED_ROWS, a.shape[0])) for row in range(0, a.shape[0], COMPARED_ROWS)]
    return all(a.rows(*rows).tobytes() == b.rows(*rows).tobytes() for rows in bounds)
