"""Small record files that are valid in every way until a test damages one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.config import DataConfig
from kdjax.data import Dataset, open_dataset

VOCAB = 97  # prime, so that no padding comes out right by chance
OPENING = ("vocab_size", "tokenizer_sha256", "target_logits_scale", "need_log_sum_exp", "ignore_teacher_ids")


def make_record(seed: int, length: int = 23, top_k: int = 5, **changes: Any) -> dict[str, Any]:
    """A record as NeMo-Aligner writes it: a teacher over VOCAB ids whose most likely token is often the label.

    `changes` replace fields; `...` removes one.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, length + 1)
    logits = rng.normal(size=(length, VOCAB))
    hits = rng.random(length) < 0.5
    logits[hits, ids[1:][hits]] += 6
    logits -= logits.max(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1)[:, :top_k]
    record = {
        "tokens": ids[:-1].tolist(),
        "labels": ids[1:].tolist(),
        "loss_mask": [1] * length,
        "topk_logits": np.take_along_axis(logits, order, 1).round(4).tolist(),
        "topk_token_ids": order.tolist(),
        "log_sum_exp_logits": np.log(np.exp(logits).sum(1)).tolist(),
        "index": seed,
    }
    return {name: value for name, value in (record | changes).items() if value is not ...}


def make_records(*lengths: int, **changes: Any) -> list[dict[str, Any]]:
    return [make_record(seed, length, **changes) for seed, length in enumerate(lengths)]


def damaged(field: str, *position: int, value: Any) -> dict[str, Any]:
    """A record with one value replaced: the whole field, or the item at a position."""
    record = make_record(3)
    if not position:
        return record | {field: value}
    target = record[field]
    for step in position[:-1]:
        target = target[step]
    target[position[-1]] = value
    return record


def line(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line(record) for record in records))
    return path


def config(tmp_path: Path, **knobs: Any) -> DataConfig:
    return DataConfig(**({"sequence_length": 31, "scratch_dir": str(tmp_path / "scratch")} | knobs))


def open_paths(tmp_path: Path, *paths: Path, **knobs: Any) -> Dataset:
    """Opens the files. `knobs` are keywords of `open_dataset` (those in OPENING) or of DataConfig."""
    opening = {"vocab_size": VOCAB} | {key: knobs.pop(key) for key in OPENING if key in knobs}
    return open_dataset(tuple(str(path) for path in paths), config(tmp_path, **knobs), **opening)


def open_records(tmp_path: Path, records: list[Any], **knobs: Any) -> Dataset:
    """Writes the records to a.jsonl and opens it."""
    return open_paths(tmp_path, write(tmp_path / "a.jsonl", records), **knobs)


def token_lists(dataset: Dataset) -> list[list[int]]:
    return [dataset[i].tokens.tolist() for i in range(len(dataset))]
