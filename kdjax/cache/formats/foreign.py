"""What every format gives: open files of records, checked and surveyed as `kdjax train` does with its own."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

from kdjax.config import DataConfig
from kdjax.data.checks import Requirements
from kdjax.data.dataset import Dataset, survey_files
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.index import NO_INDEX, Index
from kdjax.data.files.paths import Source
from kdjax.data.manifest import Manifest, require_agreement
from kdjax.data.records import Record
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.data.store import Records
from kdjax.types import UserError

LONGEST = 2**20  # tokens of a record


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of files that do not say it themselves. None: not said."""

    vocab_size: int | None = None
    kind: str | None = None  # as data.kind
    teacher_temperature: float | None = None
    compression_config: Path | None = None  # DistillKit's
    tokens: Path | None = None  # Megatron's token ids
    scratch_dir: str | None = None


class ForeignFile(Records, Protocol):
    """A file of another program."""

    def label_log_probs(self, number: int) -> Float[np.ndarray, "S"] | None:
        """Returns the teacher's log-probability of each label, None if the file does not have it."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """Files of one format."""

    files: Sequence[Records]
    facts: Manifest  # what the files, and the user, say of the teacher; `kind` is always there
    label_files: Sequence[ForeignFile] | None = None  # the same files, if each record has its labels' log-probabilities
    manifests: Sequence[Manifest] = ()  # those beside the files, which must agree with the facts


class Format(Protocol):
    """A module of this package."""

    def detect(self, path: Path, options: Options) -> bool:
        """Returns whether the file looks like this format."""

    def open_sources(self, sources: Sequence[Source], options: Options) -> Opened:
        """Opens the files and lists their records. Raises UserError for files that are not of this format."""


class Foreign:
    """Checked records by number, from files of any format.

    Attributes:
        dataset: the records as training would read them.
        facts: what is known of the teacher; the vocabulary size always is.
    """

    def __init__(self, opened: Opened, name: str, max_bad_records: int = 0, scratch_dir: str | None = None):
        self.facts, self._label_files = opened.facts, opened.label_files
        if self.facts.vocab_size is None:
            raise UserError(
                f"{name}: does not tell how many tokens the teacher's vocabulary has, and there is no manifest.json "
                "beside it that does; give --vocab-size"
            )
        data = DataConfig(
            sequence_length=LONGEST,
            kind=self.facts.kind or "logits",
            teacher_temperature=self.facts.teacher_temperature or 1.0,
            max_bad_records=max_bad_records,
            weighted_mask=True,
            scratch_dir=scratch_dir,
        )
        for manifest in opened.manifests:
            require_agreement(
                manifest, data, vocab_size=self.facts.vocab_size, tokenizer_sha256=None, ignore_teacher_ids=False
            )
        requirements = Requirements(data, self.facts.vocab_size, need_log_sum_exp=False, ignore_teacher_ids=False)
        self.dataset: Dataset = survey_files(opened.files, requirements, opened.manifests, name)
        self._ends = list(itertools.accumulate(len(file.index) for file in opened.files))

    @property
    def vocab_size(self) -> int:
        """Of the teacher."""
        assert self.facts.vocab_size is not None
        return self.facts.vocab_size

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return self.dataset.lengths

    @property
    def fingerprint(self) -> str:
        """Hex digest of the files' contents and of what decides how they are read."""
        return self.dataset.fingerprint

    def record(self, i: int, lossless: bool) -> StoredRecord:
        """Returns record `i` as a cache stores it. Raises UserError for damage beyond what is allowed."""
        record = self.dataset[i]
        label_log_probs = None
        if self._label_files is not None:
            label_log_probs = np.full(len(record), -np.inf, np.float32)
            unmasked_S = record.loss_mask > 0
            if unmasked_S.any():  # a damaged record has nothing to read
                label_log_probs[unmasked_S] = self._label_log_probs(self._label_files, i)[unmasked_S]
        return to_stored(record, lossless, label_log_probs)

    @property
    def has_label_log_probs(self) -> bool:
        """Whether each record has the log-probabilities of its labels."""
        return self._label_files is not None

    def _label_log_probs(self, files: Sequence[ForeignFile], i: int) -> Float[np.ndarray, "S"]:
        place = next(place for place, end in enumerate(self._ends) if i < end)
        file = files[place]
        found = file.label_log_probs(i - (self._ends[place] - len(file.index)))
        assert found is not None
        return found


def to_stored(record: Record, lossless: bool, label_log_probs: np.ndarray | None = None) -> StoredRecord:
    """Returns a checked record as a cache stores it."""
    unmasked_Sx1 = (record.loss_mask > 0)[:, None]
    log_sum_S = record.log_sum_exp_logits
    if lossless:
        logits, log_sums = record.topk_logits, [] if log_sum_S is None else [log_sum_S]
    else:
        top_Sx1 = record.topk_logits.max(axis=1, keepdims=True).astype(np.float64)  # finite: every row has an entry
        own_S = np.log(np.exp(record.topk_logits - top_Sx1).sum(axis=1)) + top_Sx1[:, 0]
        # Rounding may leave the entries with more than the whole probability.
        whole_S = own_S if log_sum_S is None else np.maximum(log_sum_S, own_S)
        logits = np.where(unmasked_Sx1, record.topk_logits - whole_S[:, None], -np.inf).astype(np.float32)
        log_sums = [] if log_sum_S is None else [np.zeros(len(record), np.float32)]
    return StoredRecord(
        record.tokens,
        record.labels,
        record.loss_mask,
        record.topk_token_ids,
        logits,
        np.array(log_sums, np.float32).reshape(len(log_sums), len(record)),
        label_log_probs=label_log_probs,
        index=record.index,
    )


def scaled_to_one(log_probs: Float[np.ndarray, "S K"], most: float) -> Float[np.ndarray, "S K"]:
    """Returns log-probabilities, float32; positions that rounding left with 1 to `most` are scaled to 1."""
    with np.errstate(over="ignore"):
        mass_S = np.exp(log_probs.astype(np.float64)).sum(axis=1)
    excess_S = np.log(np.where((mass_S > 1) & (mass_S <= most), mass_S, 1))
    return (log_probs - excess_S[:, None]).astype(np.float32)


def make_index(lengths: Sequence[int] | np.ndarray, digest: str, lines: Sequence[int] | None = None) -> Index:
    """Returns the index of a file whose records have these lengths; -1 where one cannot be read."""
    count = len(lengths)
    return Index(
        offsets=np.zeros(count, np.int64),
        sizes=np.zeros(count, np.int64),
        lengths=np.asarray(lengths, np.int64),
        indices=np.full(count, NO_INDEX, np.int64),
        lines=np.arange(1, count + 1) if lines is None else np.asarray(lines, np.int64),
        digest=digest,
        is_cut=False,
    )


def digest_of(path: Path, *more: str) -> str:
    """Returns a digest of a file's content and of whatever else decides how it is read."""
    with explain_os_errors(path, "read this file"), path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    digest.update("\0".join(more).encode())
    return digest.hexdigest()


def refuse_kind(options: Options, program: str, kind: str) -> None:
    """Raises UserError if the user says that the values are of another kind than this program writes."""
    if options.kind not in (None, kind):
        raise UserError(f"--kind {options.kind}: {program} writes {kind}; leave --kind out")
