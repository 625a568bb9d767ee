"""`torch_dist` checkpoints (torch.distributed.checkpoint): `.metadata` says where each shard of each tensor lies."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kdjax.convert.files import Files, Region
from kdjax.convert.megatron.names import by_name, canonical, join_split_maps
from kdjax.convert.megatron.rules import SKIPPED
from kdjax.convert.pytorch import file as torch_file
from kdjax.convert.pytorch.unpickle import dtype_of, unpickle
from kdjax.convert.tensors import StoredTensor, assembled, in_memory
from kdjax.types import UserError

STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)")


def read(files: Files) -> dict[str, StoredTensor]:
    """The tensors by canonical name, stacks of layers taken apart; what holds no weights is an empty tensor.

    Raises UserError for a damaged `.metadata` and for shards that do not make up their tensor.
    """
    label = files[".metadata"].label
    pickled = unpickle(files[".metadata"].read(), label)
    try:
        return _tensors(files, label, pickled.attributes)
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{label}: it does not describe tensors ({type(error).__name__}: {error})") from error


def _tensors(files: Files, label: str, pickled: Mapping[str, Any]) -> dict[str, StoredTensor]:
    shards = defaultdict[str, list[tuple[tuple[int, ...], Any]]](list)
    for index, info in pickled["storage_data"].items():
        offset = index.attributes.get("offset")
        shards[index.attributes["fqn"]].append((offset or (), info.attributes))
    found: list[tuple[str, StoredTensor]] = []
    for stored_name, entry in pickled["state_dict_metadata"].items():
        name = canonical(stored_name)
        if "chunks" not in entry.attributes or SKIPPED.fullmatch(name):  # bytes, or an optimizer's tensors
            found.append((name, in_memory(np.zeros(0, np.uint8), label, stored_name)))
            continue
        tensor = _tensor(files, label, stored_name, entry.attributes, dict(shards[stored_name]))
        if STACKED.match(name):
            layers = range(tensor.shape[0])
            found += [(STACKED.sub(f"decoder.layers.{layer}.", name), tensor.layer(layer)) for layer in layers]
        else:
            found.append((name, tensor))
    return join_split_maps(by_name(found))


def _tensor(
    files: Files,
    label: str,
    name: str,
    entry: dict[str, Any],
    shards: dict[tuple[int, ...], dict[str, Any]],
) -> StoredTensor:
    dtype_name = str(entry["properties"].state[0])
    pieces = []
    for chunk in (chunk.attributes for chunk in entry["chunks"]):
        offsets, sizes = tuple(chunk["offsets"]), tuple(chunk["sizes"])
        if offsets not in shards:
            raise UserError(f"{label}: no file holds {name} at {offsets}")
        place = shards[offsets]
        if place.get("transform_descriptors"):
            raise UserError(f"{label}: {name} was compressed or encrypted when saved, which cannot be read")
        if place["relative_path"] not in files:
            raise UserError(f"{place['relative_path']}, which holds {name}, is missing beside {label}; copy it there")
        file = files[place["relative_path"]]
        region = file.part(place["offset"], place["length"])
        rows = _reader(region, name, sizes)
        pieces.append((offsets, StoredTensor(sizes, dtype_of(dtype_name, label), file.label, rows, name)))
    return assembled(tuple(entry["size"]), pieces)


def _reader(region: Region, name: str, sizes: tuple[int, ...]) -> Callable[[int, int], np.ndarray]:
    """Opens the shard's torch.save file when it is first read."""

    @functools.cache
    def tensor() -> StoredTensor:
        stored = torch_file.load(region)
        if not isinstance(stored, StoredTensor) or stored.shape != sizes:
            raise UserError(f"{region.label}: .metadata says that {name} has a shard {sizes} here; found {stored!r}")
        return stored

    return lambda start, stop: tensor().rows(start, stop)
