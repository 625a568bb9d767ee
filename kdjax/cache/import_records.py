"""Imports records of teacher logits into a cache.

IN is a file, a glob, or a template whose file name contains CHUNK_ID: JSON lines as NeMo-Aligner writes them, plain or
compressed (.gz, .zst). Every record is checked as `kdjax train` checks it: ids, order, NaN, duplicates, the shift
between teacher and labels. Values are quantised (docs/cache.md states the bounds); --lossless keeps every bit that
training reads, so that training from the cache equals training from IN.

Run the same command again to go on after an interruption.
"""

import argparse
from pathlib import Path

import numpy as np

from kdjax.cache.info import summarise
from kdjax.cache.writer import CacheWriter, plan_shards, progress_of
from kdjax.cli import Progress
from kdjax.config import DataConfig
from kdjax.data.dataset import Dataset, open_dataset
from kdjax.data.files.paths import find_sources
from kdjax.data.manifest import Manifest, read_manifest
from kdjax.data.records import Record
from kdjax.data.shards.manifest import CacheManifest, encode_ids
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord, VocabularyOrder
from kdjax.types import UserError

LONGEST = 2**20  # tokens of a record
COUNTED_RECORDS = 1024  # whose ids decide the vocabulary order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("inputs", metavar="IN", nargs="+", help="record files")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the cache")
    parser.add_argument("--lossless", action="store_true", help="keep float32 logits instead of quantising them")
    parser.add_argument("--vocab-size", type=int, help="of the teacher; default: manifest.json's beside IN")
    parser.add_argument("--kind", choices=("logits", "log_probs", "probs"), help="what topk_logits holds")
    parser.add_argument("--teacher-temperature", type=float, help="temperature the stored logits were divided by")
    parser.add_argument("--teacher", help="name of the teacher, for the manifest")
    parser.add_argument("--license", help="of the records, for the manifest")
    parser.add_argument("--tokenizer-sha256", help="digest of the tokenizer file, for the manifest")
    parser.add_argument("--max-bad-records", type=int, default=0, help="damaged records that may be left out")


def run(arguments: argparse.Namespace) -> None:
    """Imports the records, or goes on with an import that was interrupted."""
    inputs = tuple(arguments.inputs)
    manifests = [m for d in {s.path.parent for s in find_sources(inputs)} if (m := read_manifest(d))]
    known = manifests[0] if manifests else Manifest(Path())
    vocab_size = arguments.vocab_size or known.vocab_size
    if vocab_size is None:
        raise UserError(f"{inputs[0]}: has no manifest.json that tells the vocabulary; give --vocab-size")
    data = DataConfig(
        train=inputs,
        sequence_length=LONGEST,
        kind=arguments.kind or known.kind or "logits",
        teacher_temperature=arguments.teacher_temperature or known.teacher_temperature or 1.0,
        max_bad_records=arguments.max_bad_records,
        weighted_mask=True,
    )
    dataset = open_dataset(inputs, data, vocab_size=vocab_size)
    print("\n".join(dataset.summary()))
    lengths = dataset.lengths
    shards = plan_shards(lengths)
    manifest = CacheManifest(
        vocab_size=vocab_size,
        top_k=dataset.top_k,
        sequence_length=max(lengths),
        values="float32" if arguments.lossless else "quantised",
        target_logits_scales=(1.0,) if dataset.has_log_sum_exp else (),
        teacher_temperature=data.teacher_temperature,
        teacher=arguments.teacher or known.teacher,
        tokenizer_sha256=arguments.tokenizer_sha256 or known.tokenizer_sha256,
        license=arguments.license or known.license,
        source={"imported_from": [Path(name).name for name in inputs]},
        first_ids=encode_ids(_order(dataset, vocab_size).first),
    )
    settings = {"data": dataset.fingerprint, "values": manifest.values, "vocab_size": vocab_size}
    writer = CacheWriter(arguments.out, manifest, settings)
    with Progress("importing", sum(lengths), "token", delay_s=1.0) as progress:
        for number, numbers in enumerate(shards):
            if writer.is_done(number):
                progress.add(sum(lengths[i] for i in numbers))
                continue
            records = (_stored(dataset[i], arguments.lossless) for i in numbers)
            writer.write_shard(number, progress_of(records, progress))
    writer.finish(len(shards))
    print("\n".join(summarise(Cache(arguments.out))))


def _order(dataset: Dataset, vocab_size: int) -> VocabularyOrder:
    """Returns the order by how often ids occur as tokens and entries, in records spread evenly over the set."""
    counts = np.zeros(vocab_size, np.int64)
    picked = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), COUNTED_RECORDS)).astype(int))
    for i in picked:
        record = dataset[int(i)]
        counts += np.bincount(record.tokens, minlength=vocab_size)
        counts += np.bincount(record.topk_token_ids[record.loss_mask > 0].ravel(), minlength=vocab_size)
    return VocabularyOrder.by_count(counts)


def _stored(record: Record, lossless: bool) -> StoredRecord:
    """Returns a checked record as a cache stores it."""
    unmasked_Sx1 = (record.loss_mask > 0)[:, None]
    log_sum_S = record.log_sum_exp_logits
    if lossless:
        logits, log_sums = record.topk_logits, [] if log_sum_S is None else [log_sum_S]
    else:
        with np.errstate(divide="ignore"):
            own_S = np.log(np.exp(record.topk_logits.astype(np.float64)).sum(axis=1))
        # Rounding may leave the entries with more than the whole probability.
        whole_S = own_S if log_sum_S is None else np.maximum(log_sum_S, own_S)
        logits = np.where(unmasked_Sx1, record.topk_logits - whole_S[:, None], -np.inf).astype(np.float32)
        log_sums = [] if log_sum_S is None else [np.zeros(len(record), np.float32)]
    shape = (len(log_sums), len(record))
    return StoredRecord(
        record.tokens,
        record.labels,
        record.loss_mask,
        record.topk_token_ids,
        logits,
        np.array(log_sums, np.float32).reshape(shape),
        index=record.index,
    )
