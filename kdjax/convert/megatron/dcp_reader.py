"""Reads `torch_dist` checkpoints (torch.distributed.checkpoint), whose `.metadata` locates each tensor's shards."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kdjax.convert.checkpoint_files import ByteRange, Files
from kdjax.convert.megatron.parameter_names import by_name, canonical_name, merge_gate_and_up
from kdjax.convert.megatron.rules import SKIPPED
from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_reader import numpy_dtype, unpickle
from kdjax.convert.tensors import LazyTensor, assemble, placeholder
from kdjax.types import UserError

STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)")

Offsets = tuple[int, ...]  # of a shard's first element in its tensor


def read_tensors(files: Files) -> dict[str, LazyTensor]:
    """Returns the tensors by canonical name, unread. Stacks of layers are split; entries without weights are empty.

    Raises UserError for a damaged `.metadata` and for shards that do not make up their tensor.
    """
    label = files[".metadata"].label
    metadata = unpickle(files[".metadata"].read(), label)
    try:
        return _read_tensors(files, label, metadata.attributes)
    except UserError:
        raise
    except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{label} does not describe tensors ({type(error).__name__}: {error})") from error


def _read_tensors(files: Files, label: str, metadata: Mapping[str, Any]) -> dict[str, LazyTensor]:
    shards = defaultdict[str, list[tuple[Offsets, Any]]](list)
    for index, storage in metadata["storage_data"].items():
        offsets = index.attributes.get("offset")
        shards[index.attributes["fqn"]].append((offsets or (), storage.attributes))
    found: list[tuple[str, LazyTensor]] = []
    for stored_name, entry in metadata["state_dict_metadata"].items():
        name = canonical_name(stored_name)
        if "chunks" not in entry.attributes or SKIPPED.fullmatch(name):  # bytes, or an optimizer's tensors
            found.append((name, placeholder(label, stored_name)))
            continue
        tensor = _read_tensor(files, label, stored_name, entry.attributes, dict(shards[stored_name]))
        if STACKED.match(name):
            layers = range(tensor.shape[0])
            found += [(STACKED.sub(f"decoder.layers.{layer}.", name), tensor.layer(layer)) for layer in layers]
        else:
            found.append((name, tensor))
    return merge_gate_and_up(by_name(found))


def _read_tensor(
    files: Files, label: str, name: str, entry: dict[str, Any], shards: dict[Offsets, dict[str, Any]]
) -> LazyTensor:
    dtype = numpy_dtype(str(entry["properties"].state[0]), label)
    found = []
    for chunk in (chunk.attributes for chunk in entry["chunks"]):
        offsets, shape = tuple(chunk["offsets"]), tuple(chunk["sizes"])
        if offsets not in shards:
            raise UserError(f"{label}: no file holds {name} at {offsets}")
        storage = shards[offsets]
        if storage.get("transform_descriptors"):
            raise UserError(f"{label}: {name} was compressed or encrypted when saved, which cannot be read")
        if storage["relative_path"] not in files:
            raise UserError(f"{storage['relative_path']}, which holds {name}, is missing beside {label}; copy it there")
        file = files[storage["relative_path"]]
        rows = _row_reader(file.part(storage["offset"], storage["length"]), name, shape, dtype)
        found.append((offsets, LazyTensor(shape, dtype, file.label, rows, name)))
    return assemble(tuple(entry["size"]), found)


def _row_reader(
    source: ByteRange, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[int, int], np.ndarray]:
    """Returns a function that reads rows of a shard, and opens the shard's torch.save file when first called."""

    @functools.cache
    def shard() -> LazyTensor:
        stored = torch_file.load(source)
        if not isinstance(stored, LazyTensor) or (stored.shape, stored.dtype) != (shape, dtype):
            found = f"{stored.dtype} {stored.shape}" if isinstance(stored, LazyTensor) else f"{stored!r:.80}"
            raise UserError(
                f"{source.label}: .metadata says that {name} has a shard {dtype} {shape} here; found {found}"
            )
        return stored

    return lambda start, stop: shard().rows(start, stop)
