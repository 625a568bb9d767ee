"""Batches: a function of the step alone, complete in an epoch, the same however they are split and read."""

import dataclasses
from pathlib import Path

import grain
import numpy as np
import pytest
from record_files import make_record, make_records, open_records

from kdjax.config import DataConfig
from kdjax.data import eval_batches, rows_in_epoch, train_batches
from kdjax.types import UserError

LENGTHS = (23, 7, 11, 5, 13, 29, 2, 17, 3, 19, 31)
RECORDS = make_records(*LENGTHS)


def arrays(batch) -> dict[str, np.ndarray]:
    return {f.name: a for f in dataclasses.fields(batch) if (a := getattr(batch, f.name)) is not None}


def assert_same(batch, other):
    assert arrays(batch).keys() == arrays(other).keys()
    for name, array in arrays(batch).items():
        np.testing.assert_array_equal(array, arrays(other)[name], err_msg=name)


def batches(dataset, start=0, stop=5, *, global_size=4, rows=slice(None), **knobs):
    data = dataclasses.replace(dataset.data, **knobs)
    return list(train_batches(dataset, data, global_size=global_size, start_step=start, stop_step=stop, rows=rows))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_records(tmp_path_factory.mktemp("plain"), RECORDS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return open_records(tmp_path_factory.mktemp("packed"), RECORDS, pack=True)


@pytest.fixture(params=["dataset", "packed"])
def either(request):
    return request.getfixturevalue(request.param)


def test_a_batch_holds_its_records_and_padding(dataset):
    (batch,) = batches(dataset, 1, 2, shuffle=False)
    assert {name: (a.shape, a.dtype) for name, a in arrays(batch).items()} == {
        "tokens": ((4, 31), np.int32),
        "labels": ((4, 31), np.int32),
        "loss_mask": ((4, 31), np.float32),
        "topk_logits": ((4, 31, 5), np.float32),
        "topk_token_ids": ((4, 31, 5), np.int32),
        "log_sum_exp_logits": ((4, 31), np.float32),
    }
    for row, record in enumerate(RECORDS[4:8]):
        length = len(record["tokens"])
        for name, array in arrays(batch).items():
            np.testing.assert_allclose(array[row, :length], record[name], rtol=1e-6, err_msg=name)
            assert not array[row, length:].any(), name


def test_a_batch_without_log_sum_exp(tmp_path):
    dataset = open_records(tmp_path, make_records(7, 11, log_sum_exp_logits=...))
    assert batches(dataset, 0, 1)[0].log_sum_exp_logits is None


def test_batches_repeat_file_order_when_not_shuffled(dataset):
    lengths = np.concatenate([batch.loss_mask.sum(axis=1) for batch in batches(dataset, 0, 6, shuffle=False)])
    np.testing.assert_array_equal(lengths, np.resize(LENGTHS, 24))


def test_a_resumed_run_continues_as_if_never_interrupted(either):
    whole = batches(either, 0, 9)
    for start in (1, 8, 9):
        tail = batches(either, start, 9)
        assert len(tail) == 9 - start
        for batch, other in zip(tail, whole[start:], strict=True):
            assert_same(batch, other)
    assert len({batch.tokens.tobytes() for batch in whole}) == 9


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(dataset, processes):
    share = 8 // processes
    parts = [batches(dataset, 2, 4, global_size=8, rows=slice(share * p, share * (p + 1))) for p in range(processes)]
    for step, whole in enumerate(batches(dataset, 2, 4, global_size=8)):
        for name, array in arrays(whole).items():
            np.testing.assert_array_equal(np.concatenate([getattr(p[step], name) for p in parts]), array)


def test_packed_rows_keep_records_apart(packed):
    assert rows_in_epoch(packed) == len(packed.rows) < len(LENGTHS) == len(packed)
    seen = []
    for batch in batches(packed, 0, len(packed.rows), global_size=1, shuffle=False):
        segments = batch.segment_ids[0]
        assert batch.segment_ids.dtype == batch.positions.dtype == np.int32
        assert segments.max() == len(np.unique(segments[segments > 0]))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            (record,) = [r for r in RECORDS if r["tokens"] == batch.tokens[0, here].tolist()]
            seen.append(record["index"])
            assert batch.positions[0, here].tolist() == list(range(len(record["tokens"])))
            assert batch.topk_token_ids[0, here].tolist() == record["topk_token_ids"]
            assert batch.loss_mask[0, here].all()
        padding = segments == 0
        assert not padding[: -padding.sum() or None].any()
        assert not batch.loss_mask[0, padding].any()
        assert not batch.positions[0, padding].any()
    assert sorted(seen) == list(range(len(LENGTHS)))
    rows = len(packed.rows)
    assert f"packed into {rows} rows of 31 tokens, {sum(LENGTHS) / rows / 31:.1%} full" in packed.summary()


def test_evaluation_counts_every_record_once(either):
    found = list(eval_batches(either, either.data, global_size=4, max_batches=None, rows=slice(None)))
    assert {batch.tokens.shape for batch in found} == {(4, 31)}
    assert len(found) == -(-rows_in_epoch(either) // 4)
    assert sum(batch.loss_mask.sum() for batch in found) == sum(LENGTHS)
    last = found[-1]
    padding = slice(rows_in_epoch(either) % 4 or 4, None)
    for name, array in arrays(last).items():
        assert not array[padding].any(), name
    first = list(eval_batches(either, either.data, global_size=4, max_batches=1, rows=slice(1, 3)))
    assert len(first) == 1
    np.testing.assert_array_equal(first[0].tokens, found[0].tokens[1:3])
    assert len(list(eval_batches(either, either.data, global_size=4, max_batches=99, rows=slice(1)))) == len(found)


@pytest.mark.parametrize("count", [1, 8])
def test_evaluation_of_no_more_rows_than_a_batch(tmp_path, count):
    dataset = open_records(tmp_path, [make_record(seed) for seed in range(count)])
    (batch,) = eval_batches(dataset, dataset.data, global_size=8, max_batches=None, rows=slice(None))
    assert batch.loss_mask.sum(axis=1).tolist() == [23] * count + [0] * (8 - count)
    (batch,) = eval_batches(dataset, dataset.data, global_size=8, max_batches=None, rows=slice(4, 8))
    assert batch.loss_mask.sum(axis=1).tolist() == [23 * (count == 8)] * 4


@pytest.mark.parametrize(("read_threads", "prefetch"), [(0, 0), (1, 1), (3, 2), (2, 0), (0, 4)])
def test_reading_ahead_changes_nothing(dataset, read_threads, prefetch):
    ahead = batches(dataset, 0, 4, read_threads=read_threads, prefetch=prefetch)
    for batch, other in zip(ahead, batches(dataset, 0, 4), strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("read_threads", [0, 2])
def test_an_error_while_reading_ahead_is_a_user_error(tmp_path, read_threads):
    records = make_records(*LENGTHS)
    records[5]["labels"][3] = 999
    dataset = open_records(tmp_path, records, shuffle=False, verify_records=2, read_threads=read_threads)
    reader = train_batches(dataset, dataset.data, global_size=4, start_step=0, stop_step=9, rows=slice(None))
    next(reader)
    with pytest.raises(UserError) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, record 6: labels[3] = 999 is outside")


def test_threads_and_prefetch_reach_grain(dataset, monkeypatch):
    seen = []
    real = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **options: seen.append(options) or real(**options))
    batches(dataset, 0, 1, read_threads=3, prefetch=7)
    assert seen == [{"num_threads": 3, "prefetch_buffer_size": 7}]


def test_shuffle_and_seed_change_the_batches(dataset):
    orders = {
        name: tuple(np.concatenate([b.loss_mask.sum(axis=1) for b in batches(dataset, 0, 5, **knobs)]))
        for name, knobs in {"default": {}, "seed": {"seed": 1}, "file": {"shuffle": False}}.items()
    }
    assert len(set(orders.values())) == 3


def test_these_tests_use_every_knob_of_data():
    """A new knob must come with a test that shows what it changes."""
    elsewhere = {"train", "val"}  # handed to open_dataset by its caller
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    unused = {f.name for f in dataclasses.fields(DataConfig)} - elsewhere
    assert {name for name in unused if f"{name}=" not in here and f'"{name}"' not in here} == set()
