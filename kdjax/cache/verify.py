"""Checks a cache completely, and names every damaged file and record.

Of each file its digest; of each record its digest, ranges, finite values, the order of its entries, duplicates, its
mask; over all records their number, the numbers that they carry, the shift between teacher and labels, records whose
targets belong to another record, and a teacher that knows nothing of the text.

--tokenizer FILE compares its digest with the one that the cache was made with. --teacher MODEL computes the targets of
--sample records again.

The exit code is 0 if nothing is wrong, 1 if something is.
"""

import argparse
import math
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from kdjax.cache.statistics import Statistics, label_nll, take_statistics
from kdjax.cli import Progress
from kdjax.config import DataConfig
from kdjax.data.checks import Requirements, check
from kdjax.data.records import RecordError
from kdjax.data.shards.manifest import read_cache_manifest
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord, tokens_hash
from kdjax.data.shards.shard import NO_INDEX, Shard, file_sha256
from kdjax.data.shards.symbols import DamagedError
from kdjax.data.survey import Survey, diagnose
from kdjax.types import UserError

MOST_PROBLEMS = 50  # printed; the rest are counted
NEAR_CHANCE_NATS = 1.0  # a teacher whose label NLL is within this much of log V knows nothing of the text
STRANGE_NATS = 2.5  # a record whose label NLL is this much above the median has the targets of another record ...
ENOUGH_POSITIONS = 24  # ... if it has this many unmasked positions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("cache", metavar="CACHE", type=Path)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer file that should have been used")
    parser.add_argument("--teacher", type=Path, metavar="MODEL", help="model directory to compute targets again with")
    parser.add_argument("--sample", type=int, default=8, help="records to compute again (default: 8)")


def run(arguments: argparse.Namespace) -> int:
    """Prints what is wrong, and returns 1 if anything is."""
    problems = list(find_problems(arguments.cache, arguments.tokenizer))
    if arguments.teacher is not None and not problems:
        from kdjax.cache.recompute import compare

        problems += compare(Cache(arguments.cache), arguments.teacher, arguments.sample)
    for problem in problems[:MOST_PROBLEMS]:
        print(problem)
    if len(problems) > MOST_PROBLEMS:
        print(f"and {len(problems) - MOST_PROBLEMS} more")
    print(f"{arguments.cache}: {'damaged' if problems else 'nothing is wrong'}")
    return 1 if problems else 0


def find_problems(path: Path, tokenizer: Path | None = None) -> Iterator[str]:
    """Yields what is wrong with a cache, a line for each problem."""
    try:
        manifest = read_cache_manifest(path)
        whole = yield from _check_files(path)
        if not whole:
            return
        cache = Cache(path)
    except UserError as error:
        yield str(error)
        return
    if tokenizer is not None and manifest.tokenizer_sha256 != (found := file_sha256(tokenizer)):
        yield (
            f"{path}: made with the tokenizer {manifest.tokenizer_sha256}, and {tokenizer} is {found}: the same ids "
            "mean different tokens"
        )
    yield from _check_records(cache)


def _check_files(path: Path) -> Generator[str, None, bool]:
    """Yields files that are missing, cut or changed, and records that cannot be read. Returns whether all are whole."""
    manifest = read_cache_manifest(path)
    whole = True
    with Progress("checking files", sum(entry.bytes for entry in manifest.shards), "B", delay_s=1.0) as progress:
        for entry in manifest.shards:
            file = path / entry.file
            progress.add(entry.bytes)
            if not file.exists():
                yield f"{file}: missing; copy it again"
            elif file.stat().st_size != entry.bytes:
                yield f"{file}: {file.stat().st_size:,} bytes, and the manifest says {entry.bytes:,}; copy it again"
            elif file_sha256(file) != entry.sha256:
                yield f"{file}: its digest is not the manifest's: it was changed after it was written; copy it again"
            else:
                continue
            whole = False
            yield from _unreadable_records(file)
    return whole


def _unreadable_records(file: Path) -> Iterator[str]:
    """Yields the records of a damaged shard that cannot be read."""
    try:
        shard = Shard(file)
    except UserError as error:
        yield str(error)
        return
    for number in range(len(shard)):
        try:
            shard.read(number)
        except DamagedError as error:
            yield f"{file}, record {number + 1}: {error}"


def _check_records(cache: Cache) -> Iterator[str]:
    manifest = cache.manifest
    requirements = Requirements(
        DataConfig(strict=True, weighted_mask=True), manifest.vocab_size, False, ignore_teacher_ids=False
    )
    survey, total, seen = Survey(), Statistics(), Counter[int]()
    nll: list[tuple[int, float]] = []  # number of the record, mean over its positions
    with Progress("checking records", len(cache), "record", delay_s=1.0) as progress:
        for i in range(len(cache)):
            progress.add(1)
            try:
                stored = cache.read(i)
                _check_stored(cache, i, stored)
                place = 0 if manifest.target_logits_scales else None
                record, findings = check(stored.record(place), requirements, cache.where(i))
            except RecordError as error:
                yield str(error)
                continue
            if stored.index is not None:
                seen[stored.index] += 1
                if seen[stored.index] == 2:
                    yield f"{cache.where(i)}: index {stored.index} is that of an earlier record; remove one of the two"
            survey += Survey.of(record, findings)
            if manifest.targets == "sampled" and stored.label_log_probs is None:
                continue
            total += take_statistics(stored, manifest)
            unmasked_S = stored.loss_mask > 0
            if unmasked_S.sum() >= ENOUGH_POSITIONS:
                nll.append((i, float(label_nll(stored, manifest)[unmasked_S].mean())))
    if survey.records and manifest.targets != "sampled":
        try:
            yield from (f"{cache.path}: {warning}" for warning in diagnose(survey, None, False))
        except UserError as error:
            yield f"{cache.path}: {error}"
    yield from _check_teacher(cache, total, nll)


def _check_stored(cache: Cache, i: int, stored: StoredRecord) -> None:
    """Raises RecordError where a record contradicts its shard's index or holds values that are not probabilities."""
    shard, number = cache.place(i)
    index, where = cache.shards[shard].index, cache.where(i)
    if int.from_bytes(tokens_hash(stored.tokens), "little") != int(index.hashes[number]):
        raise RecordError(f"{where}: its tokens are not those that the shard's index lists")
    if (NO_INDEX if stored.index is None else stored.index) != index.indices[number]:
        raise RecordError(f"{where}: its index is {stored.index}, and the shard lists {index.indices[number]}")
    if stored.draws is not None:
        drawn_S = np.where(stored.draws > 0, stored.draws, 0).sum(axis=1)
        wrong_S = (stored.loss_mask > 0) & (drawn_S > cache.manifest.draws)
        if wrong_S.any():
            t = int(np.argmax(wrong_S))
            raise RecordError(f"{where}: position {t} has {drawn_S[t]} draws, more than {cache.manifest.draws}")


def _check_teacher(cache: Cache, total: Statistics, nll: list[tuple[int, float]]) -> Iterator[str]:
    """Yields a teacher that predicts no better than chance, and records whose targets are not their own."""
    chance = math.log(cache.manifest.vocab_size)
    if total.unmasked and total.nll > chance - NEAR_CHANCE_NATS:
        yield (
            f"{cache.path}: the teacher gives the labels {total.nll:.2f} nats, and chance is log V = {chance:.2f}: it "
            "was random, or its targets are not those of these records; build the cache with another teacher"
        )
        return
    if not nll:
        return
    median = float(np.median([value for _, value in nll]))
    for i, value in nll:
        if value > median + STRANGE_NATS:
            yield (
                f"{cache.where(i)}: the teacher gives its labels {value:.2f} nats, and the median record's "
                f"{median:.2f}: these look like another record's targets"
            )
