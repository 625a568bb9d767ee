"""Exports a cache to files of another program.

  nemo        NeMo-Aligner's JSON lines, as `kdjax train` reads them: records_0.jsonl.gz, ... and manifest.json
  distillkit  DistillKit's parquet files: data_0.parquet, ... and compression_config.yaml; needs the extra `parquet`

A cache that was imported with --lossless and exported to nemo gives the same float32 values again. DistillKit's values
are bfloat16 unless --compression-config says otherwise. Log-probabilities of labels, byte offsets and logsumexps at
other temperatures have no place in either and are left out. Caches of sampled targets cannot be exported.

OUT appears complete or not at all.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from kdjax.cache.formats import distillkit_writer, nemo_writer
from kdjax.cache.formats.distillkit import CONFIG, parquet
from kdjax.cache.formats.distillkit_codec import CompressionConfig, read_config
from kdjax.cli import Progress
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.paths import MANIFEST
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.types import UserError

RECORDS_PER_FILE = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("cache", metavar="CACHE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory for the files")
    parser.add_argument("--format", choices=("nemo", "distillkit"), required=True)
    parser.add_argument("--records-per-file", type=int, default=RECORDS_PER_FILE, help="default: %(default)s")
    parser.add_argument(
        "--suffix", choices=nemo_writer.SUFFIXES, default=".jsonl.gz", help="of nemo's files (default: %(default)s)"
    )
    parser.add_argument(
        "--compression-config",
        type=Path,
        metavar="FILE",
        help="DistillKit's logprob_compressor configuration; default: all values in bfloat16",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the files."""
    cache, out = Cache(arguments.cache), arguments.out
    manifest = cache.manifest
    if manifest.targets != "topk":
        raise UserError(
            f"{cache.path}: holds {manifest.targets} targets, whose entries carry shares of the target and not "
            "log-probabilities; only caches of top-k targets can be exported"
        )
    if arguments.records_per_file < 1:
        raise UserError(f"--records-per-file {arguments.records_per_file}: it must be at least 1")
    if out.exists():
        raise UserError(f"{out}: exists already; name a new directory")
    chunks = [
        range(start, min(start + arguments.records_per_file, len(cache)))
        for start in range(0, len(cache), arguments.records_per_file)
    ]
    write = _write_nemo if arguments.format == "nemo" else _write_distillkit
    partial = out.with_name(out.name + ".partial")
    with explain_os_errors(partial, "write this directory"):
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        try:
            with Progress("exporting", len(cache), "record", delay_s=1.0) as progress:
                write(cache, chunks, partial, arguments, progress.add)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(cache):,} records in {len(chunks)} files, {size:,} bytes, {size / manifest.tokens:.1f} a token")
    lost = {
        "the log-probabilities of the labels": manifest.has_label_log_probs,
        "the byte offsets": manifest.has_offsets,
        "the logsumexps at other temperatures than 1": set(manifest.target_logits_scales) - {1.0},
    }
    for what in (what for what, there in lost.items() if there):
        print(f"left out: {what}")


def _write_nemo(
    cache: Cache, chunks: list[range], out: Path, arguments: argparse.Namespace, done: Callable[[int], None]
) -> None:
    manifest = cache.manifest
    place = manifest.target_logits_scales.index(1.0) if 1.0 in manifest.target_logits_scales else None
    for number, chunk in enumerate(chunks):
        records = (record.record(place) for _, record in _records(cache, chunk, done))
        nemo_writer.write_chunk(out / nemo_writer.chunk_name(number, arguments.suffix), records)
    known = {
        "teacher": manifest.teacher,
        "license": manifest.license,
        "kind": "logits",
        "teacher_temperature": manifest.teacher_temperature,
        "vocab_size": manifest.vocab_size,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "top_k": manifest.top_k,
        "sequence_length": manifest.sequence_length,
    }
    content = {key: value for key, value in known.items() if value is not None}
    (out / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def _write_distillkit(
    cache: Cache, chunks: list[range], out: Path, arguments: argparse.Namespace, done: Callable[[int], None]
) -> None:
    manifest = cache.manifest
    parquet()  # refuses before anything is read
    k = manifest.top_k
    config = CompressionConfig(manifest.vocab_size, k, exact_k=k, exact_dtype="bfloat16", delta_encoding=False)
    if arguments.compression_config is not None:
        config = read_config(arguments.compression_config)
        _check_fit(config, cache, arguments.compression_config)
    for number, chunk in enumerate(chunks):
        distillkit_writer.write_file(out / distillkit_writer.file_name(number), _records(cache, chunk, done), config)
    (out / CONFIG).write_text(config.to_yaml())


def _check_fit(config: CompressionConfig, cache: Cache, path: Path) -> None:
    """Raises UserError if the cache cannot be written so."""
    manifest = cache.manifest
    if config.d < manifest.vocab_size:
        raise UserError(
            f"{path}: d = {config.d}, and the teacher's vocabulary has {manifest.vocab_size}; set d to that"
        )
    if config.k > manifest.top_k:
        raise UserError(f"{path}: k = {config.k}, and {cache.path} has {manifest.top_k} entries a position; lower k")
    if config.error_diffusion:
        raise UserError(f"{path}: error_diffusion is not written; set it to false (DistillKit does not recommend it)")


def _records(cache: Cache, chunk: range, done: Callable[[int], None]) -> Iterator[tuple[str, StoredRecord]]:
    for i in chunk:
        yield cache.where(i), cache.read(i)
        done(1)
