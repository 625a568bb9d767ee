"""Decoding one line, and holding it against vocabulary and configuration: every refusal names its place."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import VOCAB, config, line, make_record, make_records, open_records

from kdjax.config import DataConfig
from kdjax.data import RecordError, open_dataset
from kdjax.data.checks import Findings, Rules, check
from kdjax.data.records import decode
from kdjax.types import UserError

NAN, INF = math.nan, math.inf


def damaged(field: str, *position: int, value) -> dict:
    """A record with one value replaced, at a position or as a whole."""
    record = make_record(3)
    if not position:
        return record | {field: value}
    target = record[field]
    for step in position[:-1]:
        target = target[step]
    target[position[-1]] = value
    return record


def checked(record: dict, **knobs):
    rules = Rules(DataConfig(**knobs), VOCAB, need_log_sum_exp=record.get("log_sum_exp_logits") is not None)
    return check(decode(line(record), "F, record 12"), rules, "F, record 12")


def refusal(record, **knobs) -> str:
    with pytest.raises(RecordError) as caught:
        checked(record, **knobs) if isinstance(record, dict) else decode(record, "F, record 12")
    said = str(caught.value)
    assert said.startswith("F, record 12: ")
    assert said.count("F, record 12") == 1
    return said


def test_a_record_is_decoded_as_it_stands():
    stored = make_record(1, length=7, top_k=3, metadata={"a": [1]}, contexts="?", answers=None)
    record = decode(line(stored), "F")
    assert (len(record), record.top_k, record.index) == (7, 3, 1)
    for field in dataclasses.fields(record)[:-1]:
        array = getattr(record, field.name)
        assert array.dtype == (np.int32 if field.name in ("tokens", "labels", "topk_token_ids") else np.float32)
        np.testing.assert_allclose(array, np.array(stored[field.name]), rtol=1e-7)
    bare = decode(line(make_record(1, log_sum_exp_logits=None, index="x")), "F")
    assert bare.log_sum_exp_logits is None
    assert bare.index is None
    assert decode(line(make_record(1, log_sum_exp_logits=...)), "F").log_sum_exp_logits is None


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        (b"{nonsense}", ["not valid JSON", "write this line again"]),
        (b"\xff\xfe{", ["not valid JSON"]),
        (b"[1, 2]", ["[1, 2] is a list", "JSON object"]),
        (make_record(1, labels=..., loss_mask=...), ["no field labels, loss_mask", "tokens", "needs"]),
        (damaged("tokens", value="abc"), ["tokens = 'abc' is a str", "must be a list"]),
        (damaged("tokens", value=[]), ["tokens is empty", "at least one position"]),
        (damaged("tokens", value=[[1, 2]]), ["tokens[0] = [1, 2] is a list", "must be a number"]),
        (damaged("tokens", 4, value="17"), ["tokens[4] = '17' is a string", "not in quotes"]),
        (damaged("labels", 4, value=None), ["labels[4] = None is a null"]),
        (damaged("labels", 4, value=2.5), ["labels[4] = 2.5", "integer"]),
        (damaged("labels", 4, value=NAN), ["labels[4] = nan", "integer"]),
        (damaged("labels", 4, value=2**31), ["labels[4] = 2147483648", "32 bits"]),
        (damaged("tokens", 4, value=10**30), ["tokens[4] = 1000000", "beyond 64 bits"]),
        (damaged("topk_token_ids", 3, 2, value="5"), ["topk_token_ids[3][2] = '5' is a string"]),
        (damaged("topk_token_ids", 3, 2, value=2**40), ["topk_token_ids[3][2] = 1099511627776"]),
        (damaged("topk_token_ids", 3, 2, value=5.25), ["topk_token_ids[3][2] = 5.25"]),
        (damaged("topk_logits", 3, 2, value="-1.5"), ["topk_logits[3][2] = '-1.5' is a string"]),
        (damaged("topk_logits", 3, 2, value=[1]), ["topk_logits[3][2] = [1] is a list"]),
        (damaged("topk_logits", 3, value=0.5), ["topk_logits[3] = 0.5 is a float", "own list"]),
        (damaged("topk_logits", value=7), ["topk_logits = 7 is a int", "must be a list"]),
        (damaged("labels", value=[1] * 22), ["labels has 22 positions, tokens has 23"]),
        (damaged("loss_mask", value=[1] * 24), ["loss_mask has 24 positions, tokens has 23"]),
        (damaged("log_sum_exp_logits", value=[9.0]), ["log_sum_exp_logits has 1 positions"]),
        (damaged("topk_logits", value=[[0.0, -1.0]] * 22), ["is [22, 2] and topk_token_ids is [23, 5]"]),
        (
            damaged("topk_token_ids", 9, value=[1, 2, 3]),
            ["topk_logits is [23, 5] and topk_token_ids is [23, 3 to 5]", "position 9: 5 and 3 entries"],
        ),
    ],
)
def test_what_is_no_record_is_refused(record, parts):
    said = refusal(record)
    assert [part for part in parts if part not in said] == []


def test_top_k_fields_of_other_length_than_tokens():
    short = make_record(3, length=22)
    record = make_record(3) | {name: short[name] for name in ("topk_logits", "topk_token_ids")}
    assert "topk_logits has 22 positions, tokens has 23" in refusal(record)


def test_integral_floats_pass_as_ids():
    record, _ = checked(damaged("topk_token_ids", 3, value=[5.0, 6, 7.0, 8, 9]))
    assert record.topk_token_ids[3].tolist() == [5, 6, 7, 8, 9]


def test_ragged_positions_are_padded():
    stored = make_record(3)
    stored["topk_logits"][4], stored["topk_token_ids"][4] = [0.0, -2.5], [11, 12]
    record, _ = checked(stored)
    assert record.topk_logits[4].tolist() == [0.0, -2.5, -INF, -INF, -INF]
    assert record.topk_token_ids[4].tolist() == [11, 12, 0, 0, 0]
    np.testing.assert_allclose(record.topk_logits[5], stored["topk_logits"][5], rtol=1e-6)


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
        ("topk_logits", (3, 2), NAN, ["topk_logits[3][2] = nan", "data.max_bad_records"]),
        ("topk_logits", (3, 0), INF, ["topk_logits[3][0] = inf", "loss_mask is not 0"]),
        ("topk_logits", (3, 0), 1e39, ["topk_logits[3][0] = inf"]),
        ("topk_logits", (3,), [-INF] * 5, ["topk_logits[3] = [-inf", "no finite entry", "mask the position"]),
        ("log_sum_exp_logits", (3,), NAN, ["log_sum_exp_logits[3] = nan"]),
        ("loss_mask", (3,), 2, ["loss_mask[3] = 2", "0 or 1"]),
        ("loss_mask", (3,), -1, ["loss_mask[3] = -1", "0 or 1"]),
        ("loss_mask", (3,), NAN, ["loss_mask[3] = nan"]),
        ("loss_mask", (3,), 0.5, ["loss_mask[3] = 0.5", "data.weighted_mask=True"]),
    ],
)
def test_values_that_cannot_be_trained_on(field, position, value, parts):
    said = refusal(damaged(field, *position, value=value))
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize(
    ("field", "position", "value"),
    [
        ("topk_token_ids", (22, 2), VOCAB),
        ("topk_token_ids", (22, 2), -1),
        ("topk_token_ids", (22, 2), 2**31 - 1),
        ("labels", (22,), -100),
        ("tokens", (22,), -1),
        ("topk_logits", (22, 2), NAN),
        ("topk_logits", (22, 2), INF),
        ("topk_logits", (22,), [-INF] * 5),
        ("log_sum_exp_logits", (22,), NAN),
    ],
)
def test_what_is_masked_does_no_harm(field, position, value):
    stored = damaged(field, *position, value=value)
    stored["loss_mask"][22] = 0
    record, findings = checked(stored)
    assert findings == dataclasses.replace(findings, unsorted=0, repeated=0, weighed=22)
    for values in (record.topk_logits[22], record.log_sum_exp_logits[22]):
        assert np.isfinite(values).all()
    for ids in (record.topk_token_ids, record.labels, record.tokens):
        assert ((ids >= 0) & (ids < VOCAB)).all()
    whole, _ = checked(make_record(3))
    np.testing.assert_array_equal(record.topk_logits[:22], whole.topk_logits[:22])
    np.testing.assert_array_equal(record.labels[:22], whole.labels[:22])


def test_a_masked_token_that_later_positions_read_must_be_in_the_vocabulary():
    stored = damaged("tokens", 5, value=VOCAB)
    stored["loss_mask"][5] = 0
    assert f"tokens[5] = {VOCAB}" in refusal(stored)


def test_masks_may_be_booleans_and_weights_if_so_declared():
    record, _ = checked(damaged("loss_mask", value=[True] * 20 + [False] * 3))
    assert record.loss_mask.tolist() == [1.0] * 20 + [0.0] * 3
    stored = damaged("loss_mask", 3, value=0.25)
    record, findings = checked(stored, weighted_mask=True)
    assert record.loss_mask[3] == 0.25
    assert record.topk_token_ids[3].tolist() == stored["topk_token_ids"][3]
    assert findings.weighed == 23


def test_rows_are_sorted_with_their_ids():
    stored = damaged("topk_logits", 3, value=[-3.0, 0.0, -1.0, 0.0, -2.0])
    stored["topk_token_ids"][3] = [10, 11, 12, 13, 14]
    record, findings = checked(stored)
    assert record.topk_token_ids[3].tolist() == [11, 13, 12, 14, 10]
    assert record.topk_logits[3].tolist() == [0.0, 0.0, -1.0, -2.0, -3.0]
    assert findings.unsorted == 1
    assert checked(stored, top_k=2)[0].topk_token_ids[3].tolist() == [11, 13]
    said = refusal(stored, strict=True)
    for part in ("topk_logits[3]", "descending", "entry 0 is -3, entry 1 is 0", "data.strict"):
        assert part in said


def test_sorting_keeps_the_order_of_equals():
    stored = make_record(3, length=1, top_k=64, log_sum_exp_logits=...)
    stored["topk_logits"] = [[-1.0] * 63 + [0.0]]
    ids = stored["topk_token_ids"][0]
    assert checked(stored)[0].topk_token_ids[0].tolist() == [ids[63], *ids[:63]]


def test_repeated_ids_are_merged_by_their_probability():
    stored = damaged("topk_logits", 3, value=[0.0, -0.5, -0.7, -1.0, -2.0])
    stored["topk_token_ids"][3] = [10, 11, 12, 11, 11]
    record, findings = checked(stored)
    merged = math.log(math.exp(-0.5) + math.exp(-1.0) + math.exp(-2.0))
    np.testing.assert_allclose(record.topk_logits[3, :3], [merged, 0.0, -0.7], rtol=1e-6)
    assert record.topk_token_ids[3].tolist() == [11, 10, 12, 0, 0]
    assert record.topk_logits[3, 3:].tolist() == [-INF, -INF]
    assert findings.repeated == 1
    said = refusal(stored, strict=True)
    for part in ("topk_token_ids[3]", "id 11 twice", "data.strict"):
        assert part in said


def test_absent_entries_may_repeat_an_id_and_name_any():
    stored = damaged("topk_logits", 3, value=[0.0, -1.0, -INF, -INF, -INF])
    stored["topk_token_ids"][3] = [0, 7, 7, 0, 9999]
    record, findings = checked(stored, strict=True)
    assert record.topk_token_ids[3].tolist() == [0, 7, 0, 0, 0]
    assert findings.repeated == 0


def test_huge_raw_logits_survive():
    stored = make_record(3)
    stored["topk_logits"] = (np.array(stored["topk_logits"]) + 30000).tolist()
    stored["log_sum_exp_logits"] = (np.array(stored["log_sum_exp_logits"]) + 30000).tolist()
    record, findings = checked(stored)
    np.testing.assert_allclose(record.topk_logits, stored["topk_logits"], rtol=1e-7)
    assert 0 < findings.mass < findings.weighed == 23


def as_kind(kind: str) -> dict:
    """The record with its logits normalised, as log-probabilities or as probabilities."""
    stored = make_record(3)
    logs = np.array(stored["topk_logits"]) - np.array(stored["log_sum_exp_logits"])[:, None]
    return stored | {"topk_logits": (np.exp(logs) if kind == "probs" else logs).tolist(), "log_sum_exp_logits": None}


@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_normalised_kinds_become_logits_whose_logsumexp_is_0(kind):
    record, findings = checked(as_kind(kind), kind=kind)
    np.testing.assert_allclose(record.topk_logits, as_kind("log_probs")["topk_logits"], atol=2e-6)
    assert record.log_sum_exp_logits.tolist() == [0.0] * 23
    assert findings.over_unity == 0


def test_a_probability_of_0_is_an_absent_entry():
    stored = as_kind("probs")
    stored["topk_logits"][3] = [0.5, 0.25, 0.0, 0.0, 0.0]
    record, _ = checked(stored, kind="probs")
    np.testing.assert_allclose(record.topk_logits[3], [math.log(0.5), math.log(0.25), -INF, -INF, -INF])
    stored["topk_logits"][3] = [0.0] * 5
    assert "topk_logits[3] holds no probability above 0" in refusal(stored, kind="probs")


@pytest.mark.parametrize(
    ("stored", "kind", "parts"),
    [
        (as_kind("probs"), "logits", ["looks like probabilities", "data.kind=probs"]),
        (as_kind("probs"), "log_probs", ["topk_logits[0]", "log-probabilities", "above 1", "data.kind=logits"]),
        (make_record(3), "log_probs", ["topk_logits[0]", "log-probabilities", "above 1", "data.kind=logits"]),
        (make_record(3), "probs", ["no probability", "data.kind=logits"]),
        (as_kind("log_probs"), "probs", ["no probability", "data.kind=log_probs"]),
        (damaged("log_sum_exp_logits", 3, value=-9.0), "logits", ["log_sum_exp_logits[3] = -9", "shifted alike"]),
    ],
)
def test_values_of_another_kind_than_declared(stored, kind, parts):
    said = refusal(stored, kind=kind)
    assert [part for part in parts if part not in said] == []


def test_a_logsumexp_that_is_not_needed_may_be_anothers():
    stored = damaged("log_sum_exp_logits", 3, value=-9.0)
    _, findings = check(decode(line(stored), "F"), Rules(DataConfig(), VOCAB), "F")
    assert findings.over_unity == 1


def test_zeros_are_logits():
    stored = make_record(3, top_k=1)  # each position's maximum subtracted, and nothing else kept
    assert not np.any(stored["topk_logits"])
    assert checked(stored)[1].unsorted == 0


def test_sums_above_1_from_rounding_are_counted():
    stored = make_record(3)
    top = np.array(stored["topk_logits"][4])
    stored["log_sum_exp_logits"][4] = math.log(np.exp(top).sum()) - 0.004  # as float16 may round it
    _, findings = checked(stored)
    assert findings.over_unity == 1
    mass = np.exp(np.array(stored["topk_logits"]) - np.array(stored["log_sum_exp_logits"])[:, None]).sum()
    np.testing.assert_allclose(findings.mass, mass, rtol=1e-5)


def test_another_vocabularys_ids_are_not_looked_at(tmp_path):
    records = make_records(*[23] * 5)
    for record in records:
        record["topk_token_ids"] = [[100_000 + k for k in range(5)]] * 23
    dataset = open_records(tmp_path, records, ignore_teacher_ids=True)
    assert not dataset[0].topk_token_ids.any()
    np.testing.assert_allclose(dataset[0].topk_logits, records[0]["topk_logits"], rtol=1e-6)
    with pytest.raises(UserError, match=r"a.jsonl, record 1: topk_token_ids\[0\]\[0\] = 100000"):
        open_records(tmp_path, records)


def test_an_error_names_file_record_and_line(tmp_path):
    records = make_records(7, 7, 7)
    records[2]["labels"][1] = 999
    (tmp_path / "b.jsonl").write_bytes(b"\n" + b"".join(map(line, records)))
    with pytest.raises(UserError) as caught:
        open_dataset((str(tmp_path / "b.jsonl"),), config(tmp_path), vocab_size=VOCAB)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/b.jsonl, record 3 (line 4): labels[1] = 999 ")


VALUES = st.floats(-50, 0, width=32)


@settings(max_examples=60, deadline=None)
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
