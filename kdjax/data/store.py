"""Records by number: which ones a run uses, each read at its place, checked, and left out if damaged."""

import dataclasses
import logging
import os
import threading
import weakref
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kdjax.config import DataConfig
from kdjax.data.checks import Findings, Rules, check
from kdjax.data.errors import explained
from kdjax.data.files.decompress import unpack
from kdjax.data.files.index import NO_INDEX, Index, load_or_build
from kdjax.data.files.paths import Source
from kdjax.data.files.scratch import alone
from kdjax.data.records import Record, RecordError, decode
from kdjax.types import UserError

log = logging.getLogger(__name__)


class RecordFile:
    """A file of records, held open, and its index. Safe to read from several threads."""

    def __init__(self, source: Source, scratch: Path, allow_truncated: bool):
        with alone(scratch, source.path):
            plain = unpack(source.path, scratch, allow_truncated)
            self.index: Index = load_or_build(plain, scratch)
        self.source = source
        self.is_cut = plain.is_cut or self.index.is_cut  # and what there is of it may be used
        if self.index.is_cut:
            said = f"{source.path}: ends mid-record after {len(self.index)} complete records"
            if not allow_truncated:
                raise UserError(f"{said}; remove the cut one, or have it dropped with data.allow_truncated=True")
            log.warning("%s; the cut one is dropped", said)
        with explained(plain.path, "read this file of records"):
            self._descriptor = os.open(plain.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, number: int) -> bytes:
        """The line of record `number` (from 0)."""
        size, offset = int(self.index.sizes[number]), int(self.index.offsets[number])
        with explained(self.where(number), "read this record"):
            return os.pread(self._descriptor, size, offset)

    def where(self, number: int) -> str:
        """The file and the record, counted from 1, for people."""
        line = int(self.index.lines[number])
        return f"{self.source.path}, record {number + 1}" + ("" if line == number + 1 else f" (line {line})")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The records in use, in order, out of all files' (N of them), and what was passed over."""

    files: Int[np.ndarray, "N"]  # position in the list of files
    numbers: Int[np.ndarray, "N"]  # record within the file, from 0
    stored_lengths: Int[np.ndarray, "N"]  # tokens on disk; below 1 where the line is no record
    lengths: Int[np.ndarray, "N"]  # tokens used, 1 to data.sequence_length
    dropped: int  # longer than data.sequence_length
    truncated: int  # cut to data.sequence_length
    repeated: int  # shared their "index" with a later one of the same data path; left out with data.dedupe


def choose(files: list[RecordFile], data: DataConfig) -> Choice:
    """Apply `data.dedupe` and `data.over_long` to the indices of `files`.

    Raises UserError if a chunk does not hold `data.n_examples_per_chunk`, if a record is over-long and
    that is an error, and if nothing is left.
    """
    _require_counts(files, data.n_examples_per_chunk)
    file_N = np.repeat(np.arange(len(files)), [len(file.index) for file in files])
    number_N = np.concatenate([np.arange(len(file.index)) for file in files])
    stored_N = np.concatenate([file.index.lengths for file in files])
    kept_N = np.ones(len(file_N), bool)
    repeated_N = _superseded(files)
    if data.dedupe:
        kept_N &= ~repeated_N
    long_N = kept_N & (stored_N > data.sequence_length)
    if long_N.any() and data.over_long == "error":
        first = int(np.argmax(long_N))
        raise UserError(
            f"{files[file_N[first]].where(number_N[first])}: {stored_N[first]} tokens are more than "
            f"data.sequence_length = {data.sequence_length} (as in {long_N.sum()} of {len(long_N)} "
            f"records, the longest has {stored_N.max()}); raise it, or choose data.over_long=drop or "
            "data.over_long=truncate"
        )
    if data.over_long == "drop":
        kept_N &= ~long_N
    if not kept_N.any():
        raise UserError(
            f"{files[0].source.path}: no record is left: of {len(kept_N)} in {len(files)} file(s), "
            f"{long_N.sum()} are longer than data.sequence_length = {data.sequence_length}; raise it, or "
            "give other files"
        )
    stored_N = stored_N[kept_N]
    return Choice(
        file_N[kept_N],
        number_N[kept_N],
        stored_N,
        np.clip(stored_N, 1, data.sequence_length),
        dropped=int(long_N.sum()) if data.over_long == "drop" else 0,
        truncated=int(long_N.sum()) if data.over_long == "truncate" else 0,
        repeated=int(repeated_N.sum()),
    )


def _require_counts(files: list[RecordFile], n_examples_per_chunk: int | None) -> None:
    for file in files:
        if not len(file.index):
            raise UserError(f"{file.source.path}: holds no record; remove this file or write it again")
        if file.source.is_chunk and n_examples_per_chunk not in (None, len(file.index)):
            raise UserError(
                f"{file.source.path}: holds {len(file.index)} records, data.n_examples_per_chunk says "
                f"{n_examples_per_chunk}; the chunk is incomplete, or leave data.n_examples_per_chunk out "
                "to take what each chunk holds"
            )


def _superseded(files: list[RecordFile]) -> np.ndarray:
    """Of all records those whose "index" a later record of the same configured path has too."""
    index_N = np.concatenate([file.index.indices for file in files])
    entry_N = np.repeat([file.source.entry for file in files], [len(file.index) for file in files])
    order_N = np.lexsort((index_N, entry_N))  # stable: of equals the later comes later
    is_repeated = (np.diff(index_N[order_N]) == 0) & (np.diff(entry_N[order_N]) == 0)
    superseded_N = np.zeros(len(index_N), bool)
    superseded_N[order_N[:-1][is_repeated]] = True
    return superseded_N & (index_N != NO_INDEX)


class RecordStore:
    """The chosen records, checked as they are read. Damaged ones are left out, up to data.max_bad_records."""

    def __init__(self, files: list[RecordFile], choice: Choice, rules: Rules):
        self.files = files
        self.choice = choice
        self.rules = rules
        self._damaged: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.choice.files)

    @property
    def bad_records(self) -> int:
        """Records found damaged so far, and left out."""
        return len(self._damaged)

    def where(self, i: int) -> str:
        """File and record number of record `i`, for people."""
        return self.files[self.choice.files[i]].where(self.choice.numbers[i])

    def checked(self, i: int) -> tuple[Record, Findings] | None:
        """Record `i` as the loss may use it, or None if it is damaged. One read, safe from several threads.

        Raises UserError when more than data.max_bad_records are.
        """
        if i in self._damaged:
            return None
        try:
            return self._read(i)
        except RecordError as error:
            self._leave_out(i, error)
            return None

    def _read(self, i: int) -> tuple[Record, Findings]:
        where = self.where(i)
        record = decode(self.files[self.choice.files[i]].read(self.choice.numbers[i]), where)
        if len(record) != self.choice.stored_lengths[i]:
            raise RecordError(f"{where}: has changed since the file was indexed; start again")
        return check(record.first(int(self.choice.lengths[i])), self.rules, where)

    def _leave_out(self, i: int, error: RecordError) -> None:
        cap = self.rules.data.max_bad_records
        with self._lock:
            is_new = i not in self._damaged
            self._damaged[i] = str(error)
            count = len(self._damaged)
        if count > cap:
            said = f" (damaged records so far: {count}, data.max_bad_records = {cap})" if cap else ""
            raise UserError(f"{error}{said}") from error
        if is_new:
            log.warning("record left out (%d of at most %d): %s", count, cap, error)
