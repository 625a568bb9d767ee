"""A set of records: opened and surveyed before the first step, then read record by record."""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Sequence

import numpy as np

from kdjax.cli import Progress
from kdjax.config import DataConfig
from kdjax.config.validate import require_one_temperature
from kdjax.data.cache_file import CacheFile
from kdjax.data.checks import Requirements
from kdjax.data.files.paths import Source, find_sources
from kdjax.data.files.scratch import open_scratch
from kdjax.data.manifest import Manifest, compare_contents, read_manifest, require_agreement
from kdjax.data.packing import pack_rows
from kdjax.data.records import Record
from kdjax.data.shards.reader import is_cache
from kdjax.data.store import RecordFile, Records, RecordStore, select_records
from kdjax.data.survey import Survey, counted, describe, diagnose
from kdjax.types import UserError

log = logging.getLogger(__name__)

# The knobs that decide, for given files, which records a step sees and what they contain.
FINGERPRINT_KNOBS = ("sequence_length", "top_k", "shuffle", "seed", "pack", "over_long", "kind", "dedupe")


class Dataset:
    """Checked records by number, all with the same number of teacher entries. Safe to use from several threads.

    Attributes:
        top_k: teacher entries at every position of every record (K).
        has_log_sum_exp: whether every record has the teacher's logsumexp.
        has_weights: whether the targets are sampled: each entry carries a share of the target.
        fingerprint: hex digest of the files' contents and of the knobs that decide what is read from them.
        warnings: what looked wrong in the survey, as `open_dataset` logged it; empty if nothing did.
        rows: with data.pack, the record numbers of each row; None if every record is a row.
    """

    def __init__(self, store: RecordStore, survey: Survey, manifests: Sequence[Manifest], warnings: list[str]):
        data = store.requirements.data
        self.data = data
        self.top_k = survey.largest_top_k  # data.top_k, if that is set
        self.has_log_sum_exp = survey.with_log_sum_exp == survey.records
        self.has_weights = store.requirements.need_entries and any(m.targets != "topk" for m in manifests)
        self.fingerprint = _fingerprint(store)
        self.warnings = tuple(warnings)
        self.rows = pack_rows(store.selection.lengths.tolist(), data.sequence_length) if data.pack else None
        self._store = store
        self._survey = survey
        self._manifests = manifests

    def __len__(self) -> int:
        return len(self._store)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return self._store.selection.lengths.tolist()

    @property
    def bad_records(self) -> int:
        """Number of damaged records met so far, each counted once. Each is read as a record that is all masked."""
        return self._store.bad_records

    def __getitem__(self, i: int) -> Record:
        """Returns record `i`, from 0.

        Raises UserError if more than data.max_bad_records are damaged, and for a record unlike those surveyed.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        checked = self._store.read(i)
        if checked is None:
            length = int(self._store.selection.lengths[i])
            return _masked_record(length, self.top_k, self.has_log_sum_exp, self.has_weights)
        record, _ = checked
        if record.top_k > self.top_k:
            raise UserError(
                f"{self._store.where(i)}: has {record.top_k} teacher entries per position, more than the {self.top_k} "
                f"of the {self._survey.records} records checked at the start; set data.top_k to {record.top_k} or less"
            )
        if self.has_log_sum_exp and record.log_sum_exp_logits is None:
            raise UserError(
                f"{self._store.where(i)}: no field log_sum_exp_logits, which the {self._survey.records} records "
                "checked at the start have; generate it again, or set data.verify_records=-1 to check all at the start"
            )
        if not self.has_log_sum_exp:
            record = dataclasses.replace(record, log_sum_exp_logits=None)
        return record if record.top_k == self.top_k else record.padded(self.top_k)

    def summary(self) -> list[str]:
        """Returns lines to print at the start: what the set holds, what the survey found, what is not used."""
        selection, data, length = self._store.selection, self.data, self.data.sequence_length
        tokens = int(selection.lengths.sum())
        files = self._store.files
        lines = [f"{counted(len(files), 'file')}, {counted(len(self), 'record')}, {tokens:,} tokens"]
        lines += [
            f"{manifest.path}: teacher {manifest.teacher or 'not named'}, licence {manifest.license or 'not stated'}"
            for manifest in self._manifests
        ]
        if self.rows is not None:
            fill = tokens / (len(self.rows) * length)
            lines.append(f"packed into {counted(len(self.rows), 'row')} of {length} tokens, {fill:.1%} full")
        lines += describe(self._survey, self.top_k, data.kind, self._store.requirements.ignore_teacher_ids)
        unused = {
            "dropped: cut off at the end of a file": sum(file.is_cut for file in files),
            f"dropped: longer than {length} tokens": selection.dropped,
            f"truncated to {length} tokens": selection.truncated,
            "skipped: a later record has the same index": selection.superseded if data.dedupe else 0,
            "skipped: damaged": self.bad_records,
        }
        return lines + [f"{counted(number, 'record')} {reason}" for reason, number in unused.items() if number]


def open_dataset(
    paths: tuple[str, ...],
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer_sha256: str | None = None,
    target_logits_scale: float = 1.0,
    need_log_sum_exp: bool = False,
    ignore_teacher_ids: bool = False,
    targets: str | None = "topk",
) -> Dataset:
    """Finds, decompresses, indexes and surveys the records that `paths` stand for, and logs what looks wrong.

    Args:
        paths: data.train or data.val.
        data: how to read them.
        vocab_size: the student's true vocabulary; tokens, labels and the teacher's ids must be below it.
        tokenizer_sha256: of the student's tokenizer, compared with the manifest's.
        target_logits_scale: the loss's, which must be 1 if the stored logits are already divided by a temperature.
        need_log_sum_exp: refuse records without the teacher's logsumexp.
        ignore_teacher_ids: the teacher has another vocabulary, so that only its values are used, by rank.
        targets: loss.targets; "sampled" needs caches with sampled or hybrid targets. None: a teacher on the mesh takes
            the place of entries, so that records need none and those they have are dropped.

    With `need_log_sum_exp` and a `target_logits_scale` other than 1, records have logits times that scale and the
    logsumexp that belongs to them, which only a cache can have.

    Raises:
        UserError: for all that can be known before the first step, with file, record, field, value and remedy.
    """
    require_one_temperature(data, target_logits_scale)
    sources = find_sources(paths, data.n_chunks)
    caches = {
        source: CacheFile(source, target_logits_scale, need_log_sum_exp) for source in sources if is_cache(source.path)
    }
    manifests = [cache.description() for cache in caches.values()]
    plain = [source for source in sources if source not in caches]
    manifests += [m for d in dict.fromkeys(source.path.parent for source in plain) if (m := read_manifest(d))]
    need_entries = targets is not None
    if targets is not None:
        _check_targets(plain, manifests, data, targets)
    if plain and need_log_sum_exp and target_logits_scale != 1:
        raise UserError(
            f"{plain[0].path}: its logsumexp belongs to the unscaled logits, and the loss needs the one at "
            f"loss.target_logits_scale = {target_logits_scale:g}; set it to 1, set loss.tail=renormalize, or use a "
            "cache that stores it (kdjax cache build --temperature)"
        )
    for manifest in manifests:
        require_agreement(
            manifest,
            data,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            ignore_teacher_ids=ignore_teacher_ids,
            need_entries=need_entries,
        )
    files = [
        caches.get(source) or RecordFile(source, open_scratch(data.scratch_dir), data.allow_truncated, need_entries)
        for source in sources
    ]
    requirements = Requirements(data, vocab_size, need_log_sum_exp, ignore_teacher_ids, need_entries)
    return survey_files(files, requirements, manifests, ",".join(paths))


def survey_files(
    files: Sequence[Records], requirements: Requirements, manifests: Sequence[Manifest], name: str
) -> Dataset:
    """Selects and surveys the records of open files, and logs, after `name`, what looks wrong.

    Raises UserError as `open_dataset` does.
    """
    data, ignore_teacher_ids = requirements.data, requirements.ignore_teacher_ids
    selection = select_records(files, data)
    store = RecordStore(files, selection, requirements)
    for i in np.flatnonzero(selection.stored_lengths < 1):  # the index shows that these are damaged
        store.read(int(i))
    survey = _take_survey(store)
    warnings = diagnose(survey, data.top_k, ignore_teacher_ids or not requirements.need_entries)
    if selection.superseded and not data.dedupe:
        warnings.append(
            f"{counted(selection.superseded, 'record')} with the index of a later record of the same path, as if a run "
            "had been repeated and its records appended; data.dedupe=True keeps only the last of each"
        )
    for manifest in manifests:
        warnings += compare_contents(manifest, survey.largest_top_k, int(selection.stored_lengths.max()))
    for warning in warnings:
        log.warning("%s: %s", name, warning)
    return Dataset(store, survey, manifests, warnings)


def _check_targets(plain: list[Source], manifests: list[Manifest], data: DataConfig, targets: str) -> None:
    """Raises UserError unless the records hold the targets that the loss expects."""
    unlike = [manifest.path for manifest in manifests if (manifest.targets != "topk") != (targets == "sampled")]
    if targets == "sampled" and (plain or unlike):
        raise UserError(
            f"{(unlike or [plain[0].path])[0]}: holds the teacher's top-k, and loss.targets is 'sampled'; set "
            "loss.targets=topk, or build a cache with --targets sampled or hybrid"
        )
    if unlike:
        raise UserError(f"{unlike[0]}: holds sampled targets, and loss.targets is 'topk'; set loss.targets=sampled")
    if targets == "sampled" and data.top_k is not None:
        raise UserError(f"data.top_k = {data.top_k}: sampled targets are used as a whole; leave it unset")


def _take_survey(store: RecordStore) -> Survey:
    """Reads data.verify_records records (at least one), spread evenly over the set, and adds up their surveys."""
    wanted = store.requirements.data.verify_records
    number = len(store) if wanted < 0 else min(len(store), max(1, wanted))
    survey = Survey()
    with Progress("checking records", number, "record", delay_s=2.0, lines_to=sys.stdout) as progress:
        for i in np.unique(np.linspace(0, len(store) - 1, number).round().astype(int)):
            checked = store.read(int(i))
            if checked is not None:
                survey += Survey.of(*checked)
            progress.add(1)
    if not survey.records:
        raise UserError(
            f"{store.files[0].source.path}: every record checked is damaged ({store.bad_records}, within "
            f"data.max_bad_records = {store.requirements.data.max_bad_records}); set it to 0 to see what is wrong"
        )
    return survey


def _fingerprint(store: RecordStore) -> str:
    digest = hashlib.blake2b(digest_size=16)
    knobs = {name: getattr(store.requirements.data, name) for name in FINGERPRINT_KNOBS}
    digest.update(json.dumps([knobs, [file.index.digest for file in store.files]]).encode())
    digest.update(np.int64(len(store)).tobytes())  # data.allow_truncated may have dropped some
    return digest.hexdigest()


def _masked_record(length: int, top_k: int, has_log_sum_exp: bool, has_weights: bool) -> Record:
    """Returns a record of zeros, all masked."""
    return Record(
        np.zeros(length, np.int32),
        np.zeros(length, np.int32),
        np.zeros(length, np.float32),
        np.zeros((length, top_k), np.float32),
        np.zeros((length, top_k), np.int32),
        np.zeros(length, np.float32) if has_log_sum_exp else None,
        np.zeros((length, top_k), np.float32) if has_weights else None,
    )
