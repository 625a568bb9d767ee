"""Tensors that stay on disk until they are read: a shape, a dtype, the file's name, and a way to read some rows.

Everything that a reader does to a tensor before a rule sees it (gluing the shards of a parallel run together, taking a
layer out of a stack, reordering) is done to such a handle, so that no more than one tensor is ever in memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `rows(a, b)` reads [a:b] of its leading axis and nothing else."""

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str  # the file, for messages
    rows: Callable[[int, int], np.ndarray]
    name: str = ""  # its key as stored, for messages, where a reader renamed it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole tensor. Raises UserError when the file ends too early."""
        leading = self.shape[0] if self.shape else 1
        return self.rows(0, leading).reshape(self.shape)

    def slice(self, start: int, stop: int) -> "StoredTensor":
        """[start:stop] of the leading axis, still unread."""
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, shape=shape, rows=lambda a, b: self.rows(start + a, start + b))

    def layer(self, index: int) -> "StoredTensor":
        """[index] of the leading axis, still unread; reading part of it reads that whole layer."""
        return transformed(self.slice(index, index + 1), self.shape[1:], lambda array: array[0])


Source = Mapping[str, StoredTensor]


def in_file(
    path: Path,
    offset: int,
    shape: Sequence[int],
    dtype: np.dtype,
    strides: Sequence[int] | None = None,
    where: str = "",
    name: str = "",
) -> StoredTensor:
    """A tensor at a byte offset of a file. `strides` are counted in items; None: C order. `where`: default the path."""
    shape, dtype, where = tuple(shape), np.dtype(dtype), where or str(path)
    row_items = math.prod(shape[1:])
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    def read(start: int, count: int) -> np.ndarray:
        items = np.fromfile(path, dtype, count, offset=offset + start * dtype.itemsize)
        if items.size < count:
            raise UserError(
                f"{where}: a tensor of shape {shape} reaches to byte {offset + (start + count) * dtype.itemsize} of "
                f"{path.name}, which has {path.stat().st_size}: the file was cut off; copy it again"
            )
        return items

    def rows(start: int, stop: int) -> np.ndarray:
        return read(start * row_items, (stop - start) * row_items).reshape(stop - start, *shape[1:])

    def strided_rows(start: int, stop: int) -> np.ndarray:
        steps = tuple(strides or ())
        size = (stop - start, *shape[1:])
        last = sum((length - 1) * step for length, step in zip(size, steps, strict=True))
        items = read(start * steps[0], last + 1)
        return np.lib.stride_tricks.as_strided(items, size, [step * dtype.itemsize for step in steps]).copy()

    plain = strides is None or not shape or math.prod(shape) == 0 or _same_layout(shape, strides, contiguous)
    return StoredTensor(shape, dtype, where, rows if plain else strided_rows, name)


def _same_layout(shape: Sequence[int], strides: Sequence[int], contiguous: Sequence[int]) -> bool:
    """Whether the strides mean C order; the stride of an axis of length 1 says nothing."""
    return all(length == 1 or a == b for length, a, b in zip(shape, strides, contiguous, strict=True))


def in_memory(array: np.ndarray, where: str = "memory", name: str = "") -> StoredTensor:
    """An array that was read already, such as a byte of bookkeeping or a test's weights."""
    return StoredTensor(array.shape, array.dtype, where, lambda a, b: np.atleast_1d(array)[a:b], name)


def transformed(tensor: StoredTensor, shape: Sequence[int], change: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
    """The tensor after `change`, which is given all of it and returns an array of `shape`."""
    shape = tuple(shape)

    def rows(start: int, stop: int) -> np.ndarray:
        return np.atleast_1d(change(tensor.read()).reshape(shape))[start:stop]

    return dataclasses.replace(tensor, shape=shape, rows=rows)


def assembled(shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], StoredTensor]]) -> StoredTensor:
    """One tensor out of boxes, each at the offset of its first corner. Raises UserError unless they tile it."""
    shape, first = tuple(shape), pieces[0][1]
    volume = sum(math.prod(piece.shape) for _, piece in pieces)
    outside = [
        piece
        for offsets, piece in pieces
        if any(start + size > whole for start, size, whole in zip(offsets, piece.shape, shape, strict=True))
    ]
    # Boxes that lie inside, are distinct and have the whole's volume could still overlap; Megatron's writers use grids.
    distinct = len({tuple(offsets) for offsets, _ in pieces}) == len(pieces)
    if volume != math.prod(shape) or outside or not distinct or len({piece.dtype for _, piece in pieces}) > 1:
        told = ", ".join(
            f"{piece.shape} {piece.dtype} at {tuple(offsets)} ({piece.where})" for offsets, piece in pieces
        )
        raise UserError(f"{first.name or 'a tensor'}: its shards do not make up {shape}: {told}")

    def rows(start: int, stop: int) -> np.ndarray:
        if len(pieces) == 1:
            return first.rows(start, stop)
        whole = np.empty((stop - start, *shape[1:]), first.dtype)
        for offsets, piece in pieces:
            low, high = max(start, offsets[0]), min(stop, offsets[0] + piece.shape[0])
            if low < high:
                box = tuple(slice(o, o + n) for o, n in zip(offsets[1:], piece.shape[1:], strict=True))
                whole[(slice(low - start, high - start), *box)] = piece.rows(low - offsets[0], high - offsets[0])
        return whole

    return dataclasses.replace(first, shape=shape, rows=rows)


def concatenated(tensors: Sequence[StoredTensor], axis: int) -> StoredTensor:
    """The tensors side by side along an axis."""
    pieces, at = [], 0
    for tensor in tensors:
        pieces.append(((0,) * axis + (at,) + (0,) * (len(tensor.shape) - axis - 1), tensor))
        at += tensor.shape[axis]
    shape = list(tensors[0].shape)
    shape[axis] = at
    return assembled(shape, pieces)


COMPARED_ROWS = 4096  # at a time


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are the same to the bit, few of their rows being in memory at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bounds = [(row, min(row + COMPARED_ROWS, a.shape[0])) for row in range(0, a.shape[0], COMPARED_ROWS)]
    return all(a.rows(*rows).tobytes() == b.rows(*rows).tobytes() for rows in bounds)
