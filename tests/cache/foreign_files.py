"""A toy teacher, and its targets in the formats of other programs, written by plain code that kdjax does not use."""

import io
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from kdjax.cache.__main__ import main
from kdjax.config import DataConfig
from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_writer import Construct, Global, Persistent, dumps
from kdjax.data import Dataset, open_dataset
from kdjax.data.shards.reader import Cache

VOCAB = 97  # prime, so that no padding comes out right by chance


class Taught(NamedTuple):
    """Token ids [S + 1], and the log-probability of every token [S, VOCAB]; row t is about ids[t + 1]."""

    ids: np.ndarray
    log_probs: np.ndarray

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities [S, k] of the most likely tokens."""
        ids = np.argsort(-self.log_probs, axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(self.log_probs, ids, 1)

    @property
    def label_log_probs(self) -> np.ndarray:
        return self.log_probs[np.arange(len(self.log_probs)), self.ids[1:]]


def sequence(seed: int, length: int = 23, vocab: int = VOCAB) -> Taught:
    """A sequence whose next token is the teacher's most likely one about half of the time."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, length + 1)
    logits = rng.normal(size=(length, vocab))
    hits = rng.random(length) < 0.5
    logits[hits, ids[1:][hits]] += 6
    return Taught(ids, logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def sequences(*lengths: int) -> list[Taught]:
    return [sequence(seed, length) for seed, length in enumerate(lengths)]


def run_import(out: Path, *inputs: Path | str, **flags: Any) -> Cache:
    """Runs `kdjax cache import`. A flag that is True has no value."""
    words = [
        word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value) if word is not True
    ]
    assert main(["import", *map(str, words), *map(str, inputs), str(out)]) == 0
    return Cache(out)


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def nemo(given: Taught, k: int = 5, **changes: Any) -> dict[str, Any]:
    """A record as NeMo-Aligner writes it: the row's maximum is subtracted from logits and logsumexp."""
    ids, values = given.top(k)
    record = {
        "tokens": given.ids[:-1].tolist(),
        "labels": given.ids[1:].tolist(),
        "loss_mask": [1] * len(ids),
        "topk_logits": (values - values[:, :1]).tolist(),
        "topk_token_ids": ids.tolist(),
        "log_sum_exp_logits": (-values[:, 0]).tolist(),
        "index": len(ids),
    }
    return {name: value for name, value in (record | changes).items() if value is not None}


def dataset(*paths: Path, vocab_size: int = VOCAB, **knobs: Any) -> Dataset:
    data = DataConfig(sequence_length=10_000, weighted_mask=True, **knobs)
    return open_dataset(tuple(map(str, paths)), data, vocab_size=vocab_size)


def assert_same_records(found: Dataset, wanted: Dataset) -> None:
    assert len(found) == len(wanted)
    assert (found.top_k, found.has_log_sum_exp) == (wanted.top_k, wanted.has_log_sum_exp)
    for i in range(len(wanted)):
        a, b = found[i], wanted[i]
        for name in ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"record {i}, {name}")
        assert a.index == b.index


def vllm_prompt(given: Taught, k: int, detailed: bool = True) -> dict[str, Any]:
    """What vLLM returns for a prompt: its own token first, then the k most likely; the first token has no entry."""
    rows: list[Any] = [None]
    for t, row in enumerate(given.log_probs):
        order = np.argsort(-row, kind="stable")
        ranks = {int(token): rank for rank, token in enumerate(order, start=1)}
        wanted = dict.fromkeys([int(given.ids[t + 1]), *order[:k].tolist()])
        rows.append(
            {
                str(token): {"logprob": row[token], "rank": ranks[token], "decoded_token": "x"}
                if detailed
                else row[token]
                for token in wanted
            }
        )
    return {"prompt_token_ids": given.ids.tolist(), "prompt_logprobs": rows}


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    octets = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        octets.append(low | (0x80 if value else 0))
        if not value:
            return bytes(octets)


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def tf_example(features: dict[str, np.ndarray], packed: bool = True) -> bytes:
    """A serialised tf.train.Example."""
    entries = b""
    for name, values in features.items():
        if values.dtype.kind == "f":
            items = [struct.pack("<f", value) for value in values.ravel()]
            wire, kind = 5, 2
        else:
            items = [varint(int(value)) for value in values.ravel()]
            wire, kind = 0, 3
        body = field(1, b"".join(items)) if packed else b"".join(varint(1 << 3 | wire) + item for item in items)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, body)))
    return field(1, entries)


def distillkit_bits(numbers: Sequence[int], bits: int) -> list[int]:
    """Numbers packed into bytes, by way of a string of binary digits."""
    digits = "".join(f"{number:0{bits}b}" for number in numbers)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[place : place + 8], 2) for place in range(0, len(digits), 8)]


def torch_bytes(content: dict[str, Any]) -> bytes:
    """What torch.save writes. uint16 tensors are views of untyped storages, as torch pickles them."""
    storages: list[np.ndarray] = []

    def describe(array: np.ndarray) -> Construct:
        array = np.ascontiguousarray(array)
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        storages.append(array)
        if array.dtype != np.uint16:
            return torch_file.describe_tensor(array, len(storages) - 1, 0, array.shape, strides)
        kind = Global("torch.storage", "UntypedStorage")
        reference = Persistent(("storage", kind, str(len(storages) - 1), "cpu", array.nbytes))
        rebuild = Global("torch._utils", "_rebuild_tensor_v3")
        arguments = (reference, 0, array.shape, strides, False, None, Global("torch", "uint16"), None)
        return Construct(rebuild, arguments)

    file = io.BytesIO()
    torch_file.write_archive(file, dumps(content, describe), storages)
    return file.getvalue()


def write_tar(path: Path, meta: dict[str, Any], members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in {"_meta.json": json.dumps(meta).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def stored(cache: Cache) -> Iterator[Any]:
    for i in range(len(cache)):
        yield cache.read(i)
