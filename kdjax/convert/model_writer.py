"""Writes a model directory one layer at a time: `model_config.json`, `params/` (Orbax) and `provenance.json`.

Parameters are zarr arrays whose chunks hold at most one layer, so stacked parameters are written as their layers are
converted, and a restore reads only the chunks that a device needs. Orbax creates the checkpoint and its tree; the
arrays are filled in here. Nothing depends on the clock: two conversions of one checkpoint are byte-equal.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import zstandard

from kdjax.checkpoint.model_directory import MODEL_CONFIG, write_model_config
from kdjax.cli import Progress
from kdjax.convert.conversion import Conversion
from kdjax.convert.output_directory import output_directory, refuse_existing
from kdjax.convert.provenance import kdjax_version, write_provenance

CHUNK_BYTES = 32 * 2**20  # of a zarr chunk at most: large enough to stream, small enough for a shard to skip the rest


def write_model(
    out: Path | str,
    conversion: Conversion,
    provenance: Mapping[str, Any],
    *,
    files: Mapping[str, Path | bytes] | None = None,
    force: bool = False,
) -> Path:
    """Writes the model directory `out`, complete or not at all.

    Args:
        provenance: what to say of the source; the version, the vocabulary and each parameter's digest are added.
        files: further files to write, by path in `out` such as "tokenizer/vocab.json": files to copy, or contents.
        force: replace `out` if it is a model directory.

    Raises UserError when `out` exists and may not be replaced, or when the disk is full.
    """
    out = Path(out).absolute()
    refuse_existing(out, force, MODEL_CONFIG)
    with output_directory(out, conversion.nbytes, force) as directory:
        digests = _write_params(directory / "params", conversion)
        for name, content in (files or {}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        write_model_config(directory, conversion.config)
        added = {
            "kdjax_version": kdjax_version(),
            "vocab_size": conversion.config.vocab_size,
            "padded_vocab_size": conversion.config.padded_vocab_size,
            "skipped": dict(conversion.skipped),
            "leaves": digests,
        }
        write_provenance(directory, dict(provenance) | added)
    return out


def _write_params(params: Path, conversion: Conversion) -> dict[str, dict[str, Any]]:
    """Writes the parameters. Returns the dtype, shape and sha256 of each."""
    _create_orbax_checkpoint(params, conversion.shapes)
    writers = {
        name: _ArrayWriter(params / name.replace("/", "."), name.startswith("layers/"), shape, conversion.dtypes[name])
        for name, shape in conversion.shapes.items()
    }
    with Progress("writing", conversion.nbytes, "B", delay_s=2.0) as progress:
        for piece in conversion:
            writers[piece.parameter].write(piece.layer, piece.array)
            progress.add(piece.array.nbytes)
            del piece  # before the next one is made
    return {
        name: {"dtype": str(writer.dtype), "shape": list(writer.shape), "sha256": writer.digest.hexdigest()}
        for name, writer in writers.items()
    }


def _create_orbax_checkpoint(params: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Creates an Orbax checkpoint with a one-element array for each parameter; its metadata does not hold shapes."""
    tree: dict[str, Any] = {}
    for path in shapes:
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = np.zeros(1, np.float32)
    with _without_ocdbt_warning(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(params, ocp.args.PyTreeSave(tree))
    metadata = params / "_CHECKPOINT_METADATA"
    if metadata.exists():  # its timestamps would make two conversions of one checkpoint differ
        content = json.loads(metadata.read_text())
        content = {key: 0 if key.endswith("_nsecs") else value for key, value in content.items()}
        metadata.write_text(json.dumps(content))
    committed = params / "commit_success.txt"
    if committed.exists():  # it names the temporary directory
        committed.write_text("Checkpoint commit was successful\n")


@contextlib.contextmanager
def _without_ocdbt_warning() -> Iterator[None]:
    """Silences Orbax's warning that the checkpoint is not OCDBT, which would give files random names."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "OCDBT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _ArrayWriter:
    """Writes one parameter's zarr array from front to back and computes the digest of its bytes.

    TensorStore creates the array, but the chunks are compressed here: its threads never release the memory they used.
    """

    def __init__(self, directory: Path, stacked: bool, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype, self.digest = shape, dtype, hashlib.sha256()
        self._directory, rest = directory, shape[1:] if stacked else shape
        self._rows = min(rest[0], max(1, CHUNK_BYTES // (math.prod(rest[1:]) * dtype.itemsize)))
        assert directory.is_dir(), f"Orbax created {sorted(p.name for p in directory.parent.iterdir())}"
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(directory)},
            "metadata": {
                "shape": shape,
                "chunks": [*([1] if stacked else []), self._rows, *rest[1:]],
                "dtype": ts.dtype(dtype).to_json() if dtype.kind == "V" else dtype.newbyteorder("<").str,
                "compressor": {"id": "zstd", "level": 1},  # Orbax's own
                "fill_value": None,
                "order": "C",
            },
        }
        ts.open(spec, create=True, delete_existing=True).result()

    def write(self, layer: int | None, array: np.ndarray) -> None:
        """Writes the whole array, or its next layer."""
        compressor = zstandard.ZstdCompressor(level=1)
        for number, first in enumerate(range(0, len(array), self._rows)):
            rows = np.ascontiguousarray(array[first : first + self._rows], self.dtype.newbyteorder("<"))
            self.digest.update(rows.reshape(-1).view(np.uint8).data)
            if len(rows) < self._rows:  # zarr stores the last chunk in full
                rows = np.concatenate([rows, np.zeros((self._rows - len(rows), *rows.shape[1:]), rows.dtype)])
            index = [*([] if layer is None else [layer]), number, *[0] * (array.ndim - 1)]
            chunk = self._directory / ".".join(map(str, index))
            chunk.write_bytes(compressor.compress(rows.reshape(-1).view(np.uint8).data))
