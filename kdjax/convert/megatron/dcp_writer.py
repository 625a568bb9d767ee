"""Writing `torch_dist` checkpoints: the counterpart of `kdjax.convert.megatron.dcp_reader`, also without torch.

One file takes the shards one after the other, each a torch.save file of its own; `.metadata`, a pickle of
torch.distributed.checkpoint's records, says which part of which tensor lies where.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.convert.pytorch import file as torch_file
from kdjax.convert.pytorch.pickle_writer import Call, Global, Record, dumps

SHARDS = "__0_0.distcp"  # of rank 0's first writer
METADATA = "torch.distributed.checkpoint.metadata"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a tensor of shape `whole` that begins at `offsets`."""

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    array: np.ndarray


def write(directory: Path, shards: Iterable[Shard], objects: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Writes a checkpoint into a directory, one shard in memory at a time.

    `objects` are what else is loaded by name, each in torch.save's form; `common` is the content of common.pt.
    """
    entries: dict[str, Record] = {}
    places: dict[Record, Record] = {}
    with (directory / SHARDS).open("wb") as file:

        def put(name: str, offsets: tuple[int, ...] | None, thing: Any) -> None:
            place: dict[str, Any] = {"relative_path": SHARDS, "offset": file.tell()}
            place["length"] = torch_file.save(file, thing)
            index = {"fqn": name, "offset": None if offsets is None else _size(offsets), "index": None}
            storage = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            places[_record("MetadataIndex", index)] = Record(storage, place)

        for shard in shards:
            if shard.name not in entries:
                entries[shard.name] = _tensor(shard)
            chunk = {"offsets": _size(shard.offsets), "sizes": _size(shard.array.shape)}
            entries[shard.name].state["chunks"].append(_record("ChunkStorageMetadata", chunk))
            put(shard.name, shard.offsets, shard.array)
            del shard  # before the next one is made
        for name, thing in objects.items():
            entries[name] = _record("BytesStorageMetadata", {})
            put(name, None, thing)
    described = {"state_dict_metadata": entries, "planner_data": None, "storage_data": places, "storage_meta": None}
    (directory / ".metadata").write_bytes(dumps(_record("Metadata", described)))
    (directory / "metadata.json").write_text(json.dumps(BACKEND))
    with (directory / "common.pt").open("wb") as file:
        torch_file.save(file, dict(common))


def namespace(**attributes: Any) -> Record:
    """An argparse.Namespace, as Megatron keeps its args."""
    return Record(Global("argparse", "Namespace"), attributes)


def _tensor(shard: Shard) -> Record:
    """A tensor's description, its list of chunks still empty."""
    properties = (
        Global("torch", str(shard.array.dtype)),
        Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
        False,  # requires_grad
        Call(Global(METADATA, "_MEM_FORMAT_ENCODING"), (0,)),  # contiguous
        False,  # pin_memory
    )
    state = {"properties": _record("TensorProperties", properties), "size": _size(shard.whole), "chunks": []}
    return _record("TensorStorageMetadata", state)


def _record(kind: str, state: Any) -> Record:
    return Record(Global(METADATA, kind), state)


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (sizes,))
