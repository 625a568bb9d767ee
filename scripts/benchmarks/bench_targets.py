"""Draws the curve that decides what a cache should keep: a student's cross-entropy against bytes a token.

    python scripts/benchmarks/bench_targets.py MODEL OUT [--only label] [--steps 300] [--seeds 1]

MODEL is SmolLM2-135M-Instruct as a model directory (kdjax convert from-hf or from-gguf). Its targets on the tokens of
the bundled records are cached in OUT once for each kind; the quickstart's student then learns from each cache for
`--steps` steps. Results are appended to OUT/results.jsonl, so that the script goes on where it stopped; OUT/curve.png
and OUT/curve.md show them. All points take about two hours on two cores.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import cli
from kdjax import config as configs
from kdjax.cache import build as builds
from kdjax.cache.teacher import Wanted
from kdjax.cache.text import Example
from kdjax.cache.writer import CacheWriter, plan_shards
from kdjax.checkpoint import load_params
from kdjax.checkpoint.model_directory import read_model_config
from kdjax.config import Config, DataConfig, command_line
from kdjax.data import open_dataset
from kdjax.data.shards.manifest import MANIFEST, CacheManifest, encode_ids
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import VocabularyOrder
from kdjax.train import run

RECORDS = Path(__file__).parents[2] / "data" / "smollm2_topk"
LENGTH = 128
LARGEST = 100  # entries of the one pass of the teacher that all top-k caches are cut from


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to keep a teacher's targets, and the loss that reads it."""

    name: str
    top_k: int
    draws: int = 0

    @property
    def targets(self) -> str:
        return "topk" if not self.draws else "hybrid" if self.top_k else "sampled"

    @property
    def label(self) -> str:
        return f"{self.name} {self.top_k or self.draws}" + (f"+{self.draws}" if self.top_k and self.draws else "")

    @property
    def loss(self) -> dict[str, str]:
        """The knobs of the loss."""
        if self.draws:
            return {"loss__targets": "sampled", "loss__tail": "renormalize"}
        return {"loss__tail": self.name}


POINTS = [
    *(Point("renormalize", k) for k in (16, 64, 100)),
    *(Point("ghost", k) for k in (4, 16, 64, 100)),
    *(Point("label", k) for k in (4, 16, 64, 100)),
    *(Point("sampled", 0, n) for n in (12, 50)),
    *(Point("hybrid", k, k) for k in (8, 16, 32)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", help="labels of points, such as 'label 16' or label")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [p for p in POINTS if not arguments.only or p.name in arguments.only or p.label in arguments.only]
    results = arguments.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in range(arguments.seeds):
        for point in chosen:
            if any((r["point"], r["seed"], r["steps"]) == (point.label, seed, arguments.steps) for r in done):
                continue
            train, val = (_cache(arguments, point, split) for split in ("train", "val"))
            found = _train(arguments, point, train, val, seed)
            done.append(found)
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    _show(done, arguments.steps, arguments.out)
    return 0


def _cache(arguments: argparse.Namespace, point: Point, split: str) -> Path:
    """Returns the cache of a point, made if it is not there; all top-k points are cut from one pass of the teacher."""
    name = f"{split}-{point.targets}-{point.top_k}-{point.draws}"
    out = arguments.out / "caches" / name
    if (out / MANIFEST).exists():
        return out
    if point.targets == "topk" and point.top_k < LARGEST:
        _cut(_cache(arguments, Point("ghost", LARGEST), split), out, point.top_k)
        return out
    wanted = Wanted(point.top_k, point.draws)
    examples = _examples(split)
    model = builds.teacher_model(read_model_config(arguments.model), "float32")
    layout = builds.build_layout(model, LENGTH, "", 8, 1)
    teacher = builds.Teacher(layout, wanted, load_params(arguments.model, model, layout.params), seed=0)
    options = argparse.Namespace(targets=point.targets, top_p=None, label_log_probs=False, offsets=False)
    counts = np.bincount(np.concatenate([e.ids for e in _examples("train")]), minlength=model.vocab_size)
    manifest = CacheManifest(
        vocab_size=model.vocab_size,
        top_k=point.top_k + point.draws,
        sequence_length=LENGTH,
        targets=point.targets,
        draws=point.draws,
        first_ids=encode_ids(VocabularyOrder.by_count(counts).first),
    )
    writer = CacheWriter(out, manifest, {"point": name})
    shards = plan_shards([len(e) for e in examples])
    with cli.Progress(f"caching {name}", len(examples) * LENGTH, "token") as progress:
        for number, numbers in enumerate(shards):
            if not writer.is_done(number):
                writer.write_shard(number, builds.records_of(teacher, examples, numbers, options, progress))
    writer.finish(len(shards))
    return out


def _cut(whole: Path, out: Path, top_k: int) -> None:
    """Writes a cache with the `top_k` largest entries of each position of another."""
    cache = Cache(whole)
    writer = CacheWriter(out, dataclasses.replace(cache.manifest, top_k=top_k, shards=()), {"top_k": top_k})
    records = (cache.read(i) for i in range(len(cache)))
    writer.write_shard(
        0, (dataclasses.replace(r, ids=r.ids[:, :top_k], log_probs=r.log_probs[:, :top_k]) for r in records)
    )
    writer.finish(1)


def _examples(split: str) -> list[Example]:
    """Returns the bundled records' tokens."""
    path = str(RECORDS / f"{split}_with_logits_0.jsonl.gz")
    dataset = open_dataset((path,), DataConfig(sequence_length=LENGTH), vocab_size=49152)
    examples = []
    for record in (dataset[i] for i in range(len(dataset))):
        ids = np.append(record.tokens, record.labels[-1]).astype(np.int32)
        examples.append(Example(ids, np.ones(len(ids), bool), np.zeros(len(ids), np.int64)))
    return examples


def _train(arguments: argparse.Namespace, point: Point, train: Path, val: Path, seed: int) -> dict[str, Any]:
    """Trains the quickstart's student, and returns its validation with what the cache takes."""
    config: Config = configs.build(command_line.load(Path("quickstart")))
    config = configs.replace(
        config,
        data__train=(str(train),),
        data__val=(str(val),),
        data__seed=1234 + seed,
        train__steps=arguments.steps,
        train__seed=seed,
        train__val_every=arguments.steps,
        train__save_every=arguments.steps,
        mesh__data=1,
        **point.loss,
    )
    workdir = arguments.out / "runs" / f"{point.label.replace(' ', '-')}-{arguments.steps}-{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    outcome = run(config, workdir, devices=jax.devices()[:1])
    assert outcome.validation is not None
    cache = Cache(train)
    stored = sum(len(cache.shards[s].read(n)) for s, n in map(cache.place, range(len(cache))))
    size = sum(entry.bytes for entry in cache.manifest.shards) + (train / MANIFEST).stat().st_size
    return {
        "point": point.label,
        "name": point.name,
        "seed": seed,
        "steps": arguments.steps,
        "sft_loss": outcome.validation["sft_loss"],
        "kd_loss": outcome.validation["kd_loss"],
        "bytes_a_token": size / cache.manifest.tokens,
        "record_bytes_a_token": stored / cache.manifest.tokens,
    }


def _show(done: Sequence[dict[str, Any]], steps: int, out: Path) -> None:
    """Writes the table and the picture."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in done:
        if result["steps"] == steps:
            rows.setdefault(result["point"], []).append(result)
    lines = ["| targets | bytes a token | cross-entropy, nats | spread over seeds |", "|---|---|---|---|"]
    for point, found in sorted(rows.items(), key=lambda row: np.mean([r["sft_loss"] for r in row[1]])):
        values = [r["sft_loss"] for r in found]
        spread = f"{max(values) - min(values):.3f} of {len(values)}" if len(values) > 1 else ""
        lines.append(f"| {point} | {found[0]['bytes_a_token']:.1f} | {np.mean(values):.3f} | {spread} |")
    (out / "curve.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plt = cli.pyplot()
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(point.name for point in POINTS):
        mine = sorted(
            (found[0]["bytes_a_token"], np.mean([r["sft_loss"] for r in found]), point)
            for point, found in rows.items()
            if found[0]["name"] == name
        )
        if mine:
            panel.plot([x for x, _, _ in mine], [y for _, y, _ in mine], marker="o", label=name)
            for x, y, point in mine:
                panel.annotate(point.partition(" ")[2], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    panel.set(
        xscale="log",
        xlabel="bytes a token, everything included",
        ylabel="validation cross-entropy, nats",
        title=f"a 7M student after {steps} steps",
    )
    panel.legend(frameon=False)
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
