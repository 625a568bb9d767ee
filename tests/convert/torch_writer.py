"""Writes what torch.save and torch.distributed.checkpoint write, without torch: checkpoints for tests."""

import dataclasses
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.uint8): "ByteStorage",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle imports."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a pickle makes by calling a name."""

    function: Global
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """An object of a class, with its attributes."""

    kind: Global
    state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor over part of a storage; offset and strides in items."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickler(pickle._Pickler):  # the Python one: its opcodes can be written one by one
    """Pickles names that need not exist here, and arrays as torch tensors over numbered storages."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def __init__(self, file: Any):
        super().__init__(file, protocol=2)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Storage):
            return None
        known = next((i for i, array in enumerate(self.storages) if array is thing.array), None)
        if known is None:
            known = len(self.storages)
            self.storages.append(thing.array)
        kind = Global("torch", STORAGES[thing.array.dtype])
        return ("storage", kind, str(known), "cpu", thing.array.size)

    def save_global_name(self, thing: Global) -> None:
        self.write(f"c{thing.module}\n{thing.name}\n".encode())

    def save_call(self, thing: Call) -> None:
        self.save(thing.function)
        self.save(thing.arguments)
        self.write(pickle.REDUCE)

    def save_record(self, thing: Record) -> None:
        self.save(thing.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(thing.state)
        self.write(pickle.BUILD)

    def save_array(self, array: np.ndarray) -> None:
        strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides[: array.ndim])
        self.save_view(View(array, 0, array.shape, strides))

    def save_view(self, view: View) -> None:
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        hooks = Call(Global("collections", "OrderedDict"), ())
        self.save(Call(rebuild, (Storage(view.storage), view.offset, view.shape, view.strides, False, hooks)))

    dispatch[Global] = save_global_name
    dispatch[Call] = save_call
    dispatch[Record] = save_record
    dispatch[np.ndarray] = save_array
    dispatch[View] = save_view


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    array: np.ndarray


def save(file: Path | io.BytesIO, thing: Any) -> None:
    """What torch.save(thing, file) writes, arrays as tensors."""
    pickled = io.BytesIO()
    pickler = Pickler(pickled)
    pickler.dump(thing)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(pickler.storages):
            archive.writestr(f"archive/data/{number}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")


def namespace(**attributes: Any) -> Record:
    """An argparse.Namespace."""
    return Record(Global("argparse", "Namespace"), attributes)


def save_distributed(directory: Path, tensors: dict[str, np.ndarray], common: dict[str, Any]) -> None:
    """A torch_dist checkpoint, each tensor in up to two shards along its leading axis."""
    directory.mkdir(parents=True)
    entries, places = {}, {}
    with (directory / "__0_0.distcp").open("wb") as out:
        for name, array in tensors.items():
            chunks, middle = [], array.shape[0] // 2
            for first, part in ((0, array[:middle]), (middle, array[middle:])):
                if not len(part):
                    continue
                offsets = (first, *[0] * (array.ndim - 1))
                shard = io.BytesIO()
                save(shard, np.ascontiguousarray(part))
                place = {"relative_path": "__0_0.distcp", "offset": out.tell(), "length": len(shard.getvalue())}
                out.write(shard.getvalue())
                chunks.append(_metadata("ChunkStorageMetadata", {"offsets": offsets, "sizes": part.shape}))
                index = _metadata("MetadataIndex", {"fqn": name, "offset": offsets, "index": None})
                places[index] = Record(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), place)
            dtype = Global("torch", str(array.dtype))
            properties = _metadata("TensorProperties", (dtype, None, False, None, False))
            state = {"properties": properties, "size": array.shape, "chunks": chunks}
            entries[name] = _metadata("TensorStorageMetadata", state)
    with (directory / ".metadata").open("wb") as out:
        Pickler(out).dump(_metadata("Metadata", {"state_dict_metadata": entries, "storage_data": places}))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    save(directory / "common.pt", common)


def _metadata(kind: str, state: Any) -> Record:
    return Record(Global("torch.distributed.checkpoint.metadata", kind), state)
