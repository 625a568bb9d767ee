"""A set of records, opened and surveyed before any step, then read record by record."""

import dataclasses
import hashlib
import json
import logging

import numpy as np

from kdjax.config import DataConfig
from kdjax.data.checks import Rules
from kdjax.data.errors import progress_bar
from kdjax.data.files.paths import resolve
from kdjax.data.files.scratch import open_scratch
from kdjax.data.manifest import Manifest, read_manifest, require_agreement, require_one_temperature
from kdjax.data.packing import pack_rows
from kdjax.data.records import Record
from kdjax.data.store import RecordFile, RecordStore, choose
from kdjax.data.survey import Survey, judge
from kdjax.types import UserError

log = logging.getLogger(__name__)

# The knobs that decide which records a step sees and what is in them, given the files.
READING_KNOBS = ("sequence_length", "top_k", "shuffle", "seed", "pack", "over_long", "kind", "dedupe")


class Dataset:
    """Checked records by number, all with the same number of teacher entries. Safe from several threads.

    Attributes:
        top_k: teacher entries of every position of every record (K).
        has_log_sum_exp: whether every record carries the teacher's logsumexp.
        fingerprint: hex digest of the files' contents and of the knobs that decide what is read from them.
        warnings: what the survey found worth a look; empty if all is well.
        rows: with data.pack, the record numbers of each row; else None, and every record is a row.
    """

    def __init__(self, store: RecordStore, found: Survey, manifests: list[Manifest], warnings: list[str]):
        data = store.rules.data
        self.data = data
        self.top_k = data.top_k or found.largest_top_k
        self.has_log_sum_exp = found.with_log_sum_exp == found.records
        self.fingerprint = _fingerprint(store)
        self.warnings = tuple(warnings)
        self.rows = pack_rows(store.choice.lengths.tolist(), data.sequence_length) if data.pack else None
        self._store = store
        self._survey = found
        self._manifests = manifests

    def __len__(self) -> int:
        return len(self._store)

    @property
    def bad_records(self) -> int:
        """Damaged records met so far; each counts once and is read as a record without unmasked positions."""
        return self._store.bad_records

    def __getitem__(self, i: int) -> Record:
        """Record `i`, from 0.

        Raises UserError for damage beyond data.max_bad_records, and for a record unlike those surveyed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        checked = self._store.checked(i)
        if checked is None:
            return _blank(int(self._store.choice.lengths[i]), self.top_k, self.has_log_sum_exp)
        record, _ = checked
        if record.top_k > self.top_k:
            raise UserError(
                f"{self._store.where(i)}: holds {record.top_k} teacher entries a position, more than the "
                f"{self.top_k} of the {self._survey.records} records checked at start; set data.top_k (to "
                f"{record.top_k} or less)"
            )
        if self.has_log_sum_exp and record.log_sum_exp_logits is None:
            raise UserError(
                f"{self._store.where(i)}: no field log_sum_exp_logits, which the {self._survey.records} "
                "records checked at start have; write it again, or set data.verify_records=-1 to have "
                "all checked"
            )
        if not self.has_log_sum_exp:
            record = dataclasses.replace(record, log_sum_exp_logits=None)
        return record if record.top_k == self.top_k else record.widened(self.top_k)

    def summary(self) -> list[str]:
        """Lines to print at start: what was found, what was passed over, and the warnings."""
        choice, found, data = self._store.choice, self._survey, self.data
        tokens = int(choice.lengths.sum())
        lines = [f"{len(self._store.files)} file(s), {len(self):,} records, {tokens:,} tokens"]
        for manifest in self._manifests:
            who = manifest.teacher or "not named"
            lines.append(f"{manifest.path}: teacher {who}, licence {manifest.license or 'not stated'}")
        if self.rows is not None:
            fill = tokens / (len(self.rows) * data.sequence_length)
            lines.append(f"packed into {len(self.rows):,} rows of {data.sequence_length}, {fill:.1%} full")
        fewer = f" (in some records {found.smallest_top_k})" if found.smallest_top_k != self.top_k else ""
        lines.append(f"top-k {self.top_k}{fewer}, kind {data.kind}")
        lines.append(f"{found.unmasked / found.tokens:.1%} of tokens unmasked, in {found.records:,} records checked")
        if not self._store.rules.ignore_teacher_ids:
            here, before, after = found.agreement
            lines.append(
                f"teacher's first choice is the label at {here:.1%} of positions ({before:.1%} and "
                f"{after:.1%} one position off)"
            )
        if found.findings.weighed:
            mean = found.findings.mass / found.findings.weighed
            lines.append(f"top-{self.top_k} holds {mean:.1%} of the teacher's probability on average")
        passed_over = {
            "cut off at the end of a file and dropped": sum(file.is_cut for file in self._store.files),
            f"longer than {data.sequence_length} tokens and dropped": choice.dropped,
            f"longer than {data.sequence_length} tokens and truncated": choice.truncated,
            "superseded by a later one of the same index and left out": choice.repeated if data.dedupe else 0,
            "damaged and left out": self.bad_records,
        }
        lines += [f"{count:,} record(s) {what}" for what, count in passed_over.items() if count]
        return lines + [f"warning: {warning}" for warning in self.warnings]


def open_dataset(
    paths: tuple[str, ...],
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer_sha256: str | None = None,
    target_logits_scale: float = 1.0,
    need_log_sum_exp: bool = False,
    ignore_teacher_ids: bool = False,
) -> Dataset:
    """Resolve, unpack, index and survey the records behind `paths`.

    Args:
        paths: data.train or data.val.
        data: how to read them.
        vocab_size: the student's true vocabulary; tokens, labels and teacher's ids must be below it.
        tokenizer_sha256: of the student's tokenizer, held against the manifest's.
        target_logits_scale: the loss's, which must be 1 if the stored logits carry a temperature already.
        need_log_sum_exp: refuse records without the teacher's logsumexp.
        ignore_teacher_ids: the teacher's vocabulary is another one and only its values are used, by rank.

    Raises:
        UserError: for what can be known before the first step, with file, record, field, value and remedy.
    """
    require_one_temperature(data, target_logits_scale)
    sources = resolve(paths, data.n_chunks)
    manifests = [m for d in dict.fromkeys(s.path.parent for s in sources) if (m := read_manifest(d))]
    for manifest in manifests:
        require_agreement(
            manifest,
            data,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            ignore_teacher_ids=ignore_teacher_ids,
        )
    scratch = open_scratch(data.scratch_dir)
    files = [RecordFile(source, scratch, data.allow_truncated) for source in sources]
    choice = choose(files, data)
    store = RecordStore(files, choice, Rules(data, vocab_size, need_log_sum_exp, ignore_teacher_ids))
    for i in np.flatnonzero(choice.stored_lengths < 1):  # known from the index to be damaged
        store.checked(int(i))
    found = _survey(store)
    warnings = judge(found, data.top_k, compare_ids=not ignore_teacher_ids)
    if choice.repeated and not data.dedupe:
        warnings.append(
            f"{choice.repeated} record(s) share their index with a later one of the same path, as when a "
            "run was repeated and appended; data.dedupe=True keeps the last of each"
        )
    warnings += _manifest_warnings(manifests, found, int(choice.stored_lengths.max()))
    for warning in warnings:
        log.warning("%s: %s", ",".join(paths), warning)
    return Dataset(store, found, manifests, warnings)


def _survey(store: RecordStore) -> Survey:
    """Read data.verify_records records in full, spread evenly over the set (at least one)."""
    wanted = store.rules.data.verify_records
    count = len(store) if wanted < 0 else min(len(store), max(1, wanted))
    found = Survey()
    with progress_bar("checking records", count, "record") as bar:
        for i in np.unique(np.linspace(0, len(store) - 1, count).round().astype(int)):
            checked = store.checked(int(i))
            if checked is not None:
                found += Survey.of(*checked)
            bar.update()
    if not found.records:
        raise UserError(
            f"{store.files[0].source.path}: every record checked is damaged ({store.bad_records}, within "
            f"data.max_bad_records = {store.rules.data.max_bad_records}); set it to 0 to see what is wrong"
        )
    return found


def _manifest_warnings(manifests: list[Manifest], found: Survey, longest: int) -> list[str]:
    warnings = []
    for manifest in manifests:
        if manifest.top_k is not None and found.largest_top_k > manifest.top_k:
            warnings.append(f"{manifest.path}: top_k is {manifest.top_k}, but records hold {found.largest_top_k}")
        if manifest.sequence_length is not None and longest > manifest.sequence_length:
            warnings.append(
                f"{manifest.path}: sequence_length is {manifest.sequence_length}, but a record has {longest} tokens"
            )
    return warnings


def _fingerprint(store: RecordStore) -> str:
    digest = hashlib.blake2b(digest_size=16)
    knobs = {name: getattr(store.rules.data, name) for name in READING_KNOBS}
    digest.update(json.dumps([knobs, [file.index.digest for file in store.files]]).encode())
    digest.update(np.int64(len(store)).tobytes())  # data.allow_truncated may have dropped some
    return digest.hexdigest()


def _blank(length: int, top_k: int, has_log_sum_exp: bool) -> Record:
    """A record that weighs nothing."""
    return Record(
        np.zeros(length, np.int32),
        np.zeros(length, np.int32),
        np.zeros(length, np.float32),
        np.zeros((length, top_k), np.float32),
        np.zeros((length, top_k), np.int32),
        np.zeros(length, np.float32) if has_log_sum_exp else None,
    )
