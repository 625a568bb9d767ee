"""Records as bytes: what comes back, how far off it may be, how many bytes it takes, and what is refused."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.shards.quantise import CODES, LARGEST, LOG_PROBS, dequantise, quantise
from kdjax.data.shards.record_bytes import Coding, StoredRecord, VocabularyOrder, decode, encode
from kdjax.data.shards.symbols import NUMBERS, DamagedError, Packed

V = 97
ORDER = VocabularyOrder.by_count(np.random.default_rng(0).integers(0, 50, V))
BUNDLED = Path(__file__).parents[2] / "data" / "smollm2_topk" / "val_with_logits_0.jsonl.gz"


def make(seed: int, length: int = 11, k: int = 6, vocab: int = V, **changes: Any) -> StoredRecord:
    """A record of a random teacher, with a masked position and positions with fewer entries."""
    rng = np.random.default_rng(seed)
    log_p = np.log(rng.dirichlet(np.full(vocab, 0.2), length) + 1e-12)
    ids = np.argsort(-log_p, axis=1)[:, :k]
    entries = np.take_along_axis(log_p, ids, axis=1).astype(np.float32)
    mask = np.ones(length, np.float32)
    mask[0] = 0
    entries[0], entries[1, k // 2 :] = -np.inf, -np.inf
    log_sums = np.stack([np.log(np.exp(s * log_p).sum(axis=1)) for s in (1.0, 0.5)]).astype(np.float32)
    tokens = rng.integers(0, vocab, length + 1).astype(np.int32)
    record = StoredRecord(
        tokens[:-1], tokens[1:], mask, np.where(entries > -np.inf, ids, 0), entries, log_sums, index=seed
    )
    return dataclasses.replace(record, **changes)


QUANTISED, EXACT = Coding(ORDER, False, (1.0, 0.5)), Coding(ORDER, True, (1.0, 0.5))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200))
@settings(deadline=None)
def test_numbers_come_back(numbers: list[int]) -> None:
    array = np.array(numbers, np.uint32)
    np.testing.assert_array_equal(NUMBERS.unpack(NUMBERS.pack(array), len(array)), array)


def test_every_code_comes_back() -> None:
    codes = np.arange(LARGEST + 1)
    np.testing.assert_array_equal(CODES.unpack(CODES.pack(codes), len(codes)), codes)
    np.testing.assert_array_equal(quantise(LOG_PROBS), codes)


def test_probabilities_are_off_by_no_more_than_stated() -> None:
    log_p = np.concatenate([np.linspace(-21, 0, 200001), np.log(np.linspace(1e-6, 1, 200001))])
    found = dequantise(quantise(log_p)).astype(np.float64)
    assert np.abs(np.exp(found) - np.exp(log_p)).max() <= 1 / 512 + 1e-6
    assert np.abs(found - log_p).max() <= 0.25
    assert found.max() <= 0
    assert dequantise(quantise(np.array([-np.inf, 1e-3])))[0] == -np.inf


@pytest.mark.parametrize("seed", range(4))
def test_a_quantised_record(seed: int) -> None:
    record = make(seed)
    found = decode(encode(record, QUANTISED), QUANTISED)
    for name in ("tokens", "labels", "loss_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(record, name))
    assert found.index == seed
    assert (np.diff(np.where(found.log_probs > -np.inf, found.log_probs, -99), axis=1) <= 0).all()
    for t in range(len(record)):
        here, there = (
            {i: p for i, p in zip(r.ids[t], r.log_probs[t], strict=True) if p > -np.inf} for r in (record, found)
        )
        assert here.keys() == there.keys()
        assert all(abs(np.exp(here[i]) - np.exp(there[i])) <= 1 / 512 + 1e-6 for i in here)
    # What the ghost bucket learns from: the share of the other ids, at each scale.
    for place, scale in enumerate((1.0, 0.5)):
        with np.errstate(divide="ignore"):
            tails = [
                1 - np.exp(scale * r.log_probs).sum(axis=1) / np.exp(r.log_sums[place].astype(np.float64))
                for r in (record, found)
            ]
        np.testing.assert_allclose(tails[0][1:], tails[1][1:], atol=1 / 512 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_an_exact_record(seed: int) -> None:
    record = make(seed, label_log_probs=np.full(11, -2.0, np.float32), offsets=np.arange(11) * 3 + 5)
    found = decode(encode(record, EXACT), EXACT)
    for field in dataclasses.fields(record):
        here, there = getattr(record, field.name), getattr(found, field.name)
        if field.name == "label_log_probs":
            np.testing.assert_allclose(there, here, atol=0.02)
        elif here is None:
            assert there is None
        else:
            np.testing.assert_array_equal(there, here)


def test_weights_of_a_mask_are_kept() -> None:
    mask = np.linspace(0, 1, 11).astype(np.float32)
    found = decode(encode(make(1, loss_mask=mask), QUANTISED), QUANTISED)
    np.testing.assert_array_equal(found.loss_mask, mask)


def test_sampled_entries_become_weights() -> None:
    """Exact entries carry their probability, drawn ones an even part of the rest for each draw."""
    record = make(2)
    draws = np.where(record.log_probs > -np.inf, np.array([0, 0, 2, 1, 4, 1]), 0).astype(np.uint32)
    tail = np.full(11, -5.25, np.float32)
    log_probs = np.where(draws > 0, tail[:, None], record.log_probs)
    record = dataclasses.replace(record, draws=draws, tail_log_probs=tail, log_probs=log_probs)
    found = decode(encode(record, QUANTISED), QUANTISED)
    plain = found.record()
    assert found.draws is not None
    assert plain.topk_weights is not None
    np.testing.assert_allclose(plain.topk_weights[2:].sum(axis=1), 1, atol=1e-6)
    drawn = found.draws[5] > 0
    assert set(found.draws[5][drawn].tolist()) == {1, 2, 4}
    weights = dict(zip(found.draws[5][drawn].tolist(), plain.topk_weights[5][drawn].tolist(), strict=True))
    np.testing.assert_allclose(weights[4], 4 * weights[1], rtol=1e-6)
    assert (plain.topk_logits[5][drawn] == np.float32(-5.25)).all()
    assert (plain.log_sum_exp_logits == 0).all()


def test_a_scale_other_than_one_scales_logits_and_their_logsumexp() -> None:
    record = make(3)
    plain = record.record(1, 0.5)
    np.testing.assert_array_equal(plain.topk_logits, np.float32(0.5) * record.log_probs)
    np.testing.assert_array_equal(plain.log_sum_exp_logits, record.log_sums[1])


@pytest.mark.parametrize("coding", [QUANTISED, EXACT])
def test_every_flipped_bit_is_seen(coding: Coding) -> None:
    stored = encode(make(4), coding)
    rng = np.random.default_rng(0)
    for place in rng.choice(len(stored), 60, replace=False):
        damaged = bytearray(stored)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(DamagedError, match="digest"):
            decode(bytes(damaged), coding)
    with pytest.raises(DamagedError):
        decode(stored[:-1], coding)


def test_a_hostile_frame_takes_no_more_memory_than_it_may() -> None:
    bomb = NUMBERS.pack(np.zeros(2**24, np.uint32))
    assert len(bomb.symbols) < 2000
    with pytest.raises(DamagedError):
        NUMBERS.unpack(bomb, 100)
    with pytest.raises(DamagedError):
        NUMBERS.unpack(Packed(NUMBERS.pack(np.arange(100)).symbols, b""), 100)


def test_bytes_a_token_of_a_real_teacher() -> None:
    """SmolLM2's top 16 on Persuasion: ids exact, mean KL at most 1e-4 nats, each probability within 0.002."""
    with gzip.open(BUNDLED) as file:
        lines = [json.loads(line) for line in file]
    counts = np.bincount(np.concatenate([line["tokens"] for line in lines]), minlength=49152)
    coding = Coding(VocabularyOrder.by_count(counts), False, (1.0,))
    size = tokens = 0
    divergence = []
    for line in lines:
        logits, log_sum = np.array(line["topk_logits"]), np.array(line["log_sum_exp_logits"])
        record = StoredRecord(
            np.array(line["tokens"]),
            np.array(line["labels"]),
            np.array(line["loss_mask"], np.float32),
            np.array(line["topk_token_ids"]),
            (logits - log_sum[:, None]).astype(np.float32),
            np.zeros((1, len(log_sum)), np.float32),
            index=line["index"],
        )
        stored = encode(record, coding)
        size, tokens = size + len(stored), tokens + len(record)
        found = decode(stored, coding)
        here, there = np.argsort(record.ids, axis=1), np.argsort(found.ids, axis=1)
        np.testing.assert_array_equal(np.take_along_axis(record.ids, here, 1), np.take_along_axis(found.ids, there, 1))
        p, q = (
            np.exp(np.take_along_axis(r.log_probs.astype(np.float64), o, 1))
            for r, o in ((record, here), (found, there))
        )
        assert np.abs(p - q).max() <= 0.002
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        divergence.append((p * np.log(p / q)).sum(axis=1).mean())
    assert np.mean(divergence) <= 1e-4
    assert size / tokens <= 36
