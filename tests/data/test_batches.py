"""Order, packing and batches: pure in the step, complete in an epoch, the same however they are split."""

import dataclasses
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import make_record, make_records, open_records

from kdjax.config import DataConfig
from kdjax.data import eval_batches, rows_in_epoch, train_batches
from kdjax.data.packing import pack_rows
from kdjax.data.sampler import global_indices
from kdjax.types import UserError

LENGTHS = (23, 7, 11, 5, 13, 29, 2, 17, 3, 19, 31)


def arrays(batch) -> dict[str, np.ndarray]:
    return {f.name: a for f in dataclasses.fields(batch) if (a := getattr(batch, f.name)) is not None}


def assert_same(batch, other):
    assert arrays(batch).keys() == arrays(other).keys()
    for name, array in arrays(batch).items():
        np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


def batches(dataset, start=0, stop=5, *, global_size=4, rows=slice(None), **knobs):
    data = dataclasses.replace(dataset.data, **knobs)
    return list(train_batches(dataset, data, global_size=global_size, start_step=start, stop_step=stop, rows=rows))


@given(
    size=st.integers(1, 50),
    batch=st.integers(1, 20),
    epochs=st.integers(1, 4),
    shuffle=st.booleans(),
    seed=st.integers(-5, 2**40),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_holds_every_row_once(size, batch, epochs, shuffle, seed):
    steps = -(-epochs * size // batch)
    drawn = [global_indices(s, size=size, batch_size=batch, shuffle=shuffle, seed=seed) for s in range(steps)]
    assert {len(indices) for indices in drawn} == {batch}
    order = np.concatenate(drawn)[: epochs * size].reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(size), (epochs, 1)))
    if not shuffle:
        np.testing.assert_array_equal(order, np.tile(np.arange(size), (epochs, 1)))


def test_the_order_depends_on_seed_and_epoch_and_never_changes():
    def order(step, seed=1):
        return global_indices(step, size=11, batch_size=11, shuffle=True, seed=seed).tolist()

    # As it was when this was written: an order that changes makes resumed runs repeat and skip records.
    assert order(0) == [3, 5, 2, 9, 7, 10, 0, 8, 6, 1, 4]
    assert order(0) != order(1) != order(0, seed=2) != order(0)
    assert order(10**9) == order(10**9)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
@settings(max_examples=100, deadline=None)
def test_packing_holds_every_record_once_and_overfills_no_row(lengths, sequence_length):
    rows = pack_rows(lengths, sequence_length)
    assert sorted(record for row in rows for record in row) == list(range(len(lengths)))
    assert all(list(row) == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    fill = [sum(lengths[record] for record in row) for row in rows]
    assert all(0 < tokens <= sequence_length for tokens in fill)
    assert sum(tokens <= sequence_length / 2 for tokens in fill) <= 1  # else two of them would be one


def test_packing_takes_the_tightest_row():
    assert pack_rows([6, 4, 5, 3, 2], 8) == [(0, 4), (1,), (2, 3)]
    assert pack_rows([], 8) == []


def test_packing_is_near_linear():
    lengths = np.random.default_rng(0).integers(1, 2048, 100_000).tolist()
    rows = pack_rows(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.98


def test_a_batch_holds_its_records_and_padding(tmp_path):
    records = make_records(*LENGTHS)
    dataset = open_records(tmp_path, records)
    (batch,) = batches(dataset, 1, 2, shuffle=False)
    assert {name: (a.shape, a.dtype) for name, a in arrays(batch).items()} == {
        "tokens": ((4, 31), np.int32),
        "labels": ((4, 31), np.int32),
        "loss_mask": ((4, 31), np.float32),
        "topk_logits": ((4, 31, 5), np.float32),
        "topk_token_ids": ((4, 31, 5), np.int32),
        "log_sum_exp_logits": ((4, 31), np.float32),
    }
    for row, record in enumerate(records[4:8]):
        length = len(record["tokens"])
        for name, array in arrays(batch).items():
            np.testing.assert_allclose(array[row, :length], record[name], rtol=1e-6, err_msg=name)
            assert not array[row, length:].any(), name


def test_a_batch_without_log_sum_exp(tmp_path):
    dataset = open_records(tmp_path, make_records(*LENGTHS, log_sum_exp_logits=...))
    assert batches(dataset, 0, 1)[0].log_sum_exp_logits is None


def test_batches_repeat_file_order_when_not_shuffled(tmp_path):
    dataset = open_records(tmp_path, make_records(*LENGTHS), shuffle=False)
    lengths = np.concatenate([batch.loss_mask.sum(axis=1) for batch in batches(dataset, 0, 6)])
    np.testing.assert_array_equal(lengths, np.resize(LENGTHS, 24))


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_taken_up_again_goes_on_as_if_never_interrupted(tmp_path, pack):
    dataset = open_records(tmp_path, make_records(*LENGTHS), pack=pack)
    whole = batches(dataset, 0, 9)
    for start in (1, 4, 8, 9):
        tail = batches(dataset, start, 9)
        assert len(tail) == 9 - start
        for batch, other in zip(tail, whole[start:], strict=True):
            assert_same(batch, other)
    assert len({batch.tokens.tobytes() for batch in whole}) == 9


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(tmp_path, processes):
    dataset = open_records(tmp_path, make_records(*LENGTHS))
    share = 8 // processes
    parts = [batches(dataset, 2, 4, global_size=8, rows=slice(share * p, share * (p + 1))) for p in range(processes)]
    for step, whole in enumerate(batches(dataset, 2, 4, global_size=8)):
        for name, array in arrays(whole).items():
            np.testing.assert_array_equal(np.concatenate([getattr(p[step], name) for p in parts]), array)


def test_packed_rows_keep_records_apart(tmp_path):
    records = make_records(*LENGTHS)
    dataset = open_records(tmp_path, records, pack=True, shuffle=False)
    assert rows_in_epoch(dataset) == len(dataset.rows) < len(LENGTHS) == len(dataset)
    seen = []
    for batch in batches(dataset, 0, len(dataset.rows), global_size=1):
        segments = batch.segment_ids[0]
        assert segments.max() == len(np.unique(segments[segments > 0]))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            (record,) = [r for r in records if r["tokens"] == batch.tokens[0, here].tolist()]
            seen.append(record["index"])
            assert batch.positions[0, here].tolist() == list(range(len(record["tokens"])))
            assert batch.topk_token_ids[0, here].tolist() == record["topk_token_ids"]
            assert batch.loss_mask[0, here].all()
        padding = segments == 0
        assert not padding[: -padding.sum() or None].any()
        assert not batch.loss_mask[0, padding].any()
        assert not batch.positions[0, padding].any()
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert any("packed into" in said for said in dataset.summary())


@pytest.mark.parametrize("pack", [False, True])
def test_evaluation_counts_every_record_once(tmp_path, pack):
    dataset = open_records(tmp_path, make_records(*LENGTHS), pack=pack)
    found = list(eval_batches(dataset, dataset.data, global_size=4, max_batches=None, rows=slice(None)))
    assert {batch.tokens.shape for batch in found} == {(4, 31)}
    assert len(found) == -(-rows_in_epoch(dataset) // 4)
    assert sum(batch.loss_mask.sum() for batch in found) == sum(LENGTHS)
    last = found[-1]
    padding = slice(rows_in_epoch(dataset) % 4 or 4, None)
    for name, array in arrays(last).items():
        assert not array[padding].any(), name
    first = list(eval_batches(dataset, dataset.data, global_size=4, max_batches=2, rows=slice(1, 3)))
    assert len(first) == 2
    for batch, other in zip(first, found, strict=False):
        np.testing.assert_array_equal(batch.tokens, other.tokens[1:3])


def test_evaluation_of_fewer_rows_than_a_batch(tmp_path):
    dataset = open_records(tmp_path, [make_record(0)])
    (batch,) = eval_batches(dataset, dataset.data, global_size=8, max_batches=None, rows=slice(None))
    assert batch.loss_mask.sum(axis=1).tolist() == [23] + [0] * 7
    (batch,) = eval_batches(dataset, dataset.data, global_size=8, max_batches=None, rows=slice(4, 8))
    assert not batch.loss_mask.any()


@pytest.mark.parametrize(("read_threads", "prefetch"), [(0, 0), (1, 1), (3, 2), (2, 0), (0, 4)])
def test_reading_ahead_changes_nothing(tmp_path, read_threads, prefetch):
    dataset = open_records(tmp_path, make_records(*LENGTHS))
    ahead = batches(dataset, 0, 5, read_threads=read_threads, prefetch=prefetch)
    for batch, other in zip(ahead, batches(dataset, 0, 5), strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("read_threads", [0, 2])
def test_an_error_while_reading_ahead_is_the_users_error(tmp_path, read_threads):
    records = make_records(*LENGTHS)
    records[5]["labels"][3] = 999
    dataset = open_records(tmp_path, records, shuffle=False, verify_records=2, read_threads=read_threads)
    reader = train_batches(dataset, dataset.data, global_size=4, start_step=0, stop_step=9, rows=slice(None))
    next(reader)
    with pytest.raises(UserError) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, record 6: labels[3] = 999 is outside")


def test_threads_and_prefetch_reach_grain(tmp_path, monkeypatch):
    seen = []
    real = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **options: seen.append(options) or real(**options))
    dataset = open_records(tmp_path, make_records(*LENGTHS))
    batches(dataset, 0, 1, read_threads=3, prefetch=7)
    assert seen == [{"num_threads": 3, "prefetch_buffer_size": 7}]


FINGERPRINTED = {
    "sequence_length": 32,
    "top_k": 4,
    "shuffle": False,
    "seed": 7,
    "pack": True,
    "over_long": "drop",
    "dedupe": True,
}


@pytest.mark.parametrize("knob", FINGERPRINTED)
def test_knobs_that_change_what_is_read_change_the_fingerprint(tmp_path, knob):
    records = make_records(*LENGTHS)
    plain = open_records(tmp_path, records)
    assert open_records(tmp_path, records).fingerprint == plain.fingerprint
    assert open_records(tmp_path, records, **{knob: FINGERPRINTED[knob]}).fingerprint != plain.fingerprint


def test_knobs_that_do_not_keep_it(tmp_path):
    records = make_records(*LENGTHS)
    plain = open_records(tmp_path, records)
    other = {"read_threads": 1, "prefetch": 1, "verify_records": 3, "scratch_dir": str(tmp_path / "other")}
    assert open_records(tmp_path, records, **other).fingerprint == plain.fingerprint
    assert (tmp_path / "other").is_dir()


def test_shuffle_and_seed_change_the_batches(tmp_path):
    dataset = open_records(tmp_path, make_records(*LENGTHS))
    orders = {
        name: tuple(np.concatenate([b.loss_mask.sum(axis=1) for b in batches(dataset, 0, 5, **knobs)]))
        for name, knobs in {"default": {}, "seed": {"seed": 1}, "file": {"shuffle": False}}.items()
    }
    assert len(set(orders.values())) == 3


def test_every_knob_of_data_is_tried_in_these_tests():
    """A knob that is added must come with a test that shows what it changes."""
    elsewhere = {"train", "val"}  # handed to open_dataset by its caller
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    untried = {f.name for f in dataclasses.fields(DataConfig)} - elsewhere
    assert {name for name in untried if f"{name}=" not in here and f'"{name}"' not in here} == set()
