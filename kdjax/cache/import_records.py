"""Imports records of teacher targets into a cache, from what this or another program wrote.

IN is a file, a glob, a directory, or a template whose file name contains CHUNK_ID. The format is recognised from the
files; --format names it. docs/cache_formats.md says what each loses.

  nemo        NeMo-Aligner's JSON lines, plain or compressed (.gz, .zst)
  vllm        JSON lines of vLLM's prompt_logprobs, or of the columns that Axolotl trains on
  distillkit  DistillKit's parquet files, which open-instruct reads too; needs the extra `parquet`
  maxtext     MaxText's ArrayRecord files of tf.train.Example
  megatron    Megatron-LM's tar files of cached log-probabilities; needs --tokens

Every record is checked as `kdjax train` checks it: ids, order, NaN, duplicates, the shift between teacher and labels.
Values are quantised (docs/cache.md states the bounds); --lossless keeps every bit that training reads, so that training
from the cache equals training from IN.

Run the same command again to go on after an interruption.
"""

import argparse
from pathlib import Path

import numpy as np

from kdjax.cache.formats.foreign import Foreign, Options
from kdjax.cache.formats.registry import FORMATS, choose, find_inputs, open_format
from kdjax.cache.info import summarise
from kdjax.cache.writer import CacheWriter, is_complete, plan_shards, progress_of
from kdjax.cli import Progress
from kdjax.data.shards.manifest import CacheManifest, encode_ids
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import VocabularyOrder

COUNTED_RECORDS = 1024  # whose ids decide the vocabulary order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("inputs", metavar="IN", nargs="+", help="record files")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the cache")
    parser.add_argument("--format", choices=sorted(FORMATS), help="of IN; default: what the files look like")
    parser.add_argument("--lossless", action="store_true", help="keep float32 logits instead of quantising them")
    parser.add_argument("--vocab-size", type=int, help="of the teacher; default: what the files or manifest.json say")
    parser.add_argument("--kind", choices=("logits", "log_probs", "probs"), help="what topk_logits holds (nemo)")
    parser.add_argument("--teacher-temperature", type=float, help="temperature the stored values were divided by")
    parser.add_argument("--teacher", help="name of the teacher, for the manifest")
    parser.add_argument("--license", help="of the records, for the manifest")
    parser.add_argument("--tokenizer-sha256", help="digest of the tokenizer file, for the manifest")
    parser.add_argument(
        "--compression-config", type=Path, metavar="FILE", help="DistillKit's; default: compression_config.yaml by IN"
    )
    parser.add_argument("--tokens", type=Path, metavar="FILE.npy", help="token ids [samples, S + 1] (megatron)")
    parser.add_argument("--max-bad-records", type=int, default=0, help="damaged records that may be left out")


def run(arguments: argparse.Namespace) -> None:
    """Imports the records, or goes on with an import that was interrupted."""
    inputs, lossless = list(arguments.inputs), arguments.lossless
    options = Options(
        arguments.vocab_size,
        arguments.kind,
        arguments.teacher_temperature,
        arguments.compression_config,
        arguments.tokens,
    )
    sources = find_inputs(inputs)
    name = choose(sources, arguments.format, options)
    foreign = Foreign(open_format(name, sources, options), ",".join(inputs), arguments.max_bad_records)
    print("\n".join(foreign.dataset.summary()))
    lengths, known = foreign.lengths, foreign.facts
    shards = plan_shards(lengths)
    settings = {
        "imported_from": [Path(each).name for each in inputs],
        "data": foreign.fingerprint,
        "format": name,
        "values": "float32" if lossless else "quantised",
        "vocab_size": foreign.vocab_size,
        "teacher_temperature": known.teacher_temperature or 1.0,
    }
    if is_complete(arguments.out, settings):
        print(f"{arguments.out} is complete already")
        return
    manifest = CacheManifest(
        vocab_size=foreign.vocab_size,
        top_k=foreign.dataset.top_k,
        sequence_length=max(lengths),
        values=str(settings["values"]),
        target_logits_scales=(1.0,) if foreign.dataset.has_log_sum_exp else (),
        teacher_temperature=known.teacher_temperature or 1.0,
        teacher=arguments.teacher or known.teacher,
        tokenizer_sha256=arguments.tokenizer_sha256 or known.tokenizer_sha256,
        license=arguments.license or known.license,
        source=settings,
        has_label_log_probs=foreign.has_label_log_probs,
        first_ids=encode_ids(_order(foreign).first),
    )
    writer = CacheWriter(arguments.out, manifest, settings)
    with Progress("importing", sum(lengths), "token", delay_s=1.0) as progress:
        for number, numbers in enumerate(shards):
            if writer.is_done(number):
                progress.add(sum(lengths[i] for i in numbers))
                continue
            records = (foreign.record(i, lossless) for i in numbers)
            writer.write_shard(number, progress_of(records, progress))
    writer.finish(len(shards))
    print("\n".join(summarise(Cache(arguments.out))))


def _order(foreign: Foreign) -> VocabularyOrder:
    """Returns the order by how often ids occur as tokens and entries, in records spread evenly over the set."""
    dataset, vocab_size = foreign.dataset, foreign.vocab_size
    counts = np.zeros(vocab_size, np.int64)
    picked = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), COUNTED_RECORDS)).astype(int))
    for i in picked:
        record = dataset[int(i)]
        counts += np.bincount(record.tokens, minlength=vocab_size)
        counts += np.bincount(record.topk_token_ids[record.loss_mask > 0].ravel(), minlength=vocab_size)
    return VocabularyOrder.by_count(counts)
