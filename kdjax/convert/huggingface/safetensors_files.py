"""Reads and writes the safetensors files of a Hugging Face checkpoint, single or sharded, one tensor at a time.

The format is a length, a JSON header and the tensors' bytes. The safetensors package checks each file, but it reads and
writes files as a whole, so the bytes are read and written here.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kdjax.convert.huggingface.companion_files import read_json
from kdjax.convert.tensors import LazyTensor, Tensors, tensor_in_file
from kdjax.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # transformers' default max_shard_size for years
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


def read_tensors(directory: Path) -> Tensors:
    """Returns every tensor in a directory's safetensors files by name, unread.

    Raises UserError when there are no such files, when one is damaged, and when the index and the shards disagree.
    """
    if (directory / INDEX).exists():
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{directory / INDEX}: it has no weight_map")
        shards = sorted(set(index.values()))
    elif (directory / SINGLE).exists():
        index, shards = {}, [SINGLE]
    else:
        raise UserError(_nothing_to_read(directory))
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        for name, tensor in _read_file(directory / shard):
            if index and index.get(name) != shard:
                place = index.get(name, "no file")
                raise UserError(
                    f"{directory / shard} holds {name}, but {INDEX} says that {place} does; copy both again"
                )
            tensors[name] = tensor
    for name in index:
        if name not in tensors:
            raise UserError(f"{directory / index[name]} does not hold {name}, as {INDEX} says; copy it again")
    return tensors


def _nothing_to_read(directory: Path) -> str:
    if not directory.is_dir():
        hint = "; download it first: hf download NAME --local-dir DIR" if directory.parts[1:] else ""
        return f"{directory}: there is no such directory{hint}"
    others = sorted(path.name for path in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.gguf"))
    hint = f" (only {', '.join(others[:3])})" if others else ""
    remedy = "; load it with transformers and save_pretrained it" if others and others[0].endswith(".bin") else ""
    return f"{directory} holds neither {SINGLE} nor {INDEX}{hint}{remedy}"


def _read_file(path: Path) -> Iterator[tuple[str, LazyTensor]]:
    try:
        with safe_open(path, framework="numpy"):
            pass  # checks that the header is sound and that the file holds every byte it describes
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is stored as {entry['dtype']}; kdjax reads {', '.join(DTYPES)}")
        offset = 8 + size + entry["data_offsets"][0]
        tensor = tensor_in_file(path, offset, entry["shape"], DTYPES[entry["dtype"]])
        yield name, dataclasses.replace(tensor, name=name)


class SafetensorsWriter:
    """Writes announced tensors, in order, to safetensors files of at most `shard_bytes` (but one tensor at least)."""

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        shard_bytes: int = SHARD_BYTES,
    ):
        self._directory, self._tensors = directory, tensors
        self._shards: list[list[str]] = [[]]
        filled = 0
        for name in tensors:
            size = self._nbytes(name)
            if self._shards[-1] and filled + size > shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(name)
            filled += size

    def write(self, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
        """Writes all tensors, which must come in the order in which they were announced."""
        for number, names in enumerate(self._shards, 1):
            with (self._directory / self._file(number)).open("wb") as file:
                file.write(self._header(names))
                for announced in names:
                    name, array = next(arrays)
                    wanted = (announced, *self._tensors[announced])
                    assert (name, array.shape, array.dtype) == wanted, (name, array.shape, array.dtype, wanted)
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        assert next(arrays, None) is None, "more tensors than were announced"
        if len(self._shards) > 1:
            weight_map = {name: self._file(number) for number, names in enumerate(self._shards, 1) for name in names}
            total = sum(self._nbytes(name) for name in self._tensors)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"

    def _nbytes(self, name: str) -> int:
        shape, dtype = self._tensors[name]
        return math.prod(shape) * dtype.itemsize

    def _header(self, names: Sequence[str]) -> bytes:
        kinds = {dtype: kind for kind, dtype in DTYPES.items()}
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        offset = 0
        for name in names:
            shape, dtype = self._tensors[name]
            end = offset + self._nbytes(name)
            entries[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
        return len(text).to_bytes(8, "little") + text
