"""Measures the cache: bytes a token, building against the teacher's forward pass alone, loading against JSON lines.

    python scripts/benchmarks/bench_cache.py MODEL TEXT [--tokens 4096]

MODEL is a model directory with its tokenizer. Every rate is the median of several runs in this process.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.cache import build as builds
from kdjax.cache.__main__ import main as cache_main
from kdjax.cache.teacher import Wanted, make_targets_step
from kdjax.cache.text import Tokenizer
from kdjax.checkpoint import load_params
from kdjax.checkpoint.model_directory import read_model_config
from kdjax.config import DataConfig
from kdjax.data import open_dataset, train_batches
from kdjax.data.shards.reader import Cache
from kdjax.model import bind

RUNS = 3
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    _targets(arguments)
    with tempfile.TemporaryDirectory() as directory:
        _bytes_and_loading(arguments, Path(directory))


def _median_s(f: Callable[[], Any]) -> float:
    """Returns the median time of a call, after one that compiles."""
    jax.block_until_ready(f())
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _targets(arguments: argparse.Namespace) -> None:
    """Prints what the targets cost on top of the teacher's logits, [N, V] of which exist in the baseline."""
    model = builds.teacher_model(read_model_config(arguments.model), "float32")
    layout = builds.build_layout(model, LENGTH, "", 4, 1)
    params = load_params(arguments.model, model, layout.params)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (layout.config.batch.global_size, LENGTH))
    rows = builds.meshes.put_rows(layout.mesh, _rows(tokens))
    forward = jax.jit(lambda params, tokens: bind(model, params)(tokens))
    base = _median_s(lambda: forward(params, tokens))
    print(f"forward pass with logits: {tokens.size / base:,.0f} tokens/s")
    for wanted in (Wanted(16), Wanted(100), Wanted(0, 50), Wanted(16, 32)):
        step = make_targets_step(layout, wanted)
        took = _median_s(functools.partial(step, params, rows))
        print(f"  {wanted}: {tokens.size / took:,.0f} tokens/s, {took / base - 1:+.1%}")


def _rows(tokens: np.ndarray) -> Any:
    shape, tokens = tokens.shape, tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return builds.TeacherRows(tokens, tokens, positions, np.ones(shape, np.int32), np.full(shape, 0.5, np.float32))


def _bytes_and_loading(arguments: argparse.Namespace, directory: Path) -> None:
    tokenizer, text = Tokenizer(arguments.model / "tokenizer"), arguments.text.read_text()
    ids = tokenizer.encode(text[: 8 * arguments.tokens]).ids[: arguments.tokens]
    cut = directory / "text.txt"
    cut.write_text(tokenizer.decode(ids.tolist()))
    kinds = {
        "top 16": ["--top-k", "16"],
        "top 64": ["--top-k", "64"],
        "top 100": ["--top-k", "100"],
        "top 16, lossless": ["--top-k", "16", "--lossless"],
        "50 draws": ["--targets", "sampled", "--draws", "50"],
        "top 16, 16 draws": ["--targets", "hybrid", "--top-k", "16", "--draws", "16"],
    }
    for name, options in kinds.items():
        out = directory / name.replace(" ", "_")
        words = ["build", "--teacher", str(arguments.model), "--text", str(cut), str(out), "--dtype", "float32"]
        began = time.perf_counter()
        cache_main([*words, "--sequence-length", str(LENGTH), "--microbatch-size", "4", *options])
        took = time.perf_counter() - began
        cache = Cache(out)
        stored = sum(len(cache.shards[s].read(n)) for s, n in map(cache.place, range(len(cache))))
        tokens = cache.manifest.tokens
        print(f"{name}: {stored / tokens:.1f} bytes a token in records; built in {took:.1f} s, compilation included")
        if "draws" not in name:
            _loading(name, out, tokens, cache, directory)


def _loading(name: str, out: Path, tokens: int, cache: Cache, directory: Path) -> None:
    jsonl = directory / "records.jsonl"
    with jsonl.open("w") as file:
        for i in range(len(cache)):
            record = cache.read(i).record()
            fields = {
                field: getattr(record, field).tolist()
                for field in ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")
            }
            file.write(json.dumps(fields | {"index": i}) + "\n")
    data = DataConfig(sequence_length=LENGTH, verify_records=1, scratch_dir=str(directory / "scratch"))
    rates = []
    for path in (out, jsonl):
        dataset = open_dataset((str(path),), data, vocab_size=cache.manifest.vocab_size)
        steps = 60
        began = time.perf_counter()
        for _ in train_batches(dataset, data, global_size=4, start_step=0, stop_step=steps, rows=slice(0, 4)):
            pass
        rates.append(steps * 4 * tokens / len(cache) / (time.perf_counter() - began))
    print(f"  loading: {rates[0]:,.0f} tokens/s, JSON lines {rates[1]:,.0f}")


if __name__ == "__main__":
    main()
