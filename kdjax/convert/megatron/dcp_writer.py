"""Writes `torch_dist` checkpoints (torch.distributed.checkpoint), the counterpart of `dcp_reader`, without torch.

One file holds the shards one after the other, each a torch.save file of its own. `.metadata`, a pickle of
torch.distributed.checkpoint's own classes, says where each part of each tensor is.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_writer import Construct, Global, Instance, dumps

SHARDS = "__0_0.distcp"  # the name that rank 0's first writer uses
METADATA_MODULE = "torch.distributed.checkpoint.metadata"
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a tensor of shape `full_shape` whose first element is at `offsets`."""

    name: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    array: np.ndarray


def write_checkpoint(
    directory: Path, shards: Iterable[Shard], objects: Mapping[str, Any], common: Mapping[str, Any]
) -> None:
    """Writes a checkpoint into a directory, holding one shard in memory at a time.

    `objects` are other things that Megatron loads by name; `common` is the content of common.pt.
    """
    entries: dict[str, Instance] = {}
    stored: dict[Instance, Instance] = {}
    with (directory / SHARDS).open("wb") as file:

        def append(name: str, offsets: tuple[int, ...] | None, content: Any) -> None:
            storage: dict[str, Any] = {"relative_path": SHARDS, "offset": file.tell()}
            storage["length"] = torch_file.save(file, content)
            index = {"fqn": name, "offset": None if offsets is None else _size(offsets), "index": None}
            kind = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            stored[_metadata("MetadataIndex", index)] = Instance(kind, storage)

        for shard in shards:
            if shard.name not in entries:
                entries[shard.name] = _describe_tensor(shard)
            chunk = {"offsets": _size(shard.offsets), "sizes": _size(shard.array.shape)}
            entries[shard.name].state["chunks"].append(_metadata("ChunkStorageMetadata", chunk))
            append(shard.name, shard.offsets, shard.array)
            del shard  # before the next one is made
        for name, content in objects.items():
            entries[name] = _metadata("BytesStorageMetadata", {})
            append(name, None, content)
    metadata = {"state_dict_metadata": entries, "planner_data": None, "storage_data": stored, "storage_meta": None}
    (directory / ".metadata").write_bytes(dumps(_metadata("Metadata", metadata)))
    (directory / "metadata.json").write_text(json.dumps(BACKEND))
    with (directory / "common.pt").open("wb") as file:
        torch_file.save(file, dict(common))


def namespace(**attributes: Any) -> Instance:
    """Returns an argparse.Namespace, in which Megatron keeps its args."""
    return Instance(Global("argparse", "Namespace"), attributes)


def _describe_tensor(shard: Shard) -> Instance:
    """Returns the metadata of the shard's tensor, its list of chunks still empty."""
    properties = (
        Global("torch", str(shard.array.dtype)),
        Construct(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
        False,  # requires_grad
        Construct(Global(METADATA_MODULE, "_MEM_FORMAT_ENCODING"), (0,)),  # contiguous
        False,  # pin_memory
    )
    state = {"properties": _metadata("TensorProperties", properties), "size": _size(shard.full_shape), "chunks": []}
    return _metadata("TensorStorageMetadata", state)


def _metadata(kind: str, state: Any) -> Instance:
    return Instance(Global(METADATA_MODULE, kind), state)


def _size(sizes: tuple[int, ...]) -> Construct:
    return Construct(Global("torch", "Size"), (sizes,))
