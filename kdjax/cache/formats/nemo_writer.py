"""Writes records as NeMo-Aligner's JSON lines, of which `kdjax train` reads back the same float32 values."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from kdjax.data.errors import explain_os_errors
from kdjax.data.records import Record

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def chunk_name(number: int | str, suffix: str) -> str:
    """Returns the name of a file."""
    return f"records_{number}{suffix}"


def write_chunk(path: Path, records: Iterable[Record]) -> None:
    """Writes a file, compressed as its suffix says."""
    with explain_os_errors(path, "write these records"), _open(path) as write:
        for record in records:
            write(to_line(record))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Callable[[bytes], int]]:
    """Yields the function that appends to the file."""
    with path.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:  # no date, so that equal records are equal files
                yield packed.write
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor(level=9).stream_writer(file) as packed:
                yield packed.write
        else:
            yield file.write


def to_line(record: Record) -> bytes:
    """Returns the record as a line of JSON. Absent entries are left out, so that a position may have fewer than K."""
    present_SxK = record.topk_logits > -np.inf
    counts_S = present_SxK.sum(axis=1)
    texts = _shortest(np.where(present_SxK, record.topk_logits, 0))
    logits = ",".join(f"[{','.join(row[:count])}]" for row, count in zip(texts, counts_S, strict=True))
    ids = [row[:count] for row, count in zip(record.topk_token_ids.tolist(), counts_S, strict=True)]
    mask = record.loss_mask
    parts = {
        "tokens": json.dumps(record.tokens.tolist()),
        "labels": json.dumps(record.labels.tolist()),
        "loss_mask": json.dumps((mask.astype(int) if np.isin(mask, (0, 1)).all() else mask.astype(float)).tolist()),
        "topk_logits": f"[{logits}]",
        "topk_token_ids": json.dumps(ids, separators=(",", ":")),
    }
    if record.log_sum_exp_logits is not None:
        parts["log_sum_exp_logits"] = f"[{','.join(_shortest(record.log_sum_exp_logits))}]"
    if record.index is not None:
        parts["index"] = str(record.index)
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in parts.items()) + "}\n").encode()


def _shortest(values: np.ndarray) -> list:
    """Returns the shortest decimals that give the same float32 when they are read as float64 and rounded."""
    values = values.astype(np.float32)
    texts = values.astype("U32")
    wrong = texts.astype(np.float64).astype(np.float32) != values
    if wrong.any():
        texts[wrong] = [repr(float(value)) for value in values[wrong]]
    return texts.tolist()
