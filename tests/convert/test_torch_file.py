"""torch.save files: views are read to the last stride, and none may reach outside its storage."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch_writer as writer

from kdjax.convert.checkpoint_files import list_files
from kdjax.convert.pytorch import pickle_writer, torch_file
from kdjax.convert.pytorch.pickle_writer import Construct, Global, Persistent
from kdjax.types import UserError

View = tuple[Any, Any, Any]  # first item, shape and strides


def save_views(path: Path, storage: np.ndarray, views: dict[str, View]) -> None:
    """Writes a torch.save file of tensors that share a storage."""
    tensors = {name: torch_file.describe_tensor(storage, 0, *view) for name, view in views.items()}
    with path.open("wb") as file:
        torch_file.write_archive(file, pickle_writer.dumps(tensors), [storage])


def load(path: Path) -> Any:
    return torch_file.load(list_files(path.parent)[path.name])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8, np.int32])
def test_shared_and_strided_storages(dtype: Any, tmp_path: Path) -> None:
    storage = np.arange(60).astype(dtype)
    views = {
        "whole": (0, (5, 12), (12, 1)),
        "part": (12, (2, 3), (12, 4)),
        "last items": (43, (2, 3), (12, 2)),
        "transposed": (0, (12, 5), (1, 12)),
        "three axes": (1, (2, 3, 4), (24, 1, 5)),
        "scalar": (59, (), ()),
        "expanded": (3, (4, 2), (0, 1)),
        "one row": (24, (1, 12), (99, 1)),
        "empty": (0, (0, 4), (4, 1)),
    }
    save_views(tmp_path / "a.pt", storage, views)
    stored = load(tmp_path / "a.pt")
    for name, (first, shape, strides) in views.items():
        steps = [step * storage.itemsize for step in strides]
        expected = np.lib.stride_tricks.as_strided(storage[first:], shape, steps)
        found = stored[name]
        assert (found.shape, found.dtype, found.label) == (shape, storage.dtype, str(tmp_path / "a.pt"))
        np.testing.assert_array_equal(found.read(), expected, err_msg=name)
        assert found.read().flags.c_contiguous
        if len(shape) > 1 and shape[0] > 1:
            np.testing.assert_array_equal(found.layer(1).read(), expected[1])
            np.testing.assert_array_equal(found.slice(1, 2).read(), expected[1:2])


@pytest.mark.parametrize(
    "view",
    [
        (5, (2, 3), (3, 1)),
        (0, (11,), (1,)),
        (10, (), ()),
        (0, (2, 2), (9, 1)),
        (11, (0,), (1,)),
        (0, (4, 2), (3, 1)),  # its last item is the storage's eleventh
    ],
)
def test_a_view_beyond_its_storage(view: View, tmp_path: Path) -> None:
    save_views(tmp_path / "a.pt", np.zeros(10, np.float32), {"": view})
    with pytest.raises(
        UserError, match=rf"a.pt: .* at item {view[0]} of the storage data/0 reaches beyond its 40 bytes"
    ):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "view",
    [
        (0, (3, 10), (-(2**20), 1)),  # the rows before the storage: whatever this process has in memory there
        (9, (10,), (-1,)),
        (0, (10, 2), (1, -1)),
        (-1, (3,), (1,)),
        (0, (-1, 3), (3, 1)),
        (0, (3, 3), (1,)),
        (0, (3,), (3, 1)),
        (0, (3,), (1.0,)),
        (0, (2.0, 3), (3, 1)),
        (1.0, (3,), (1,)),
        (0, (True, 3), (3, 1)),
        (0, ("3",), (1,)),
    ],
)
def test_views_of_a_hostile_file(view: View, tmp_path: Path) -> None:
    """Bytes outside the storage, of the file or of this process, must not end up in a model."""
    save_views(tmp_path / "a.pt", np.arange(10, dtype=np.float32), {"": view})
    with pytest.raises(UserError, match=r"a.pt: a tensor of shape .*must be whole numbers from 0, one .*do not trust"):
        load(tmp_path / "a.pt")


def test_a_storage_that_says_it_is_larger_than_its_file(tmp_path: Path) -> None:
    """The size of a storage is the zip directory's, which may claim bytes behind the archive."""
    save_views(tmp_path / "a.pt", np.zeros(10, np.float32), {"": (0, (10,), (1,))})
    content = (tmp_path / "a.pt").read_bytes()
    entry = content.rindex(b"archive/data/0") - 46  # of the central directory, APPNOTE.TXT 4.3.12
    assert content[entry : entry + 4] == b"PK\x01\x02"
    sizes = (4000).to_bytes(4, "little") * 2  # compressed and uncompressed
    (tmp_path / "a.pt").write_bytes(content[: entry + 20] + sizes + content[entry + 28 :])
    with pytest.raises(UserError, match=r"a.pt has \d+ bytes and should hold an entry of 4000 bytes at byte \d+"):
        load(tmp_path / "a.pt")


def test_typed_views_of_byte_storages(tmp_path: Path) -> None:
    """_rebuild_tensor_v3 states the dtype itself, and its storage is untyped."""
    storage = np.arange(6, dtype=np.float32)
    reference = Persistent(("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 24))

    def view(first: int, shape: tuple[int, ...]) -> Construct:
        rebuild = Global("torch._utils", "_rebuild_tensor_v3")
        return Construct(rebuild, (reference, first, shape, (1,), False, None, Global("torch", "float32"), None))

    with (tmp_path / "a.pt").open("wb") as file:
        torch_file.write_archive(file, pickle_writer.dumps(view(2, (4,))), [storage])
    np.testing.assert_array_equal(load(tmp_path / "a.pt").read(), [2, 3, 4, 5])
    with (tmp_path / "b.pt").open("wb") as file:
        torch_file.write_archive(file, pickle_writer.dumps(view(2, (5,))), [storage])
    with pytest.raises(UserError, match=r"reaches beyond its 24 bytes"):
        load(tmp_path / "b.pt")


def test_a_missing_storage(tmp_path: Path) -> None:
    storage = np.zeros(10, np.float32)
    with (tmp_path / "a.pt").open("wb") as file:
        tensor = torch_file.describe_tensor(storage, 1, 0, (10,), (1,))
        torch_file.write_archive(file, pickle_writer.dumps(tensor), [storage])
    with pytest.raises(UserError, match=r"a.pt: the storage data/1 is missing; copy the file again"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_what_is_saved_is_loaded(dtype: Any, tmp_path: Path) -> None:
    """Tensors of any dtype and memory order, beside other content."""
    arrays = {"a": np.arange(12).reshape(3, 4).astype(dtype).T, "b": np.ones((), dtype), "c": np.zeros((0, 2), dtype)}
    writer.save(tmp_path / "a.pt", {"tensors": arrays, "number": 3})
    found = load(tmp_path / "a.pt")
    assert found["number"] == 3
    for name, array in arrays.items():
        assert (found["tensors"][name].shape, found["tensors"][name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found["tensors"][name].read(), array)


def test_an_archive_that_begins_inside_a_file(tmp_path: Path) -> None:
    """As the shards of a torch_dist file do: its offsets count from its own first byte, and its size is returned."""
    with (tmp_path / "a").open("wb") as file:
        file.write(b"something")
        size = torch_file.save(file, {"x": np.arange(7, dtype=np.float32)})
        file.write(b"else")
    content = (tmp_path / "a").read_bytes()[9:]
    assert content[size:] == b"else"
    with zipfile.ZipFile(io.BytesIO(content[:size])) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == np.arange(7, dtype="<f4").tobytes()
        assert min(info.header_offset for info in archive.infolist()) == 0
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    part = list_files(tmp_path)["a"].part(9, size)
    np.testing.assert_array_equal(torch_file.load(part)["x"].read(), np.arange(7))


def test_files_that_are_no_torch_save_files(tmp_path: Path) -> None:
    writer.save(tmp_path / "cut.pt", np.zeros(1000, np.float32))
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-10])
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, compression, order in (
        ("zipped.pt", zipfile.ZIP_DEFLATED, b"little"),
        ("big.pt", zipfile.ZIP_STORED, b"big"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(1, protocol=2))
            archive.writestr("archive/byteorder", order)
            archive.writestr("archive/data/0", bytes(100))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "")
    for name, message in {
        "cut.pt": rf"is not a complete torch.save file \(.*\); it has {len(whole) - 10} bytes and may be truncated",
        "old.pt": r": written by torch before 1.6, not as a zip archive; load and save it once with a newer torch",
        "empty.pt": r"is not a complete torch.save file \(.*\); it has 0 bytes",
        "zipped.pt": r"is not a complete torch.save file \(archive/data/0 is compressed\)",
        "big.pt": r": written on a big-endian machine",
        "other.pt": r"is not a complete torch.save file \('data.pkl'\)",
    }.items():
        with pytest.raises(UserError, match=name + r" ?" + message):
            load(tmp_path / name)
