"""The unpickler refuses what could run, and torch.save files are read to the last stride."""

import argparse
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch_writer as writer

from kdjax.convert.checkpoint_files import ByteRange, list_files
from kdjax.convert.pytorch import pickle_writer, torch_file
from kdjax.convert.pytorch.pickle_reader import INERT_PACKAGES, Inert, unpickle
from kdjax.convert.tensors import assemble, concatenate, tensor_in_file, tensor_in_memory
from kdjax.types import UserError


class Asks:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("asks", "name"),
    [
        (Asks(os.system, "touch was_run"), f"{os.system.__module__}.system"),
        (Asks(eval, "1"), "builtins.eval"),
        (Asks(getattr, "", "join"), "builtins.getattr"),
        (Asks(io.open, "was_run", "w"), "(_io|io).open"),
        (Asks(pickle.loads, b""), "_?pickle.loads"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_names_that_could_run_something(
    asks: Asks, name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"some.pt: its pickle uses {name}, which is not on the list"):
        unpickle(pickle.dumps({"args": asks}, protocol=protocol), "some.pt")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("module", ["torch.hub", "torch", "torch.distributed.checkpoint", "subprocess", "megatronx"])
def test_modules_that_are_not_listed(module: str) -> None:
    with pytest.raises(UserError, match=rf"uses {re.escape(module)}.load"):
        unpickle(f"c{module}\nload\n.".encode(), "some.pt")


@pytest.mark.parametrize("package", INERT_PACKAGES)
def test_bookkeeping_is_kept_as_it_was_written(package: str) -> None:
    """A call, then attributes: neither is done to anything but a record."""
    stream = f"c{package}.anything\nsystem\n(S'touch was_run'\ntR}}S'a'\nI1\nsb.".encode()
    found = unpickle(stream, "some.pt")
    assert isinstance(found, Inert)
    assert (found.arguments, found.attributes) == (("touch was_run",), {"a": 1})


def test_a_damaged_pickle() -> None:
    with pytest.raises(UserError, match=r"some.pt: its pickle cannot be read \("):
        unpickle(pickle.dumps([1, 2, 3])[:-4], "some.pt")


def test_the_files_own_names_cannot_be_changed() -> None:
    """BUILD on a class that is handed out would change it for everybody."""
    before = dict(vars(Inert))
    stream = b"cargparse\nNamespace\n(N}S'__init__'\nI1\nstb."  # setattr(argparse.Namespace, "__init__", 1)
    with pytest.raises(UserError, match="cannot be read"):
        unpickle(stream, "some.pt")
    assert dict(vars(Inert)) == before


def save_views(path: Path, storage: np.ndarray, views: dict[str, Any]) -> None:
    """A torch.save file of tensors that share a storage: first item, shape and strides of each."""
    tensors = {name: torch_file.describe_tensor(storage, 0, *view) for name, view in views.items()}
    with path.open("wb") as file:
        torch_file.write_archive(file, pickle_writer.dumps(tensors), [storage])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8, np.int32])
def test_shared_and_strided_storages(dtype: Any, tmp_path: Path) -> None:
    storage = np.arange(60).astype(dtype)
    views = {
        "whole": (0, (5, 12), (12, 1)),
        "part": (12, (2, 3), (12, 4)),
        "transposed": (0, (12, 5), (1, 12)),
        "scalar": (7, (), ()),
        "one row": (24, (1, 12), (99, 1)),
        "empty": (0, (0, 4), (4, 1)),
    }
    save_views(tmp_path / "a.pt", storage, views)
    stored = torch_file.load(list_files(tmp_path)["a.pt"])
    for name, (first, shape, strides) in views.items():
        steps = [step * storage.itemsize for step in strides]
        expected = np.lib.stride_tricks.as_strided(storage[first:], shape, steps)
        found = stored[name]
        assert (found.shape, found.dtype, found.label) == (shape, storage.dtype, str(tmp_path / "a.pt"))
        np.testing.assert_array_equal(found.read(), expected, err_msg=name)
        if len(shape) == 2 and shape[0] > 1:
            np.testing.assert_array_equal(found.layer(1).read(), expected[1])
            np.testing.assert_array_equal(found.slice(1, 2).read(), expected[1:2])


def test_a_view_beyond_its_storage(tmp_path: Path) -> None:
    storage = np.zeros(10, np.float32)
    save_views(tmp_path / "a.pt", storage, {"": (5, (2, 3), (3, 1))})
    with pytest.raises(
        UserError,
        match=r"a.pt: .* shape \(2, 3\) with strides \(3, 1\) at item 5 .* beyond its 40 bytes",
    ):
        torch_file.load(list_files(tmp_path)["a.pt"])


@pytest.mark.parametrize(
    "thing",
    [
        None,
        [True, False, 0, 1, -1, 255, 2**31 - 1, -(2**31), 2**31, -(2**63), 2**64 + 1, -(2**200)],
        {"a": 1.5, "\u00e9\n": (), 3: [], (1, "2"): {}},
        ((1,), (1, 2), (1, (2, [3, {"4": 5e-324}])), ["x" * 300]),
    ],
)
def test_what_is_written_is_a_pickle(thing: Any) -> None:
    found = pickle.loads(pickle_writer.dumps(thing))
    assert (found, repr(found)) == (thing, repr(thing))


def test_pickles_of_names() -> None:
    """Python's own unpickler imports them, calls them and sets attributes; what is no pickle's is refused."""
    fraction = pickle_writer.Construct(pickle_writer.Global("fractions", "Fraction"), (3, 4))
    namespace = pickle_writer.Instance(pickle_writer.Global("argparse", "Namespace"), {"share": fraction})
    assert pickle.loads(pickle_writer.dumps([namespace, fraction])) == [
        argparse.Namespace(share=Fraction(3, 4)),
        Fraction(3, 4),
    ]
    with pytest.raises(TypeError, match=r"Fraction .* cannot be pickled"):
        pickle_writer.dumps([Fraction(1, 2)])
    assert pickle.loads(pickle_writer.dumps([Fraction(1, 2)], str)) == ["1/2"]


def test_a_zip_that_begins_inside_a_file(tmp_path: Path) -> None:
    """As the shards of a torch_dist file do: its offsets count from its own first byte, and its size is told."""
    with (tmp_path / "a").open("wb") as file:
        file.write(b"something")
        size = torch_file.save(file, {"x": np.arange(7, dtype=np.float32)})
        file.write(b"else")
    content = (tmp_path / "a").read_bytes()[9:]
    assert content[size:] == b"else"
    with zipfile.ZipFile(io.BytesIO(content[:size])) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data/0") == np.arange(7, dtype="<f4").tobytes()
        assert {info.header_offset for info in archive.infolist()} >= {0}
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_files_that_are_no_torch_save_files(tmp_path: Path) -> None:
    writer.save(tmp_path / "cut.pt", np.zeros(1000, np.float32))
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-10])
    (tmp_path / "old.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    (tmp_path / "empty.pt").write_bytes(b"")
    files = list_files(tmp_path)
    with pytest.raises(UserError, match=rf"cut.pt is not a complete .* has {len(whole) - 10} bytes and may be trunc"):
        torch_file.load(files["cut.pt"])
    with pytest.raises(UserError, match=r"old.pt: written by torch before 1.6"):
        torch_file.load(files["old.pt"])
    with pytest.raises(UserError, match=r"empty.pt is not a complete"):
        torch_file.load(files["empty.pt"])


def test_a_file_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    tensor = tensor_in_file(tmp_path / "a.bin", 20, (10, 3), np.dtype(np.float32))
    with pytest.raises(UserError, match=r"a.bin: .* extends to byte 140 of a.bin, which has 100 bytes: .*truncated"):
        tensor.read()
    np.testing.assert_array_equal(tensor.slice(0, 6).read(), np.zeros((6, 3)))


def test_a_region_beyond_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    region = ByteRange(tmp_path / "a.bin", 0, 100, "a.bin")
    assert region.part(60, 40).read() == bytes(40)
    with pytest.raises(UserError, match=r"a.bin has 100 bytes and should hold an entry of 41 bytes at byte 60"):
        region.part(60, 41)


def test_boxes_are_put_together_row_by_row() -> None:
    whole = np.arange(7 * 6).reshape(7, 6)
    cuts = [(0, 0, 3, 4), (0, 4, 3, 2), (3, 0, 4, 6)]
    pieces = [((y, x), tensor_in_memory(whole[y : y + h, x : x + w])) for y, x, h, w in cuts]
    tensor = assemble(whole.shape, pieces)
    np.testing.assert_array_equal(tensor.read(), whole)
    np.testing.assert_array_equal(tensor.slice(2, 5).read(), whole[2:5])
    np.testing.assert_array_equal(tensor.layer(3).read(), whole[3])
    halves = [tensor_in_memory(whole[:, :4]), tensor_in_memory(whole[:, 4:])]
    np.testing.assert_array_equal(concatenate(halves, axis=1).rows(1, 3), whole[1:3])


@pytest.mark.parametrize("cuts", [[(0, 0, 3, 6)], [(0, 0, 7, 6), (0, 0, 7, 6)], [(0, 0, 5, 6), (5, 0, 3, 6)]])
def test_boxes_that_do_not_make_up_the_whole(cuts: list[tuple[int, int, int, int]]) -> None:
    pieces = [((y, x), tensor_in_memory(np.zeros((h, w)), "a.distcp", "some.weight")) for y, x, h, w in cuts]
    with pytest.raises(UserError, match=r"some.weight: its shards do not make up \(7, 6\): .*a.distcp"):
        assemble((7, 6), pieces)
