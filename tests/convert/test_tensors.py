"""Tensors are read from where they lie, and shards are joined only if they fill their tensor exactly."""

from pathlib import Path

import numpy as np
import pytest

from kdjax.convert.tensors import (
    LazyTensor,
    assemble,
    concatenate,
    same_bits,
    span,
    tensor_in_file,
    tensor_in_memory,
    transform,
)
from kdjax.types import UserError

WHOLE = np.arange(7 * 6).reshape(7, 6)


def boxes(cuts: list[tuple[int, int, int, int]]) -> list[tuple[tuple[int, int], LazyTensor]]:
    """Returns the boxes of `WHOLE` with these corners, heights and widths."""
    return [
        ((y, x), tensor_in_memory(np.resize(WHOLE[y : y + h, x : x + w], (h, w)), "a.distcp", "some.weight"))
        for y, x, h, w in cuts
    ]


def test_a_tensor_is_read_from_its_offset(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(64)))
    tensor = tensor_in_file(tmp_path / "a.bin", 8, (2, 3), np.dtype(np.uint8), name="some.weight")
    np.testing.assert_array_equal(tensor.read(), [[8, 9, 10], [11, 12, 13]])
    np.testing.assert_array_equal(tensor.rows(1, 2), [[11, 12, 13]])
    assert (tensor.name, tensor.label, tensor.nbytes) == ("some.weight", str(tmp_path / "a.bin"), 6)
    wide = tensor_in_file(tmp_path / "a.bin", 4, (3,), np.dtype("<u2"), label="x.nemo:a.bin")
    np.testing.assert_array_equal(wide.slice(1, 3).read(), [0x0706, 0x0908])
    assert (wide.label, wide.nbytes) == ("x.nemo:a.bin", 6)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(4)))
    scalar = tensor_in_file(tmp_path / "a.bin", 3, (), np.dtype(np.uint8))
    assert (scalar.read().shape, int(scalar.read()), scalar.nbytes) == ((), 3, 1)
    assert tensor_in_file(tmp_path / "a.bin", 4, (2, 0), np.dtype(np.uint8)).read().shape == (2, 0)
    assert tensor_in_memory(np.float32(2)).read().shape == ()


def test_a_file_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    tensor = tensor_in_file(tmp_path / "a.bin", 20, (10, 3), np.dtype(np.float32))
    message = r"a.bin: .*shape \(10, 3\) extends to byte 140 of a.bin, which has 100 bytes: the file is truncated"
    with pytest.raises(UserError, match=message):
        tensor.read()
    with pytest.raises(UserError, match=r"extends to byte 104 of"):
        tensor.rows(5, 7)
    np.testing.assert_array_equal(tensor.slice(0, 6).read(), np.zeros((6, 3)))


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [((3, 2), (2, 1), 6), ((3, 2), (1, 9), 12), ((4,), (0,), 1), ((), (), 1), ((2, 0), (1, 1), 0)],
)
def test_span(shape: tuple[int, ...], strides: tuple[int, ...], expected: int) -> None:
    assert span(shape, strides) == expected


def test_a_layer_of_a_transformed_stack() -> None:
    doubled = transform(tensor_in_memory(WHOLE), (6, 7), lambda array: 2 * array.T)
    np.testing.assert_array_equal(doubled.read(), 2 * WHOLE.T)
    np.testing.assert_array_equal(doubled.slice(1, 3).slice(1, 2).read(), 2 * WHOLE.T[2:3])
    assert doubled.layer(4).shape == (7,)
    np.testing.assert_array_equal(doubled.layer(4).read(), 2 * WHOLE[:, 4])
    np.testing.assert_array_equal(doubled.layer(4).rows(2, 5), 2 * WHOLE[2:5, 4])


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 0, 7, 6)],
        [(0, 0, 3, 4), (0, 4, 3, 2), (3, 0, 4, 6)],
        [(3, 0, 4, 6), (0, 4, 3, 2), (0, 0, 3, 4)],  # in any order
        [(0, 0, 2, 4), (0, 4, 4, 2), (4, 2, 3, 4), (2, 0, 5, 2), (2, 2, 2, 2)],  # a pinwheel, no grid
        [(0, 0, 7, 6), (7, 0, 0, 6)],  # an empty shard
    ],
)
def test_shards_are_assembled_row_by_row(cuts: list[tuple[int, int, int, int]]) -> None:
    tensor = assemble(WHOLE.shape, boxes(cuts))
    np.testing.assert_array_equal(tensor.read(), WHOLE)
    np.testing.assert_array_equal(tensor.slice(2, 5).read(), WHOLE[2:5])
    np.testing.assert_array_equal(tensor.layer(3).read(), WHOLE[3])
    assert (tensor.shape, tensor.dtype, tensor.name) == (WHOLE.shape, WHOLE.dtype, "some.weight")


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 0, 3, 6)],  # a gap
        [(0, 0, 7, 6), (0, 0, 7, 6)],  # too much
        [(0, 0, 5, 6), (5, 0, 3, 6)],  # beyond the end
        [(0, 0, 7, 3), (0, 0, 7, 3)],  # the right volume, but one half twice and the other never
        [(0, 0, 7, 3), (0, 2, 7, 3)],  # the right volume, but they overlap
        [(0, 0, 4, 6), (3, 0, 3, 6)],
        [(-1, 0, 4, 6), (3, 0, 3, 6)],  # the right volume, but before the start
        [(0, 0, 7, 3), (0, 4, 7, 3)],  # the right volume, but one column beyond the end
    ],
)
def test_shards_that_leave_gaps_or_overlap(cuts: list[tuple[int, int, int, int]]) -> None:
    """Rows that no shard fills would come out as uninitialised memory."""
    with pytest.raises(UserError, match=r"some.weight: its shards do not make up \(7, 6\): .*a.distcp"):
        assemble((7, 6), boxes(cuts))


def test_shards_of_two_dtypes() -> None:
    halves = [((0, 0), tensor_in_memory(WHOLE[:3])), ((3, 0), tensor_in_memory(WHOLE[3:].astype(np.float32)))]
    with pytest.raises(
        UserError, match=r"a tensor: its shards do not make up .*int64 at \(0, 0\).*float32 at \(3, 0\)"
    ):
        assemble(WHOLE.shape, halves)


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenated_tensors(axis: int) -> None:
    parts = [tensor_in_memory(part) for part in np.split(WHOLE, [1, 4], axis)]
    tensor = concatenate(parts, axis)
    np.testing.assert_array_equal(tensor.read(), WHOLE)
    np.testing.assert_array_equal(tensor.rows(1, 3), WHOLE[1:3])


def test_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared in pieces, to the last row; a negative zero is another number than zero."""
    monkeypatch.setattr("kdjax.convert.tensors.COMPARED_ROWS", 3)
    array = np.zeros((7, 2), np.float32)
    read: list[tuple[int, int]] = []
    tensor = tensor_in_memory(array)
    counted = LazyTensor(array.shape, array.dtype, "", lambda a, b: read.append((a, b)) or array[a:b])
    assert same_bits(counted, tensor)
    assert read == [(0, 3), (3, 6), (6, 7)]
    for row in (0, 6):
        other = array.copy()
        other[row, 1] = -0.0
        assert not same_bits(tensor, tensor_in_memory(other))
    assert not same_bits(tensor, tensor_in_memory(array[:6]))
    assert not same_bits(tensor, tensor_in_memory(array.view(np.int32)))
