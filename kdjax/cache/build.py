"""Builds a cache: puts text before a teacher and keeps its targets at each position.

The teacher is a model directory (kdjax convert makes one of a Megatron, NeMo or Hugging Face checkpoint) or a run. The
text is plain text, or JSON lines of messages, prompt and response, or text; its tokenizer is the teacher's, which a
directory converted from Hugging Face holds. A teacher that is too large for one device is split with --mesh, and
several processes share the work as in kdjax train.

Run the same command again to go on after an interruption; complete shards are kept, and none is written twice.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.cache.info import summarise
from kdjax.cache.teacher import Targets, TeacherRows, Wanted, make_targets_step
from kdjax.cache.text import TOKENIZER_DIRECTORY, Example, Tokenizer, read_examples
from kdjax.cache.writer import SHARD_TOKENS, CacheWriter, is_complete, plan_shards
from kdjax.checkpoint import load_params
from kdjax.checkpoint.model_directory import read_model_config
from kdjax.cli import Progress
from kdjax.config import BatchConfig, Config, DataConfig, MeshConfig, ModelConfig
from kdjax.config.validate import resolve_model, validate_split
from kdjax.convert.provenance import read_provenance
from kdjax.data.packing import pack_rows
from kdjax.data.shards.manifest import TARGETS, CacheManifest, encode_ids
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord, VocabularyOrder
from kdjax.distributed import cluster, consensus, processes, watchdog
from kdjax.model import Params
from kdjax.parallel import mesh as meshes
from kdjax.parallel.axes import AXES, PIPE
from kdjax.training.layout import Layout
from kdjax.types import UserError

# The arguments that decide the content of the records.
DECISIVE = (
    "targets", "top_k", "top_p", "draws", "temperature", "lossless", "label_log_probs", "offsets", "sequence_length",
    "dtype", "seed", "shard_tokens",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--teacher", metavar="MODEL", type=Path, required=True, help="model directory or run")
    parser.add_argument("--text", metavar="FILE", nargs="+", type=Path, required=True, help="texts to read")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="directory of the cache")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="default: the teacher's own")
    parser.add_argument("--targets", choices=TARGETS, default="topk", help="what to keep (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=64, help="exact entries a position (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="stop at the entries that hold this share of the probability")
    parser.add_argument("--draws", type=int, default=50, help="draws of sampled and hybrid targets (default: 50)")
    parser.add_argument(
        "--temperature", type=float, action="append", help="keep the logsumexp at this one too; may be repeated"
    )
    parser.add_argument("--lossless", action="store_true", help="keep float32 values instead of quantising them")
    parser.add_argument("--label-log-probs", action="store_true", help="keep the label's log-probability")
    parser.add_argument("--offsets", action="store_true", help="keep where each token starts in the text, in bytes")
    parser.add_argument("--sequence-length", type=int, default=1024, help="positions of a row (default: 1024)")
    parser.add_argument("--microbatch-size", type=int, default=1, help="rows that a device reads at once (default: 1)")
    parser.add_argument("--microbatches", type=int, help="that follow each other in a batch; default: stages of --mesh")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", default="", help=f"sizes of {', '.join(AXES)}; data=-1 is implied"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens of a shard (default: %(default)s)"
    )
    cluster.add_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    """Builds the cache, or goes on with one that was interrupted."""
    texts, out = list(arguments.text), arguments.out
    if out is None:  # argparse gave the last word to --text
        if len(texts) < 2:
            raise UserError("name the directory of the cache: kdjax cache build --teacher MODEL --text FILE... OUT")
        out = texts.pop()
    timeouts = arguments.heartbeat, arguments.join_timeout, arguments.step_timeout
    with processes.joined(cluster.detect_cluster(arguments), *timeouts):
        build(arguments, texts, out)


def build(arguments: argparse.Namespace, texts: Sequence[Path], out: Path) -> None:
    """Builds the cache in all processes together."""
    model = teacher_model(read_model_config(arguments.teacher, "--teacher"), arguments.dtype)
    _check_settings(arguments, model)
    wanted = _wanted(arguments)
    for path in texts:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; --text takes files")
    tokenizer = Tokenizer(arguments.tokenizer or _teachers_tokenizer(arguments.teacher))
    _check_tokenizer(tokenizer, model)
    length = arguments.sequence_length
    layout = build_layout(model, length, arguments.mesh, arguments.microbatch_size, arguments.microbatches)
    examples = _read(texts, tokenizer, length)
    lengths = [len(example) for example in examples]
    shards = plan_shards(lengths, arguments.shard_tokens)
    order = VocabularyOrder.by_count(
        np.bincount(np.concatenate([example.ids for example in examples]), minlength=model.vocab_size)
    )
    settings = _settings(arguments, texts, tokenizer, examples)
    manifest = _manifest(arguments, settings, wanted, model, tokenizer, order, max(lengths))
    consensus.check_same({"the settings": json.dumps(settings), "the text": _digest(examples)})
    if is_complete(out, settings):
        print(f"{out} is complete already")
        return
    if consensus.is_process_zero():
        CacheWriter(out, manifest, settings)  # refuses before the teacher is read
    consensus.wait_for_all("the cache is begun")
    writer = CacheWriter(out, manifest, settings)
    todo = [number for number in range(len(shards)) if not writer.is_done(number)]
    consensus.check_same({"the complete shards": str(todo)})
    print(f"{len(examples):,} records, {sum(lengths):,} tokens in {len(shards)} shards; {len(todo)} to do", flush=True)
    if todo:
        teacher = Teacher(layout, wanted, load_params(arguments.teacher, model, layout.params), arguments.seed)
        done = sum(lengths) - sum(lengths[i] for number in todo for i in shards[number])
        with Progress("building", sum(lengths), "token", start=done) as progress:
            for number in todo:
                if number % jax.process_count() == jax.process_index():
                    records = records_of(teacher, examples, shards[number], arguments, progress)
                    writer.write_shard(number, records)
                else:  # take part in the teacher's pass only
                    for i, _ in teacher.targets(examples, shards[number]):
                        progress.add(len(examples[i]))
    consensus.wait_for_all("all shards are complete")
    if consensus.is_process_zero():
        writer.finish(len(shards))
        print("\n".join(summarise(Cache(out))))


def _wanted(arguments: argparse.Namespace) -> Wanted:
    sampled = arguments.targets != "topk"
    temperatures = [1.0, *(arguments.temperature or [])]
    return Wanted(
        top_k=0 if arguments.targets == "sampled" else arguments.top_k,
        draws=arguments.draws if sampled else 0,
        scales=tuple(dict.fromkeys(1 / t for t in temperatures)),
    )


def _check_settings(arguments: argparse.Namespace, model: ModelConfig) -> None:
    """Raises UserError for arguments that cannot work, before anything is read."""

    def fail(flag: str, value: object, reason: str) -> None:
        raise UserError(f"{flag} {value}: {reason}")

    if not 1 <= arguments.top_k <= model.vocab_size:
        fail("--top-k", arguments.top_k, f"it must be from 1 to the teacher's vocabulary of {model.vocab_size}")
    if arguments.draws < 1:
        fail("--draws", arguments.draws, "it must be at least 1")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        fail("--top-p", arguments.top_p, "it must be above 0 and at most 1")
    if any(not t > 0 for t in arguments.temperature or ()):
        fail("--temperature", arguments.temperature, "it must be above 0")
    if arguments.targets != "topk" and (arguments.temperature or arguments.top_p or arguments.lossless):
        fail("--targets", arguments.targets, "its draws are made at temperature 1 and quantised, without --top-p")
    for flag in ("sequence_length", "microbatch_size", "shard_tokens"):
        if getattr(arguments, flag) < 1:
            fail("--" + flag.replace("_", "-"), getattr(arguments, flag), "it must be at least 1")
    if model.max_positions is not None and model.max_positions < arguments.sequence_length:
        fail("--sequence-length", arguments.sequence_length, f"the teacher has {model.max_positions} positions")


def _teachers_tokenizer(teacher: Path) -> Path:
    return teacher / TOKENIZER_DIRECTORY


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    if model.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise UserError(
            f"{tokenizer.path}: its digest is {tokenizer.sha256}, and the teacher's tokenizer is "
            f"{model.tokenizer_sha256}: the same ids mean different tokens; use the teacher's own"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{tokenizer.path}: has ids up to {tokenizer.vocab_size - 1}, and the teacher's vocabulary has "
            f"{model.vocab_size}; use the teacher's own tokenizer"
        )


def teacher_model(model: ModelConfig, dtype: str) -> ModelConfig:
    """Returns the architecture as a build computes with it: parameters in the dtype of the computation."""
    return dataclasses.replace(resolve_model(model), dtype=dtype, param_dtype=dtype, remat="none")


def build_layout(
    model: ModelConfig,
    sequence_length: int,
    mesh_text: str,
    microbatch_size: int,
    microbatches: int | None,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Returns the teacher's layout on the mesh that `mesh_text` describes, such as "tensor=8"."""
    config = Config(model=model, data=DataConfig(sequence_length=sequence_length, pack=True))
    config = dataclasses.replace(config, mesh=MeshConfig(**{"data": -1, **_mesh_sizes(mesh_text)}))
    mesh = meshes.make_mesh(config.mesh.sizes, devices)
    validate_split(config, mesh.shape)
    size = meshes.replicas(mesh) * (microbatches or mesh.shape[PIPE]) * microbatch_size
    batch = BatchConfig(global_size=size, microbatch_size=microbatch_size)
    return Layout(dataclasses.replace(config, batch=batch, mesh=dataclasses.replace(config.mesh, **mesh.shape)), mesh)


def _mesh_sizes(text: str) -> dict[str, Any]:
    sizes = dict[str, Any]()
    for word in text.split(",") if text else []:
        axis, _, size = word.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh {text}: {word!r} is not AXIS=N with an axis of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def _read(texts: Sequence[Path], tokenizer: Tokenizer, length: int) -> list[Example]:
    """Returns the rows of all texts. Raises UserError if there is none."""
    rows = []
    size = sum(path.stat().st_size for path in texts)
    with Progress("reading text", size, "B", delay_s=2.0) as progress:
        for path in texts:
            for example in read_examples([path], tokenizer):
                rows += [row for row in example.rows(length) if row.learned[1:].any()]
            progress.add(path.stat().st_size)
    if not rows:
        raise UserError(f"{texts[0]}: no text holds two tokens of which the second is to be learned")
    return rows


def _settings(
    arguments: argparse.Namespace, texts: Sequence[Path], tokenizer: Tokenizer, examples: Sequence[Example]
) -> dict[str, Any]:
    """Returns all that decides the content of the records."""
    return {name: getattr(arguments, name) for name in DECISIVE} | {
        "teacher": arguments.teacher.resolve().name,
        "teacher_sha256": _teacher_sha256(arguments.teacher),
        "tokenizer": tokenizer.sha256,
        "text": [path.name for path in texts],
        "text_digest": _digest(examples),
    }


def _teacher_sha256(teacher: Path) -> str | None:
    """Returns a digest of the digests that a converted model's provenance.json has of its parameters, if it has any."""
    recorded = read_provenance(teacher).get("leaves")
    return hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest() if recorded else None


def _digest(examples: Iterable[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(example.ids.tobytes() + example.learned.tobytes())
    return digest.hexdigest()


def _manifest(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    wanted: Wanted,
    model: ModelConfig,
    tokenizer: Tokenizer,
    order: VocabularyOrder,
    longest: int,
) -> CacheManifest:
    return CacheManifest(
        vocab_size=model.vocab_size,
        top_k=wanted.top_k + wanted.draws,
        sequence_length=longest,
        targets=arguments.targets,
        draws=wanted.draws,
        top_p=arguments.top_p,
        values="float32" if arguments.lossless else "quantised",
        target_logits_scales=wanted.scales,
        teacher=settings["teacher"],
        teacher_sha256=settings["teacher_sha256"],
        tokenizer_sha256=tokenizer.sha256,
        source=settings,
        has_label_log_probs=arguments.label_log_probs,
        has_offsets=arguments.offsets,
        first_ids=encode_ids(order.first),
    )


class Teacher:
    """A teacher on a mesh, with the parameters it computes with."""

    def __init__(self, layout: Layout, wanted: Wanted, params: Params, seed: int):
        self.layout, self._params, self._seed = layout, params, seed
        self._step = make_targets_step(layout, wanted)

    def targets(self, examples: Sequence[Example], numbers: Sequence[int]) -> Iterator[tuple[int, Targets]]:
        """Yields (number, targets [S, ...] on the host) of the examples with these numbers, in the order of their rows.

        While a batch is fetched, the next one is computed.
        """
        config = self.layout.config
        length, size = config.data.sequence_length, config.batch.global_size
        packed = pack_rows([len(examples[i]) for i in numbers], length)
        rows = [[numbers[place] for place in row] for row in packed]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        pending: tuple[list[list[int]], Targets] | None = None
        for batch in [*batches, None]:
            computing = None if batch is None else (batch, self._step(self._params, self._rows(examples, batch)))
            if pending is not None:
                yield from self._unpacked(examples, *pending)
            pending = computing

    def _rows(self, examples: Sequence[Example], batch: Sequence[Sequence[int]]) -> TeacherRows:
        """Returns a global batch on the mesh; each process fills its own rows."""
        config = self.layout.config
        shape = config.batch.global_size, config.data.sequence_length
        tokens, labels, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
        uniforms = np.zeros(shape, np.float32)
        for row, members in enumerate(batch):
            start = 0
            for place, number in enumerate(members):
                example = examples[number]
                part = row, slice(start, start + len(example))
                tokens[part], labels[part] = example.ids[:-1], example.ids[1:]
                positions[part], segments[part] = np.arange(len(example)), place + 1
                uniforms[part] = _uniforms(self._seed, number, len(example))
                start += len(example)
        mine = meshes.process_rows(self.layout.mesh, shape[0])
        arrays = (array[mine] for array in (tokens, labels, positions, segments, uniforms))
        return meshes.put_rows(self.layout.mesh, TeacherRows(*arrays))

    def _unpacked(
        self, examples: Sequence[Example], batch: Sequence[Sequence[int]], targets: Targets
    ) -> Iterator[tuple[int, Targets]]:
        host = jax.tree.map(np.asarray, targets)
        watchdog.record_progress("a batch of text")
        for row, members in enumerate(batch):
            start = 0
            for number in members:
                part = row, slice(start, start + len(examples[number]))
                yield number, jax.tree.map(lambda x, part=part: x[part], host)
                start += len(examples[number])


def _uniforms(seed: int, number: int, length: int) -> np.ndarray:
    """Returns the numbers in [0, 1) that decide what is drawn at each position of a record."""
    bits = np.random.Philox(key=np.array([seed % 2**64, number], np.uint64)).random_raw(length)
    return ((bits >> np.uint64(40)) / 2.0**24).astype(np.float32)


def records_of(
    teacher: Teacher, examples: Sequence[Example], numbers: range, arguments: argparse.Namespace, progress: Progress
) -> Iterator[StoredRecord]:
    """Yields the records of a shard in order."""
    waiting: dict[int, StoredRecord] = {}
    following = numbers.start
    for number, targets in teacher.targets(examples, numbers):
        waiting[number] = to_record(examples[number], targets, number, arguments)
        progress.add(len(examples[number]))
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    assert not waiting


def to_record(example: Example, targets: Any, number: int, arguments: argparse.Namespace) -> StoredRecord:
    """Returns the record of an example from its `Targets` [S, ...] in NumPy; masked positions keep none."""
    learned_S = example.learned[1:]
    log_probs = np.where(learned_S[:, None], targets.log_probs, -np.inf)
    if arguments.top_p is not None:
        p = np.exp(log_probs.astype(np.float64))
        log_probs = np.where(np.cumsum(p, axis=1) - p < arguments.top_p, log_probs, -np.inf)
    ids, draws = targets.ids, None
    if arguments.targets != "topk":
        drawn = learned_S[:, None] & (targets.draws > 0)
        ids = np.concatenate([ids, targets.drawn_ids], axis=1)
        log_probs = np.concatenate([log_probs, np.where(drawn, targets.tail_log_probs[:, None], -np.inf)], axis=1)
        draws = np.concatenate([np.zeros_like(targets.ids), np.where(drawn, targets.draws, 0)], axis=1)
    return StoredRecord(
        tokens=example.ids[:-1],
        labels=example.ids[1:],
        loss_mask=learned_S.astype(np.float32),
        ids=np.where(log_probs > -np.inf, ids, 0),
        log_probs=log_probs.astype(np.float32),
        log_sums=np.ascontiguousarray(targets.log_sums.T),
        draws=draws,
        tail_log_probs=None if draws is None else targets.tail_log_probs,
        label_log_probs=np.where(learned_S, targets.label_log_probs, -np.inf) if arguments.label_log_probs else None,
        offsets=example.starts[:-1] if arguments.offsets else None,
        index=number,
    )
