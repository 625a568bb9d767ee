"""torch_dist checkpoints: the reader undoes the writer, and refuses metadata that do not describe the shards."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdjax.convert.checkpoint_files import list_files
from kdjax.convert.megatron import dcp_writer
from kdjax.convert.megatron.dcp_reader import read_tensors
from kdjax.convert.megatron.dcp_writer import Shard, namespace, write_checkpoint
from kdjax.convert.pytorch import pickle_writer, torch_file
from kdjax.convert.pytorch.pickle_reader import unpickle
from kdjax.convert.pytorch.pickle_writer import Construct, Instance
from kdjax.types import UserError

NAME = "embedding.word_embeddings.weight"
WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
STACK = np.arange(6, dtype=np.int32).reshape(3, 2)


def write(directory: Path) -> None:
    """Writes a tensor in three shards, a stack of layers, and an object."""
    directory.mkdir(exist_ok=True)
    cuts = [(0, 0, 3, 4), (0, 4, 3, 2), (3, 0, 1, 6)]
    shards = [Shard(NAME, WHOLE.shape, (y, x), WHOLE[y : y + h, x : x + w]) for y, x, h, w in cuts]
    stack = [Shard("decoder.layers.a", (3, 2), (layer, 0), STACK[layer : layer + 1]) for layer in range(3)]
    write_checkpoint(directory, [*shards, *stack], {"x._extra_state/shard_0_1": [None]}, {"args": namespace(a=1)})


def changed(directory: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Any], Any]) -> None:
    """Writes the checkpoint with `change` applied to the kind and state of each object of its .metadata."""
    kept = dcp_writer._metadata
    monkeypatch.setattr(dcp_writer, "_metadata", lambda kind, state: kept(kind, change(kind, state)))
    monkeypatch.setattr(dcp_writer, "Instance", lambda kind, state: Instance(kind, change(kind.name, state)))
    write(directory)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    found = read_tensors(list_files(tmp_path))
    assert list(found) == [NAME, *(f"decoder.layers.{layer}.a" for layer in range(3)), "x._extra_state/shard_0_1"]
    np.testing.assert_array_equal(found[NAME].read(), WHOLE)
    np.testing.assert_array_equal(found[NAME].rows(1, 3), WHOLE[1:3])
    assert (found[NAME].label, found[NAME].name) == (str(tmp_path / "__0_0.distcp"), NAME)
    for layer in range(3):
        np.testing.assert_array_equal(found[f"decoder.layers.{layer}.a"].read(), STACK[layer])
    assert found["x._extra_state/shard_0_1"].nbytes == 0
    common = torch_file.load(list_files(tmp_path)["common.pt"])
    assert common["args"].attributes == {"a": 1}


def test_the_shards_lie_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = unpickle((tmp_path / ".metadata").read_bytes(), "x").attributes
    places = [place.attributes for place in metadata["storage_data"].values()]
    assert {place["relative_path"] for place in places} == {"__0_0.distcp"}
    ends = [place["offset"] + place["length"] for place in places]
    assert [place["offset"] for place in places] == [0, *ends[:-1]]
    assert ends[-1] == (tmp_path / "__0_0.distcp").stat().st_size
    assert (tmp_path / "metadata.json").read_text().startswith('{"sharded_backend": "torch_dist"')


def on(kind: str, **changes: Any) -> Callable[[str, Any], Any]:
    """Returns a change of the attributes of all objects of a kind."""
    return lambda found, state: {**state, **changes} if found == kind and isinstance(state, dict) else state


class Empty(list):
    """A list that stays empty."""

    def append(self, value: Any) -> None:
        pass


def size(*numbers: int) -> Construct:
    return dcp_writer._size(numbers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            on("_StorageInfo", relative_path="__1_0.distcp"),
            rf"__1_0.distcp, which holds {NAME}, is missing beside .*meta",
        ),
        (on("_StorageInfo", transform_descriptors=["zstd"]), rf"{NAME} was compressed or encrypted when saved"),
        (on("_StorageInfo", length=10**6), r"__0_0.distcp has \d+ bytes and should hold an entry of 1000000 bytes at"),
        (on("_StorageInfo", offset=-10), r"should hold an entry of \d+ bytes at byte -10: .*damaged; copy it again"),
        (on("MetadataIndex", offset=size(9, 9)), rf"metadata: no file holds {NAME} at \(0, 0\)"),
        (on("TensorStorageMetadata", size=size(4, 7)), rf"{NAME}: its shards do not make up \(4, 7\)"),
        (on("TensorStorageMetadata", size=size(4, 6, 1)), r"metadata does not describe tensors \(ValueError"),
        (on("TensorStorageMetadata", chunks=Empty()), r"metadata does not describe tensors \(IndexError"),
        (on("TensorStorageMetadata", properties=None), r"metadata does not describe tensors \(AttributeError"),
        (on("ChunkStorageMetadata", sizes=None), r"metadata does not describe tensors \(TypeError"),
        (on("Metadata", storage_data={1: 2}), r"metadata does not describe tensors \(AttributeError"),
    ],
)
def test_metadata_that_do_not_describe_the_shards(
    change: Callable[[str, Any], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(tmp_path, monkeypatch, change)
    with pytest.raises(UserError, match=message):
        read_tensors(list_files(tmp_path))


def test_other_metadata(tmp_path: Path) -> None:
    for content, error in (({"a": 1}, "AttributeError"), (3, "AttributeError")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=rf"metadata does not describe tensors \({error}"):
            read_tensors(list_files(tmp_path))
    (tmp_path / ".metadata").write_bytes(pickle_writer.dumps(dcp_writer._metadata("Metadata", {})))
    with pytest.raises(UserError, match=r"metadata does not describe tensors \(KeyError: 'storage_data'"):
        read_tensors(list_files(tmp_path))


@pytest.mark.parametrize(
    ("array", "found"),
    [(np.zeros((3, 4), np.int32), r"int32 \(3, 4\)"), (np.zeros((4, 3), np.float32), r"float32 \(4, 3\)"), ({}, r"{}")],
)
def test_a_shard_that_is_not_what_metadata_say(
    array: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dtype and shape are compared when it is read."""
    save = torch_file.save
    monkeypatch.setattr(torch_file, "save", lambda file, content: save(file, array if file.tell() == 0 else content))
    write(tmp_path)
    tensor = read_tensors(list_files(tmp_path))[NAME]
    np.testing.assert_array_equal(tensor.rows(3, 4), WHOLE[3:])
    with pytest.raises(UserError, match=rf"says that {NAME} has a shard float32 \(3, 4\) here; found {found}$"):
        tensor.read()
