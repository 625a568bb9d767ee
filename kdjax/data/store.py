"""Records by number: selects those that a run uses, and reads, decodes and checks each when it is asked for."""

import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from kdjax.config import DataConfig
from kdjax.data.checks import Findings, Requirements, check
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.decompress import decompress
from kdjax.data.files.index import NO_INDEX, Index, load_or_build
from kdjax.data.files.paths import Source
from kdjax.data.files.scratch import exclusive_lock
from kdjax.data.records import Record, RecordError, decode
from kdjax.types import UserError

log = logging.getLogger(__name__)


class Records(Protocol):
    """An open file, or cache, of records. Safe to read from several threads."""

    @property
    def source(self) -> Source:
        """Where it is, and how the configuration named it."""

    @property
    def index(self) -> Index:
        """Its records."""

    @property
    def is_cut(self) -> bool:
        """Whether it ends in the middle of a record, which is left out."""

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0), not yet checked. Raises RecordError if it cannot be decoded."""

    def where(self, number: int) -> str:
        """Returns the file and the record, counted from 1, for messages."""


class RecordFile:
    """An open record file and its index. Safe to read from several threads."""

    def __init__(self, source: Source, scratch: Path, allow_truncated: bool, with_entries: bool = True):
        self._with_entries = with_entries
        with exclusive_lock(scratch, source.path):
            plain = decompress(source.path, scratch, allow_truncated)
            self.index: Index = load_or_build(plain, scratch)
        self.source = source
        self.is_cut = plain.is_cut or self.index.is_cut  # only with `allow_truncated`
        if self.index.is_cut:
            problem = f"{source.path}: ends in the middle of a record, after {len(self.index)} complete ones"
            if not allow_truncated:
                raise UserError(f"{problem}; remove the incomplete line, or drop it with data.allow_truncated=True")
            log.warning("%s; dropping the incomplete one", problem)
        with explain_os_errors(plain.path, "read this record file"):
            self._descriptor = os.open(plain.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if its line cannot be decoded."""
        size, offset = int(self.index.sizes[number]), int(self.index.offsets[number])
        with explain_os_errors(self.where(number), "read this record"):
            line = os.pread(self._descriptor, size, offset)
        return decode(line, self.where(number), self._with_entries)

    def where(self, number: int) -> str:
        """Returns the file and the record, counted from 1, for messages."""
        line = int(self.index.lines[number])
        return f"{self.source.path}, record {number + 1}" + ("" if line == number + 1 else f" (line {line})")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The records that are used, in order, out of those in all files (N records), and how many are not."""

    files: Int[np.ndarray, "N"]  # position in the list of files
    numbers: Int[np.ndarray, "N"]  # number within the file, from 0
    stored_lengths: Int[np.ndarray, "N"]  # tokens in the file; below 1 where the line is not a usable record
    lengths: Int[np.ndarray, "N"]  # tokens used, 1 to data.sequence_length
    dropped: int  # records longer than data.sequence_length
    truncated: int  # records cut to data.sequence_length
    superseded: int  # records whose "index" a later record of the same data path has; skipped with data.dedupe


def select_records(files: Sequence[Records], data: DataConfig) -> Selection:
    """Applies `data.dedupe` and `data.over_long` to all records of `files`.

    Raises UserError if a file has no records, if a chunk does not have `data.n_examples_per_chunk`, if a record is too
    long and `data.over_long` is "error", and if no record is left.
    """
    _require_counts(files, data.n_examples_per_chunk)
    file_N = np.repeat(np.arange(len(files)), [len(file.index) for file in files])
    number_N = np.concatenate([np.arange(len(file.index)) for file in files])
    stored_N = np.concatenate([file.index.lengths for file in files])
    kept_N = np.ones(len(file_N), bool)
    superseded_N = _superseded(files)
    if data.dedupe:
        kept_N &= ~superseded_N
    long_N = kept_N & (stored_N > data.sequence_length)
    if long_N.any() and data.over_long == "error":
        first = int(np.argmax(long_N))
        raise UserError(
            f"{files[file_N[first]].where(number_N[first])}: {stored_N[first]} tokens are more than "
            f"data.sequence_length = {data.sequence_length} ({long_N.sum()} of {len(long_N)} records are too long, the "
            f"longest has {stored_N.max()} tokens); raise it, or set data.over_long=drop or data.over_long=truncate"
        )
    if data.over_long == "drop":
        kept_N &= ~long_N
    if not kept_N.any():
        raise UserError(
            f"{files[0].source.path}: no record is left: {long_N.sum()} of {len(kept_N)} in {len(files)} file(s) are "
            f"longer than data.sequence_length = {data.sequence_length}; raise it, or use other files"
        )
    stored_N = stored_N[kept_N]
    return Selection(
        file_N[kept_N],
        number_N[kept_N],
        stored_N,
        np.clip(stored_N, 1, data.sequence_length),
        dropped=int(long_N.sum()) if data.over_long == "drop" else 0,
        truncated=int(long_N.sum()) if data.over_long == "truncate" else 0,
        superseded=int(superseded_N.sum()),
    )


def _require_counts(files: Sequence[Records], n_examples_per_chunk: int | None) -> None:
    for file in files:
        if not len(file.index):
            raise UserError(f"{file.source.path}: holds no record; remove this file or generate it again")
        if file.source.is_chunk and n_examples_per_chunk not in (None, len(file.index)):
            raise UserError(
                f"{file.source.path}: holds {len(file.index)} records, but data.n_examples_per_chunk is "
                f"{n_examples_per_chunk}; complete the chunk, or leave data.n_examples_per_chunk unset to accept any "
                "number"
            )


def _superseded(files: Sequence[Records]) -> np.ndarray:
    """Returns which of all records have an "index" that a later record of the same configured path has too."""
    index_N = np.concatenate([file.index.indices for file in files])
    entry_N = np.repeat([file.source.entry for file in files], [len(file.index) for file in files])
    order_N = np.lexsort((index_N, entry_N))  # stable: equal ones stay in file order
    is_repeated = (np.diff(index_N[order_N]) == 0) & (np.diff(entry_N[order_N]) == 0)
    superseded_N = np.zeros(len(index_N), bool)
    superseded_N[order_N[:-1][is_repeated]] = True
    return superseded_N & (index_N != NO_INDEX)


class RecordStore:
    """The selected records, checked when read. Skips damaged ones, up to data.max_bad_records."""

    def __init__(self, files: Sequence[Records], selection: Selection, requirements: Requirements):
        self.files = files
        self.selection = selection
        self.requirements = requirements
        self._damaged: dict[int, str] = {}  # the error of each damaged record
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.selection.files)

    @property
    def bad_records(self) -> int:
        """Number of records found damaged so far, and skipped."""
        return len(self._damaged)

    def where(self, i: int) -> str:
        """Returns file and record number of record `i`, for messages."""
        return self.files[self.selection.files[i]].where(self.selection.numbers[i])

    def read(self, i: int) -> tuple[Record, Findings] | None:
        """Returns record `i` as the loss may use it, or None if it is damaged. Safe to call from several threads.

        Raises UserError if more than data.max_bad_records records are damaged.
        """
        message = self._damaged.get(i)
        if message is None:
            try:
                return self._read(i)
            except RecordError as error:
                message = str(error)
        self._skip(i, message)
        return None

    def _read(self, i: int) -> tuple[Record, Findings]:
        where = self.where(i)
        record = self.files[self.selection.files[i]].record(self.selection.numbers[i])
        if len(record) != self.selection.stored_lengths[i]:
            raise RecordError(f"{where}: has changed since the file was indexed; start the run again")
        return check(record.truncated(int(self.selection.lengths[i])), self.requirements, where)

    def _skip(self, i: int, message: str) -> None:
        """Counts a damaged record once, and raises whenever one is read while there are too many."""
        limit = self.requirements.data.max_bad_records
        with self._lock:
            is_new = i not in self._damaged
            self._damaged[i] = message
            count = len(self._damaged)
        if count > limit:
            counts = f" (damaged records so far: {count}, data.max_bad_records = {limit})" if limit else ""
            raise UserError(f"{message}{counts}")
        if is_new:
            log.warning("record skipped (%d of at most %d): %s", count, limit, message)
