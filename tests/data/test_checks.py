"""Checking a record against vocabulary and configuration: what is refused, repaired, converted or left alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import VOCAB, damaged, line, make_record, make_records, open_records

from kdjax.config import DataConfig
from kdjax.data import Record, RecordError
from kdjax.data.checks import Findings, Requirements, check
from kdjax.data.records import decode
from kdjax.data.repair import merge_duplicates, sort_entries
from kdjax.types import UserError

NAN, INF = math.nan, math.inf


def checked(record: dict, need_log_sum_exp: bool | None = None, **knobs) -> tuple[Record, Findings]:
    if need_log_sum_exp is None:
        need_log_sum_exp = record.get("log_sum_exp_logits") is not None
    requirements = Requirements(DataConfig(**knobs), VOCAB, need_log_sum_exp, ignore_teacher_ids=False)
    return check(decode(line(record), "F, record 12"), requirements, "F, record 12")


def refusal(record: dict, **knobs) -> str:
    with pytest.raises(RecordError) as caught:
        checked(record, **knobs)
    message = str(caught.value)
    assert message.startswith("F, record 12: ")
    assert message.count("F, record 12") == 1
    return message


def with_rows(*rows: list[float], lse: float | None = None) -> dict:
    """A record with one position for each row of values; ids 0, 1, 2, ... in each row."""
    record = make_record(3, length=len(rows), log_sum_exp_logits=None if lse is None else [lse] * len(rows))
    return record | {"topk_logits": list(rows), "topk_token_ids": [list(range(len(row))) for row in rows]}


@pytest.mark.parametrize(("length", "top_k"), [(1, 1), (1, 5), (7, 1)])
def test_the_smallest_records(length, top_k):
    record, _ = checked(make_record(3, length=length, top_k=top_k))
    assert record.topk_logits.shape == (length, top_k)


@pytest.mark.parametrize(
    ("field", "position", "value", "parts"),
    [
        ("topk_token_ids", (3, 2), VOCAB, [f"topk_token_ids[3][2] = {VOCAB}", "0 to 96", "cross_tokenizer"]),
        ("topk_token_ids", (3, 2), -1, ["topk_token_ids[3][2] = -1", "vocabulary"]),
        ("labels", (6,), VOCAB, [f"labels[6] = {VOCAB}", "vocabulary"]),
        ("labels", (6,), -100, ["labels[6] = -100", "vocabulary"]),
        ("tokens", (6,), VOCAB, [f"tokens[6] = {VOCAB}", "vocabulary"]),
        ("tokens", (22,), -1, ["tokens[22] = -1", "vocabulary"]),
        ("topk_logits", (3, 2), NAN, ["topk_logits[3][2] = nan at an unmasked position", "data.max_bad_records"]),
        ("topk_logits", (3, 0), INF, ["topk_logits[3][0] = inf at an unmasked position"]),
        ("topk_logits", (3, 0), 1e39, ["topk_logits[3][0] = inf"]),
        (
            "topk_logits",
            (3,),
            [-INF] * 5,
            ["topk_logits[3] = [-inf, -inf, -inf, -inf, -inf] has no finite entry", "mask the position"],
        ),
        ("log_sum_exp_logits", (3,), NAN, ["log_sum_exp_logits[3] = nan"]),
        ("log_sum_exp_logits", (3,), -INF, ["log_sum_exp_logits[3] = -inf"]),
        ("loss_mask", (3,), 2, ["loss_mask[3] = 2; it must be 0 or 1"]),
        ("loss_mask", (3,), -1, ["loss_mask[3] = -1; it must be 0 or 1"]),
        ("loss_mask", (3,), NAN, ["loss_mask[3] = nan; it must be 0 or 1"]),
        ("loss_mask", (3,), 0.5, ["loss_mask[3] = 0.5 is neither 0 nor 1", "data.weighted_mask=True"]),
    ],
)
def test_values_that_cannot_be_trained_on(field, position, value, parts):
    message = refusal(damaged(field, *position, value=value))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("value", [0, VOCAB - 1])
def test_the_first_and_the_last_id_of_the_vocabulary_are_valid(value):
    stored = make_record(3) | {name: [value] * 23 for name in ("tokens", "labels")}
    stored["topk_token_ids"][3] = [value, 1, 2, 3, 4]
    record, _ = checked(stored)
    assert set(record.tokens.tolist()) == set(record.labels.tolist()) == {value}
    assert record.topk_token_ids[3].tolist() == [value, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("field", "position", "value"),
    [
        ("topk_token_ids", (22, 2), VOCAB),
        ("topk_token_ids", (22, 2), -1),
        ("topk_token_ids", (22, 2), 2**31 - 1),
        ("topk_token_ids", (22,), [1, 1, 1, 1, 1]),
        ("labels", (22,), -100),
        ("tokens", (22,), -1),
        ("tokens", (22,), VOCAB),
        ("topk_logits", (22, 2), NAN),
        ("topk_logits", (22, 2), INF),
        ("topk_logits", (22,), [-INF] * 5),
        ("log_sum_exp_logits", (22,), NAN),
        ("log_sum_exp_logits", (22,), -99.0),
    ],
)
def test_masked_positions_are_not_checked(field, position, value):
    stored = damaged(field, *position, value=value)
    stored["loss_mask"][22] = 0
    record, findings = checked(stored, strict=True)
    assert findings == Findings(mass_sum=findings.mass_sum, mass_count=22)
    for values in (record.topk_logits[22], record.topk_token_ids[22], record.log_sum_exp_logits[22], record.labels[22]):
        assert not values.any()
    assert record.tokens[22] == (0 if field == "tokens" else stored["tokens"][22])
    whole, _ = checked(make_record(3))
    for name in ("tokens", "labels", "topk_logits", "topk_token_ids", "log_sum_exp_logits"):
        np.testing.assert_array_equal(getattr(record, name)[:22], getattr(whole, name)[:22])


def test_a_masked_token_that_later_positions_read_must_be_in_the_vocabulary():
    stored = damaged("tokens", 5, value=VOCAB)
    stored["loss_mask"][5] = 0
    assert f"tokens[5] = {VOCAB}" in refusal(stored)
    stored["tokens"][0] = -1
    record, findings = checked(stored | {"loss_mask": [0] * 23})  # none is read
    assert record.tokens[0] == record.tokens[5] == 0
    assert findings == Findings()


def test_masks_may_hold_weights_if_declared():
    stored = damaged("loss_mask", 3, value=0.25)
    record, findings = checked(stored, weighted_mask=True)
    assert record.loss_mask[3] == 0.25
    assert record.topk_token_ids[3].tolist() == stored["topk_token_ids"][3]
    assert findings.mass_count == 23
    assert "loss_mask[3] = 1.5; it must be 0 or 1" in refusal(damaged("loss_mask", 3, value=1.5), weighted_mask=True)


def test_rows_are_sorted_with_their_ids():
    stored = damaged("topk_logits", 3, value=[-3.0, 0.0, -1.0, 0.0, -2.0])
    stored["topk_token_ids"][3] = [10, 11, 12, 13, 14]
    record, findings = checked(stored)
    assert record.topk_token_ids[3].tolist() == [11, 13, 12, 14, 10]
    assert record.topk_logits[3].tolist() == [0.0, 0.0, -1.0, -2.0, -3.0]
    assert findings.unsorted == 1
    cut, _ = checked(stored, top_k=2)
    assert cut.topk_token_ids[3].tolist() == [11, 13]
    assert cut.topk_logits.shape == (23, 2)
    assert cut.topk_logits.flags.c_contiguous
    assert cut.topk_token_ids.flags.c_contiguous
    message = refusal(stored, strict=True)
    for part in ("topk_logits[3]", "descending", "entry 0 is -3, entry 1 is 0", "data.strict"):
        assert part in message
    stored["topk_logits"][3] = [0.0, -0.5, -3.0, -1.0, 0.0]
    assert "topk_logits[3] is not in descending order (entry 2 is -3, entry 3 is -1)" in refusal(stored, strict=True)
    stored["topk_logits"][3], stored["topk_logits"][9] = [0.0, 0.0, -3.0, -1.0, -4.0], [-1.0, 0.0, -2.0, -3.0, -4.0]
    assert "topk_logits[3] is not in descending order (entry 2 is -3, entry 3 is -1)" in refusal(stored, strict=True)
    assert checked(stored)[1].unsorted == 2


def test_sorting_keeps_the_order_of_equals():
    stored = make_record(3, length=1, top_k=64, log_sum_exp_logits=...)
    stored["topk_logits"] = [[-1.0] * 63 + [0.0]]
    ids = stored["topk_token_ids"][0]
    assert checked(stored)[0].topk_token_ids[0].tolist() == [ids[63], *ids[:63]]


def test_duplicate_ids_are_merged_by_their_probability():
    stored = damaged("topk_logits", 3, value=[0.0, -0.5, -0.7, -1.0, -2.0])
    stored["topk_token_ids"][3] = [10, 11, 12, 11, 11]
    stored["topk_token_ids"][7] = [5, 6, 7, 8, 7]
    record, findings = checked(stored)
    merged = math.log(math.exp(-0.5) + math.exp(-1.0) + math.exp(-2.0))
    np.testing.assert_allclose(record.topk_logits[3, :3], [merged, 0.0, -0.7], rtol=1e-6)
    assert record.topk_token_ids[3].tolist() == [11, 10, 12, 0, 0]
    assert record.topk_logits[3, 3:].tolist() == [-INF, -INF]
    assert sorted(record.topk_token_ids[7].tolist()) == [0, 5, 6, 7, 8]
    assert findings.duplicates == 2
    message = refusal(stored, strict=True)
    for part in ("topk_token_ids[3]", "id 11 more than once", "data.strict"):
        assert part in message
    stored["topk_token_ids"][3] = [10, 11, 12, 13, 14]
    assert "topk_token_ids[7] has id 7 more than once" in refusal(stored, strict=True)


def test_merging_keeps_the_order_of_equals():
    record, _ = checked(with_rows([0.0] * 6) | {"topk_token_ids": [[9, 7, 9, 8, 5, 6]]})
    assert record.topk_token_ids[0].tolist() == [9, 5, 6, 7, 8, 0]


@pytest.mark.parametrize("logits", [[-1.0, 0.0], [0.0, -1.0]])
def test_repairs_leave_their_input_alone(logits):
    given = np.array([logits, [-3.0, -2.0]], np.float32), np.array([[7, 7], [5, 6]], np.int32)
    before = [array.copy() for array in given]
    sort_entries(*given, strict=False)
    _, _, count = merge_duplicates(*given, np.array([True, True]), strict=False)
    assert count == 1
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("present", range(1, 5))
def test_absent_entries_are_no_duplicates(present):
    row = [float(-k) for k in range(present)] + [-INF] * (5 - present)
    for first in range(5):
        stored = with_rows(row) | {"topk_token_ids": [[first + k for k in range(present)] + [first] * (5 - present)]}
        record, findings = checked(stored, strict=True)
        assert findings.duplicates == 0
        assert record.topk_token_ids[0, :present].tolist() == [first + k for k in range(present)]


def test_absent_entries_may_have_any_id():
    stored = damaged("topk_logits", 3, value=[0.0, -1.0, -INF, -INF, -INF])
    stored["topk_token_ids"][3] = [0, 7, 7, 0, 9999]
    record, findings = checked(stored, strict=True)
    assert record.topk_token_ids[3].tolist() == [0, 7, 0, 0, 0]
    assert record.topk_logits[3].tolist() == [0.0, -1.0, -INF, -INF, -INF]
    assert findings.duplicates == 0


def test_huge_raw_logits_survive():
    stored = make_record(3)
    stored["topk_logits"] = (np.array(stored["topk_logits"]) + 30000).tolist()
    stored["log_sum_exp_logits"] = (np.array(stored["log_sum_exp_logits"]) + 30000).tolist()
    record, findings = checked(stored)
    np.testing.assert_allclose(record.topk_logits, stored["topk_logits"], rtol=1e-7)
    assert 0 < findings.mass_sum < findings.mass_count == 23


def as_kind(kind: str) -> dict:
    """The record with its logits normalised, as log-probabilities or as probabilities."""
    stored = make_record(3)
    logs = np.array(stored["topk_logits"]) - np.array(stored["log_sum_exp_logits"])[:, None]
    return stored | {"topk_logits": (np.exp(logs) if kind == "probs" else logs).tolist(), "log_sum_exp_logits": None}


@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_normalised_kinds_become_logits_whose_logsumexp_is_0(kind):
    record, findings = checked(as_kind(kind), kind=kind, need_log_sum_exp=True)
    np.testing.assert_allclose(record.topk_logits, as_kind("log_probs")["topk_logits"], atol=2e-6)
    assert record.log_sum_exp_logits.tolist() == [0.0] * 23
    assert record.log_sum_exp_logits.dtype == np.float32
    assert findings.over_unity == 0
    assert findings.mass_count == 23


def test_logits_without_a_needed_logsumexp_are_refused():
    message = refusal(make_record(3, log_sum_exp_logits=None), need_log_sum_exp=True)
    assert "no field log_sum_exp_logits, which loss.tail = 'ghost' and 'label' need" in message


def test_a_probability_of_0_is_an_absent_entry():
    stored = as_kind("probs")
    stored["topk_logits"][3] = [0.5, 0.25, 0.0, 0.0, 0.0]
    record, _ = checked(stored, kind="probs")
    np.testing.assert_allclose(record.topk_logits[3], [math.log(0.5), math.log(0.25), -INF, -INF, -INF])
    stored["topk_logits"][3], stored["topk_token_ids"][3] = [0.5, 0.25], [7, 8]  # fewer than the other positions
    record, _ = checked(stored, kind="probs")
    np.testing.assert_allclose(record.topk_logits[3], [math.log(0.5), math.log(0.25), -INF, -INF, -INF])
    stored["topk_logits"][3], stored["topk_token_ids"][3] = [0.0] * 5, [1, 2, 3, 4, 5]
    assert "topk_logits[3] has no probability above 0 at an unmasked position" in refusal(stored, kind="probs")
    stored["topk_logits"][3] = [-0.5] * 5
    assert "topk_logits[3][0] = -0.5 is not a probability" in refusal(stored, kind="probs")
    stored["topk_logits"][3], stored["loss_mask"][3] = [-0.5, 7.0, 0.0, 0.0, 0.0], 0
    assert not checked(stored, kind="probs")[0].topk_logits[3].any()


@pytest.mark.parametrize(
    ("stored", "kind", "parts"),
    [
        (as_kind("probs"), "logits", ["looks like probabilities", "position 0 sums to 0.", "data.kind=probs"]),
        (as_kind("probs"), "log_probs", ["topk_logits[0], read as log-probabilities", "above 1", "data.kind=logits"]),
        (make_record(3), "log_probs", ["topk_logits[0], read as log-probabilities", "above 1", "data.kind=logits"]),
        (make_record(3), "probs", ["is not a probability", "data.kind=logits"]),
        (as_kind("log_probs"), "probs", ["is not a probability", "data.kind=log_probs"]),
        (damaged("log_sum_exp_logits", 3, value=-9.0), "logits", ["log_sum_exp_logits[3] = -9", "same amount"]),
        (with_rows([0.9, 0.6]), "probs", ["topk_logits[0], read as probabilities", "sums to 1.5, above 1"]),
        (with_rows([1.06, 0.0]), "probs", ["topk_logits[0][0] = 1.06 is not a probability"]),
        (with_rows([200.0, 0.0]), "log_probs", ["topk_logits[0], read as log-probabilities", "sums to inf, above 1"]),
    ],
)
def test_values_of_another_kind_than_declared(stored, kind, parts):
    message = refusal(stored, kind=kind)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("masked", [0, 1])
def test_a_sum_of_probabilities_may_exceed_1_by_rounding_only(masked):
    """By 5% (MASS_TOLERANCE), whatever the kind; positions before the first unmasked one do not count."""
    for row, fits in (([0.52] * 2, True), ([0.53] * 2, False), ([1.04, 0.0], True), ([1.06, 0.0], False)):
        for kind in ("probs", "log_probs"):
            values = row if kind == "probs" else [math.log(p) if p else -INF for p in row]
            stored = with_rows([9.0, 0.0], values) if masked else with_rows(values)
            stored["loss_mask"] = [0, 1] if masked else [1]
            if fits:
                assert checked(stored, kind=kind)[1].over_unity == 1
            else:
                assert f"topk_logits[{masked}]" in refusal(stored, kind=kind)


@pytest.mark.parametrize(
    ("rows", "is_refused"),
    [
        ([[0.52, 0.52, 0, 0]] * 2, True),  # sums to 1.04, as rounded probabilities may
        ([[0.53, 0.53, 0, 0]] * 2, False),
        ([[0.5, 0.5, 0, 0], [0.53, 0.53, 0, 0]], False),  # one row above 1 is enough
        ([[1.0, 0, 0, 0]] * 2, True),
        ([[1.01, 0, 0, 0]] * 2, False),
        ([[0.5, 0.25, 0, 0], [0.5, 0.25, 0, -0.01]], False),
        ([[0.5, 0.5, 0], [0.5, 0.5, 0, 0]], False),  # 7 entries may be chance
        ([[0.0, 0, 0, 0]] * 2, False),
        ([[0.5, 0.25, 0.1, 0, -INF]] * 2, True),
    ],
)
def test_logits_that_look_like_probabilities(rows, is_refused):
    if is_refused:
        assert "looks like probabilities" in refusal(with_rows(*rows))
    else:
        checked(with_rows(*rows))


def test_masked_positions_do_not_look_like_probabilities():
    stored = with_rows([9.0, 0, 0, 0, 0, 0, 0, 0], [0.5, 0.25, 0, 0, 0, 0, 0, 0]) | {"loss_mask": [0, 1]}
    assert "position 1 sums to 0.75" in refusal(stored)


@pytest.mark.parametrize(("excess", "fits"), [(0.45, True), (0.55, False)])
def test_how_far_the_entries_may_exceed_their_logsumexp(excess, fits):
    """By half (LSE_TOLERANCE) if the logsumexp is needed, else by any amount."""
    stored = with_rows([0.0, -1.0], lse=math.log((1 + math.exp(-1)) / (1 + excess)))
    if fits:
        assert checked(stored)[1].over_unity == 1
    else:
        assert f"topk_logits[0] sums to {1 + excess:.4g} times exp(log_sum_exp_logits[0] = " in refusal(stored)
    assert checked(stored, need_log_sum_exp=False)[1].over_unity == 1


@pytest.mark.parametrize(("excess", "counted"), [(-0.1, 0), (5e-6, 0), (2e-5, 1), (0.004, 1)])
def test_sums_above_1_are_counted_beyond_float32s_rounding(excess, counted):
    stored = with_rows([0.0], [0.0], lse=-math.log1p(excess)) | {"loss_mask": [1, 0]}
    _, findings = checked(stored)
    assert findings.over_unity == counted
    assert findings.mass_count == 1
    np.testing.assert_allclose(findings.mass_sum, 1 + excess, rtol=1e-6)


def test_the_mass_is_that_of_the_entries_used():
    stored = make_record(3)
    _, findings = checked(stored, top_k=2)
    logs = np.array(stored["topk_logits"])[:, :2] - np.array(stored["log_sum_exp_logits"])[:, None]
    np.testing.assert_allclose(findings.mass_sum, np.exp(logs).sum(), rtol=1e-5)


def test_findings_add_up():
    assert Findings(1, 2, 3, 0.5, 5) + Findings(10, 20, 30, 0.25, 50) == Findings(11, 22, 33, 0.75, 55)


def test_zeros_are_logits():
    stored = make_record(3, top_k=1)  # each position's maximum subtracted, and no other entry kept
    assert not np.any(stored["topk_logits"])
    assert checked(stored)[1].unsorted == 0


def test_ids_of_another_vocabulary_are_ignored(tmp_path):
    records = make_records(*[23] * 5)
    for record in records:
        record["topk_token_ids"] = [[100_000, -1, VOCAB, VOCAB - 1, VOCAB - 1]] * 23
    dataset = open_records(tmp_path, records, ignore_teacher_ids=True)
    assert dataset[0].topk_token_ids.tolist() == [[0, 0, 0, VOCAB - 1, VOCAB - 1]] * 23
    np.testing.assert_allclose(dataset[0].topk_logits, records[0]["topk_logits"], rtol=1e-6)
    assert not [text for text in dataset.summary() if "most likely token" in text]
    assert not dataset.warnings  # about ids that occur more than once
    with pytest.raises(UserError, match=r"a.jsonl, record 1: topk_token_ids\[0\]\[0\] = 100000"):
        open_records(tmp_path, records)


VALUES = st.floats(-50, 0, width=32)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_round_trip(data):
    """Whatever is valid comes back as it was written, in descending order, at unmasked positions."""
    length, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    ids = st.integers(0, VOCAB - 1)
    rows = [sorted(data.draw(st.lists(VALUES, min_size=top_k, max_size=top_k)), reverse=True) for _ in range(length)]
    stored = {
        "tokens": data.draw(st.lists(ids, min_size=length, max_size=length)),
        "labels": data.draw(st.lists(ids, min_size=length, max_size=length)),
        "loss_mask": data.draw(st.lists(st.sampled_from([0, 1, True, 0.0]), min_size=length, max_size=length)),
        "topk_logits": rows,
        "topk_token_ids": [
            data.draw(st.lists(ids, min_size=top_k, max_size=top_k, unique=True)) for _ in range(length)
        ],
        "index": data.draw(st.none() | st.integers(0, 2**40)),
    }
    record, findings = checked(json.loads(json.dumps(stored)), strict=True)
    live = np.array(stored["loss_mask"], bool)
    np.testing.assert_array_equal(record.loss_mask, live.astype(np.float32))
    np.testing.assert_array_equal(record.labels[live], np.array(stored["labels"])[live])
    np.testing.assert_array_equal(record.topk_logits[live], np.array(rows, np.float32)[live])
    np.testing.assert_array_equal(record.topk_token_ids[live], np.array(stored["topk_token_ids"])[live])
    if live.any():
        read = np.flatnonzero(live)[-1] + 1
        np.testing.assert_array_equal(record.tokens[:read], stored["tokens"][:read])
    assert record.index == stored["index"]
    assert findings == Findings()
    for field in dataclasses.fields(record)[:-1]:
        array = getattr(record, field.name)
        assert array is None or array.dtype in (np.int32, np.float32)
