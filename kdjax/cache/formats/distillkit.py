"""DistillKit's parquet files of compressed log-probabilities, which open-instruct reads too.

Columns: input_ids [n], compressed_logprobs [n - 1][bytes] and bytepacked_indices [n - 1][bytes]; row t is about token
t + 1. Optional: labels [n] with -100 where nothing is learned, and attention_mask [n]. How the bytes are read stands in
compression_config.yaml beside the files; distillkit_codec.py implements it.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.cache.formats.distillkit_codec import CompressionConfig, decode_values, read_config, unpack
from kdjax.cache.formats.foreign import Opened, Options, digest_of, make_index, refuse_kind, scaled_to_one
from kdjax.data.checks import MASS_TOLERANCE
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.paths import Source
from kdjax.data.manifest import Manifest
from kdjax.data.records import Record, RecordError, prefix_errors
from kdjax.types import UserError

CONFIG = "compression_config.yaml"  # DistillKit's sample_logits_vllm.py writes it
MAGIC = b"PAR1"
REQUIRED = ("input_ids", "compressed_logprobs", "bytepacked_indices")
OPTIONAL = ("labels", "attention_mask")
OTHERS = {"packed_indices": "DistillKit's legacy compression", "token_ids": "DistillKit's uncompressed top-k"}
IGNORED = -100
BATCH = 8  # rows in memory
LARGEST_MASS = 2.0  # an approximated position that sums to more was not written with this config


def parquet() -> Any:
    """Returns pyarrow.parquet. Raises UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'kdjax[parquet]'") from error
    return pyarrow.parquet


def detect(path: Path, options: Options) -> bool:
    """Returns whether the file is a parquet file."""
    with explain_os_errors(path, "read this file"), path.open("rb") as file:
        return file.read(4) == MAGIC


def open_sources(sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files. Raises UserError for other columns, and if the compression config is not known."""
    refuse_kind(options, "DistillKit", "log_probs")
    path = options.compression_config or sources[0].path.parent / CONFIG
    if not path.exists():
        raise UserError(
            f"{sources[0].path}: there is no {CONFIG} beside it, which says how its values are compressed; give the "
            "logprob_compressor configuration that it was written with: --compression-config FILE"
        )
    config = read_config(path)
    facts = Manifest(
        path,
        kind="log_probs",
        teacher_temperature=options.teacher_temperature,
        vocab_size=options.vocab_size or config.d,
    )
    return Opened([_File(source, config) for source in sources], facts)


class _File:
    """An open parquet file. Rows are read in order where possible; a step back starts their row group again."""

    is_cut = False

    def __init__(self, source: Source, config: CompressionConfig):
        self.source, self._config = source, config
        pq = parquet()
        with _as_user_error(source.path):
            # Buffered, so that memory does not grow with the size of the row groups.
            self._file = pq.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False)
            names = self._file.schema_arrow.names
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            other = next((f"; it has {what}, which is not read" for name, what in OTHERS.items() if name in names), "")
            raise UserError(
                f"{source.path}: no column {', '.join(missing)} (it has {', '.join(names)}){other}; name files that "
                "DistillKit's sample_logits_vllm wrote"
            )
        self._columns = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
        groups = range(self._file.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups])
        lengths: list[int] = []
        with _as_user_error(source.path):
            for batch in self._file.iter_batches(1024, columns=["input_ids"]):
                lengths += (len(ids) - 1 if ids is not None else -1 for ids in batch.column(0).to_pylist())
        self.index = make_index(lengths, digest_of(source.path, repr(config)))
        self._lock = threading.Lock()
        self._rows: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._open, self._next = -1, 0  # the row group that `_rows` is of, and the number of the row it gives next
        self._last: tuple[int, dict[str, Any]] = -1, {}

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if it cannot be used."""
        with prefix_errors(self.where(number)):
            return _record(self._row(int(number)), self._config)

    def where(self, number: int) -> str:
        """Returns the file and the row, counted from 1, for messages."""
        return f"{self.source.path}, row {number + 1}"

    def label_log_probs(self, number: int) -> None:
        """Returns None: the file does not have them."""

    def _row(self, number: int) -> dict[str, Any]:
        with self._lock, _as_user_error(self.source.path):
            if self._last[0] == number:
                return self._last[1]
            group = int(np.searchsorted(self._ends, number, side="right"))
            if group != self._open or number < self._next:
                self._open, self._rows = group, self._group(group)
            for place, row in self._rows:
                self._next = place + 1
                if place == number:
                    self._last = place, row
                    return row
        raise RecordError("missing; copy the file again")

    def _group(self, group: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the rows of a row group, each with its number."""
        place = int(self._ends[group - 1]) if group else 0
        for batch in self._file.iter_batches(BATCH, row_groups=[group], columns=self._columns):
            for i in range(batch.num_rows):
                yield place, {name: batch.column(name)[i] for name in self._columns}
                place += 1


def _record(row: dict[str, Any], config: CompressionConfig) -> Record:
    tokens = _int32(_numbers(row["input_ids"], "input_ids"), "input_ids")
    length = len(tokens) - 1
    if length < 1:
        raise RecordError(f"input_ids has {len(tokens)} tokens; a record needs two: remove this row")
    data = [
        _octets(row[name], name, size, length)
        for name, size in (("compressed_logprobs", config.value_bytes), ("bytepacked_indices", config.id_bytes))
    ]
    values = decode_values(data[0], config)
    if config.exact_k < config.k:
        _require_mass(values)
    values = scaled_to_one(values, LARGEST_MASS if config.exact_k < config.k else 1 + MASS_TOLERANCE)
    learned_S, labels = np.ones(length, bool), tokens[1:]
    if "labels" in row:
        found = _numbers(row["labels"], "labels", len(tokens))[1:]
        learned_S &= found != IGNORED
        labels = np.where(learned_S, _int32(found, "labels"), labels)
    if "attention_mask" in row:
        learned_S &= _numbers(row["attention_mask"], "attention_mask", len(tokens))[1:] != 0
    ids = unpack(data[1], config.id_bits, config.k)
    return Record(tokens[:-1], labels, learned_S.astype(np.float32), values, ids.astype(np.int32))


def _require_mass(values: np.ndarray) -> None:
    """Raises RecordError for approximated log-probabilities that are too large to be a matter of the approximation."""
    mass_S = np.exp(np.minimum(values, 50).astype(np.float64)).sum(axis=1)
    over_S = mass_S > LARGEST_MASS
    if over_S.any():
        t = int(np.argmax(over_S))
        raise RecordError(
            f"compressed_logprobs[{t}] sums to {mass_S[t]:.4g} as a probability: it was not written with this "
            "compression config; give the right one with --compression-config"
        )


def _octets(cell: Any, name: str, size: int, length: int) -> np.ndarray:
    """Returns the bytes of `length` positions. A row about the token after the last may follow; it is left out."""
    rows = getattr(cell, "values", None)
    count = 0 if rows is None else len(rows)
    if rows is None or count not in (length, length + 1):
        raise RecordError(f"{name} has {count} rows, and input_ids {length + 1} tokens; it must have {length} rows")
    rows = rows.slice(0, length)
    sizes = np.unique(np.diff(rows.offsets.to_numpy()))
    if rows.null_count or sizes.tolist() != [size]:
        raise RecordError(
            f"{name} has {' or '.join(map(str, sizes))} bytes a position, and the compression config means {size}; "
            "give the configuration that it was written with: --compression-config"
        )
    flat = rows.flatten().to_numpy(zero_copy_only=False)
    if flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() > 255:
        raise RecordError(f"{name} holds values that are not bytes; copy the file again")
    return flat.astype(np.uint8).reshape(length, size)


def _numbers(cell: Any, name: str, count: int | None = None) -> np.ndarray:
    values = getattr(cell, "values", None)
    if values is None or values.null_count:
        raise RecordError(f"{name} is missing or holds nulls; remove this row")
    found = values.to_numpy(zero_copy_only=False)
    if found.dtype.kind not in "iub":
        raise RecordError(f"{name} holds {found.dtype}; it must hold integers")
    if count not in (None, len(found)):
        raise RecordError(f"{name} has {len(found)} positions, and input_ids {count}; write this row again")
    return found


def _int32(ids: np.ndarray, name: str) -> np.ndarray:
    outside = ids >= 2**31
    if ids.dtype.kind == "i":
        outside |= ids < -(2**31)
    if outside.any():
        raise RecordError(f"{name} holds the id {ids[outside][0]}; it must be a 32-bit integer")
    return ids.astype(np.int32)


class _as_user_error:
    """A context that turns pyarrow's errors, and those of the disk, into a UserError."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError):
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self._path}: cannot be read as a parquet file ({first}); it is damaged or was cut off: copy it again"
            ) from error
