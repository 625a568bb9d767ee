"""A small distillation problem: seeded records of ragged lengths, and a configuration that learns from them."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config as configs
from kdjax.config import Config

VOCAB, LENGTH, TOP_K = 61, 12, 5


def record(number: int, length: int | None = None) -> dict[str, Any]:
    """A record of a teacher that mostly knows the next token of a cyclic walk."""
    rng = np.random.default_rng(number)
    length = length or int(rng.integers(5, LENGTH + 1))
    walk = (int(rng.integers(VOCAB)) + int(rng.integers(1, 4)) * np.arange(length + 1)) % VOCAB
    logits_TxV = rng.normal(size=(length, VOCAB))
    logits_TxV[np.arange(length), walk[1:]] += 4
    ids_TxK = np.argsort(-logits_TxV)[:, :TOP_K]
    shifted_TxV = logits_TxV - logits_TxV.max(axis=-1, keepdims=True)
    return {
        "tokens": walk[:-1].tolist(),
        "labels": walk[1:].tolist(),
        "loss_mask": [0] + [1] * (length - 1),
        "topk_logits": np.take_along_axis(shifted_TxV, ids_TxK, axis=-1).round(4).tolist(),
        "topk_token_ids": ids_TxK.tolist(),
        "log_sum_exp_logits": np.log(np.exp(shifted_TxV).sum(axis=-1)).round(4).tolist(),
        "index": number,
    }


def write(path: Path, count: int, first: int = 0, **changes: Any) -> Path:
    """`count` records as NeMo-Aligner's JSON lines."""
    lines = [json.dumps(record(first + i) | changes) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(directory: Path, *, records: int = 22, val_records: int = 11, **changes: Any) -> Config:
    """A run of a few seconds on records written into `directory`; 22 and 11 divide into no batch evenly."""
    train = directory / "train.jsonl"
    if not train.exists():
        write(train, records)
        write(directory / "val.jsonl", val_records, first=1000)
    base = configs.build(
        {
            "model": {"layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "vocab_size": VOCAB, "dtype": "float32"},
            "data": {
                "train": str(train),
                "val": str(directory / "val.jsonl"),
                "sequence_length": LENGTH,
                "scratch_dir": str(directory / "scratch"),
            },
            "batch": {"global_size": 8, "microbatch_size": 2},
            "loss": {"sft_loss_weight": 0.4},
            "optim": {"lr": 3e-2, "min_lr": 3e-3, "warmup_steps": 2},
            "train": {"steps": 8, "val_every": 4, "save_every": 4},
            "mesh": {"data": 1},
        }
    )
    return configs.replace(base, **changes)


class StopAfter(threading.Event):
    """Set from the moment it was asked `count` times: once a step."""

    def __init__(self, count: int):
        super().__init__()
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0
