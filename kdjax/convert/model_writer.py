"""Writing a model directory a layer at a time: `model_config.json`, `params/` (Orbax) and `provenance.json`.

The leaves are zarr arrays in chunks of at most one layer, so that a stacked leaf is written as its layers come and a
restore reads only the chunks of its shards. Orbax lays out the checkpoint and its tree; the arrays are filled in here.
Everything goes to a sibling directory that gets OUT's name when it is complete. Nothing in it depends on the clock, so
two conversions of one input are byte-equal.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import tqdm
import zstandard

from kdjax.checkpoint.model_directory import MODEL_CONFIG, write_model_config
from kdjax.convert.rules import Plan
from kdjax.types import UserError

log = logging.getLogger("kdjax")

PROVENANCE = "provenance.json"
CHUNK_BYTES = 32 * 2**20  # of a zarr chunk at most: large enough to stream, small enough for a shard to skip the rest


def write_model(
    out: Path | str,
    plan: Plan,
    provenance: Mapping[str, Any],
    *,
    files: Mapping[str, Path | bytes] | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Writes what the plan describes as the model directory `out`, complete or not at all.

    `files`, copied or given as bytes, go along under their names in the mapping, such as "tokenizer/vocab.json".
    `provenance` goes into provenance.json, beside the version, the vocabulary and a digest of every leaf.
    Raises UserError when `out` exists (and is no model directory to be replaced by `force`) or the disk is full.
    """
    out = Path(out).absolute()
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(out, plan.nbytes)
    with appearing(out, force) as directory, disk_errors(out, plan.nbytes):
        params = directory / "params"
        _lay_out(params, plan.shapes)
        leaves = {
            path: _Leaf(params / path.replace("/", "."), path.startswith("layers/"), shape, plan.dtypes[path])
            for path, shape in plan.shapes.items()
        }
        progress = Progress(plan.nbytes, quiet)
        for piece in plan:
            leaves[piece.path].write(piece.layer, piece.array)
            progress.add(piece.array.nbytes)
            del piece  # before the next one is made
        progress.close()
        digests = {
            path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "sha256": leaf.digest.hexdigest()}
            for path, leaf in leaves.items()
        }
        for name, content in (files or {}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        write_model_config(directory, plan.config)
        told = dict(provenance) | common_provenance(plan) | {"leaves": digests}
        (directory / PROVENANCE).write_text(json.dumps(told, indent=2) + "\n")
    return out


def common_provenance(plan: Plan) -> dict[str, Any]:
    """What every conversion says of itself."""
    return {
        "kdjax_version": kdjax_version(),
        "vocab_size": plan.config.vocab_size,
        "padded_vocab_size": plan.config.padded_vocab_size,
        "skipped": dict(plan.skipped),
    }


def kdjax_version() -> str:
    """The installed version."""
    try:
        return metadata.version("kdjax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def refuse_existing(out: Path, force: bool, mark: str = MODEL_CONFIG) -> None:
    """Raises UserError when `out` may not be written. Commands call it before they read anything.

    `mark` is the file by which a directory that `force` may replace is known.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out} exists already; name another directory, or pass --force to replace it")
    if not (out / mark).is_file():
        raise UserError(f"--force replaces model directories only, and {out} holds no {mark}; move it away")


def refuse_full_disk(out: Path, nbytes: int) -> None:
    """Raises UserError when what is to be written, uncompressed, does not fit the disk."""
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise UserError(
            f"{out.parent} has {free / 1e6:,.1f} MB free and the model may take {nbytes / 1e6:,.1f} MB; "
            "make room or name a directory on another disk"
        )


@contextlib.contextmanager
def appearing(out: Path, force: bool) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the block ends well, and goes when it does not."""
    prefix = f".{out.name}.incomplete-"
    for other in out.parent.glob(f"{prefix}*"):
        log.warning("%s: of a conversion that was killed (delete it) or still runs", other)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        directory.chmod(0o777 & ~_umask())  # mkdtemp's are for the owner only
        yield directory
        if force and out.exists():
            aside = directory.with_name(directory.name + "-replaced")
            out.rename(aside)
            try:
                directory.rename(out)
            except BaseException:
                aside.rename(out)
                raise
            shutil.rmtree(aside)
        else:
            directory.rename(out)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def disk_errors(out: Path, nbytes: int) -> Iterator[None]:
    """Names a full disk; TensorStore reports it as a ValueError or RuntimeError that quotes the system's words."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        words = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
        code = getattr(error, "errno", None)
        if code in words or any(text in str(error) for text in words.values()):
            raise UserError(
                f"{out.parent} filled up before {out.name} was complete ({error}); nothing was left behind. "
                f"The model may take {nbytes / 1e6:,.1f} MB: make room or name a directory on another disk"
            ) from error
        raise


def _lay_out(params: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An Orbax checkpoint of one-element stand-ins for the leaves: its tree of names does not hold their shapes."""
    tree: dict[str, Any] = {}
    for path in shapes:
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = np.zeros(1, np.float32)
    with _without_ocdbt_warning(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(params, ocp.args.PyTreeSave(tree))
    written = params / "_CHECKPOINT_METADATA"
    if written.exists():  # its times would make two conversions of one input differ
        told = json.loads(written.read_text())
        written.write_text(json.dumps({key: 0 if key.endswith("_nsecs") else value for key, value in told.items()}))
    committed = params / "commit_success.txt"
    if committed.exists():  # it names the temporary directory
        committed.write_text("Checkpoint commit was successful\n")


@contextlib.contextmanager
def _without_ocdbt_warning() -> Iterator[None]:
    """Orbax warns of every checkpoint that is not OCDBT; this one is not, as OCDBT's file names are random."""
    told = logging.getLogger("absl")

    def wanted(record: logging.LogRecord) -> bool:
        return "OCDBT" not in record.getMessage()

    told.addFilter(wanted)
    try:
        yield
    finally:
        told.removeFilter(wanted)


class _Leaf:
    """A leaf's zarr array, written front to back, and the digest of its bytes.

    TensorStore lays it out; the chunks are compressed here, because each of its threads keeps the memory it once used.
    """

    def __init__(self, directory: Path, stacked: bool, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype, self.digest = shape, dtype, hashlib.sha256()
        self._directory, rest = directory, shape[1:] if stacked else shape
        self._rows = min(rest[0], max(1, CHUNK_BYTES // (math.prod(rest[1:]) * dtype.itemsize)))
        assert directory.is_dir(), f"Orbax laid out {sorted(p.name for p in directory.parent.iterdir())}"
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(directory)},
            "metadata": {
                "shape": shape,
                "chunks": [*([1] if stacked else []), self._rows, *rest[1:]],
                "dtype": ts.dtype(dtype).to_json() if dtype.kind == "V" else dtype.newbyteorder("<").str,
                "compressor": {"id": "zstd", "level": 1},  # as Orbax has it
                "fill_value": None,
                "order": "C",
            },
        }
        ts.open(spec, create=True, delete_existing=True).result()

    def write(self, layer: int | None, array: np.ndarray) -> None:
        """The next piece: the whole array, or one layer of it."""
        compressor = zstandard.ZstdCompressor(level=1)
        for number, first in enumerate(range(0, len(array), self._rows)):
            rows = np.ascontiguousarray(array[first : first + self._rows], self.dtype.newbyteorder("<"))
            self.digest.update(rows.reshape(-1).view(np.uint8).data)
            if len(rows) < self._rows:  # a chunk at the border is stored in full
                rows = np.concatenate([rows, np.zeros((self._rows - len(rows), *rows.shape[1:]), rows.dtype)])
            index = [*([] if layer is None else [layer]), number, *[0] * (array.ndim - 1)]
            chunk = self._directory / ".".join(map(str, index))
            chunk.write_bytes(compressor.compress(rows.reshape(-1).view(np.uint8).data))


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds."""

    EVERY_S = 10.0

    def __init__(self, nbytes: int, quiet: bool = False, done: str = "written"):
        self._quiet, self._nbytes, self._done, self._what = quiet, nbytes, 0, done
        self._began = self._said = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True, desc=done)

    def add(self, nbytes: int) -> None:
        """So many more bytes are done."""
        self._done += nbytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(nbytes)
        elif not self._quiet and now - self._said > self.EVERY_S:
            self._said, left = now, (now - self._began) / self._done * (self._nbytes - self._done)
            told = f"{self._done / 1e9:.2f} of {self._nbytes / 1e9:.2f} GB {self._what}, {left:.0f} s left"
            print(told, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
