"""Reads any part of any array of an Orbax checkpoint straight from the disk.

Orbax restores whole trees. Selecting layers, converting one layer at a time and hashing what is stored need less, so
this module opens the same files (OCDBT or plain directories, zarr 2 or 3) with TensorStore.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint. `name` is its path in the tree, such as "layers/attn/q/kernel"."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    directory: Path
    store: tensorstore.TensorStore

    @property
    def nbytes(self) -> int:
        """Size in bytes, uncompressed."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = (), layers: Sequence[int] | None = None) -> np.ndarray:
        """Returns the part at `index`, in C order; with `layers`, of the array of these entries of the first axis.

        Raises UserError when the files are damaged.
        """
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        try:
            if layers is None:
                return self.store[index].read(order="C").result()
            picked: Any = (list(layers[index[0]]), *index[1:])
            return self.store.oindex[picked].read(order="C").result()
        except ValueError as error:  # TensorStore raises it for a missing or truncated file and for a wrong checksum
            raise UserError(f"{self.directory}: {self.name} cannot be read: {error}") from error


def open_arrays(directory: Path) -> dict[str, StoredArray]:
    """Opens every array of an Orbax directory; returns them by name. Raises UserError for any other directory."""
    directory = directory.absolute()
    try:
        layout = json.loads((directory / "_METADATA").read_text())
        names = ["/".join(key["key"] for key in entry["key_metadata"]) for entry in layout["tree_metadata"].values()]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is not a complete Orbax checkpoint: {error!r}") from error
    context = tensorstore.Context()
    arrays: dict[str, StoredArray] = {}
    for name in names:
        store = _open(directory, name, layout, context)
        arrays[name] = StoredArray(name, tuple(store.shape), np.dtype(store.dtype.numpy_dtype), directory, store)
    return arrays


def _open(
    directory: Path, name: str, layout: Mapping[str, Any], context: tensorstore.Context
) -> tensorstore.TensorStore:
    """Opens the array; `read` fetches its bytes."""
    entry = name.replace("/", ".")  # Orbax's name of the array in the directory
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{directory}/{entry}/"}
    if layout["use_ocdbt"]:
        kvstore = {"driver": "ocdbt", "base": f"file://{directory}/", "path": f"{entry}/"}
    spec = {"driver": "zarr3" if layout["use_zarr3"] else "zarr", "kvstore": kvstore}
    try:
        return tensorstore.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:
        raise UserError(f"{directory}: {name} cannot be opened: {error}") from error
