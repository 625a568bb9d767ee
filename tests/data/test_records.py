"""Decoding one line: what is accepted, and that every refusal names its place."""

import dataclasses
import math

import numpy as np
import pytest
from record_files import damaged, line, make_record

from kdjax.data import RecordError
from kdjax.data.records import decode

NAN, INF = math.nan, math.inf


def refusal(record: bytes | dict) -> str:
    with pytest.raises(RecordError) as caught:
        decode(record if isinstance(record, bytes) else line(record), "F, record 12")
    message = str(caught.value)
    assert message.startswith("F, record 12: ")
    assert message.count("F, record 12") == 1
    return message.removeprefix("F, record 12: ")


def test_a_record_is_decoded_as_stored():
    stored = make_record(1, length=7, top_k=3, metadata={"a": [1]}, contexts="?", answers=None)
    record = decode(line(stored), "F")
    assert (len(record), record.top_k, record.index) == (7, 3, 1)
    assert record.topk_weights is None  # of caches only
    for field in dataclasses.fields(record)[:-2]:
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
        (b"{nonsense}", ["not valid JSON (Expecting property name", "generate this line again or remove it"]),
        (b"\xff\xfe{", ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b"[1, 2]", ["[1, 2] is a list", "JSON object"]),
        (
            b"{}",
            ["no field tokens, labels, loss_mask, topk_logits, topk_token_ids; this line has none, a record needs"],
        ),
        (
            make_record(1, labels=..., loss_mask=...),
            ["no field labels, loss_mask; this line has tokens, topk_logits, topk_token_ids, log_sum_exp_logits, in"],
        ),
        (damaged("tokens", value="abc"), ["tokens = 'abc' is a str; it must be a list"]),
        (damaged("tokens", value=[]), ["tokens is empty", "at least one position"]),
        (damaged("tokens", value=[[1, 2]]), ["tokens[0] = [1, 2] is a list", "must be a number"]),
        (damaged("tokens", 4, value="17"), ["tokens[4] = '17' is a string; it must be a number, not in quotes"]),
        (damaged("labels", 4, value=None), ["labels[4] = None is a null"]),
        (damaged("labels", 4, value={"a": 1}), ["labels[4] = {'a': 1} is a object"]),
        (damaged("labels", value=[True] * 23), ["labels[0] = True is a boolean"]),
        (damaged("log_sum_exp_logits", value=[True] * 23), ["log_sum_exp_logits[0] = True is a boolean"]),
        (damaged("labels", 4, value=2.5), ["labels[4] = 2.5; it must be a 32-bit integer"]),
        (damaged("labels", 4, value=NAN), ["labels[4] = nan; it must be a 32-bit integer"]),
        (damaged("labels", 4, value=2**31), ["labels[4] = 2147483648; it must be a 32-bit integer"]),
        (damaged("labels", 4, value=-(2**31) - 1), ["labels[4] = -2147483649; it must be a 32-bit integer"]),
        (damaged("tokens", 4, value=10**30), ["tokens[4] = 1000000", "does not fit in 64 bits"]),
        (damaged("tokens", value=[2**63 - 1, -(2**63), 10**30]), ["tokens[2] = 1000000", "does not fit in 64 bits"]),
        (damaged("tokens", value=[0, 2**63, 10**30]), ["tokens[1] = 9223372036854775808 does not fit"]),
        (damaged("tokens", value=[0, -(2**63) - 1, 10**30]), ["tokens[1] = -9223372036854775809 does not fit"]),
        (damaged("topk_token_ids", 3, 2, value="5"), ["topk_token_ids[3][2] = '5' is a string"]),
        (damaged("topk_token_ids", 3, 2, value=2**40), ["topk_token_ids[3][2] = 1099511627776;"]),
        (damaged("topk_token_ids", 3, 2, value=5.25), ["topk_token_ids[3][2] = 5.25;"]),
        (damaged("topk_logits", 3, 2, value="-1.5"), ["topk_logits[3][2] = '-1.5' is a string"]),
        (damaged("topk_logits", 3, 2, value=[1]), ["topk_logits[3][2] = [1] is a list"]),
        (damaged("topk_logits", 3, value=[1e300, "x", 0, 0, 0]), ["topk_logits[3][1] = 'x' is a string"]),
        (damaged("topk_logits", 3, value=0.5), ["topk_logits[3] = 0.5 is a float", "must be a list of the teacher's"]),
        (damaged("topk_logits", value=7), ["topk_logits = 7 is a int; it must be a list"]),
        (damaged("labels", value=7), ["labels = 7 is a int; it must be a list"]),
        (damaged("labels", value=[1] * 22), ["labels has 22 positions, tokens has 23"]),
        (damaged("loss_mask", value=[1] * 24), ["loss_mask has 24 positions, tokens has 23"]),
        (damaged("log_sum_exp_logits", value=[9.0]), ["log_sum_exp_logits has 1 positions"]),
        (
            damaged("topk_logits", value=[[0.0, -1.0]] * 22),
            ["is [22, 2] and topk_token_ids is [23, 5] (first at position 0: 2 and 5 entries); each logit needs"],
        ),
        (
            damaged("topk_logits", value=make_record(3)["topk_logits"][:22]),
            ["is [22, 5] and topk_token_ids is [23, 5];"],
        ),
        (damaged("topk_logits", value=[]), ["topk_logits is [0, 0] and topk_token_ids is [23, 5]"]),
        (
            damaged("topk_token_ids", 9, value=[1, 2, 3]),
            ["topk_logits is [23, 5] and topk_token_ids is [23, 3 to 5] (first at position 9: 5 and 3 entries)"],
        ),
        (make_record(3) | {"topk_logits": [], "topk_token_ids": []}, ["topk_logits has 0 positions, tokens has 23"]),
    ],
)
def test_invalid_lines_are_refused(record, parts):
    message = refusal(record)
    assert [part for part in parts if part not in message] == []


def test_top_k_fields_shorter_than_tokens():
    short = make_record(3, length=22)
    record = make_record(3) | {name: short[name] for name in ("topk_logits", "topk_token_ids")}
    assert "topk_logits has 22 positions, tokens has 23" in refusal(record)


def test_long_values_are_cut_in_errors():
    assert refusal(damaged("tokens", value="x" * 58)).startswith(f"tokens = '{'x' * 58}' is a str")  # 60 with quotes
    assert refusal(damaged("tokens", value="x" * 59)).startswith(f"tokens = '{'x' * 59}... is a str")


def test_ids_may_be_any_32_bit_integer_here():
    record = decode(line(damaged("topk_token_ids", 3, value=[2**31 - 1, -(2**31), 0, 8.0, -1.0])), "F")
    assert record.topk_token_ids[3].tolist() == [2**31 - 1, -(2**31), 0, 8, -1]


def test_logits_beyond_float32_become_infinite():
    record = decode(line(damaged("topk_logits", 3, value=[1e39, -1e39, 0, 1, NAN])), "F")
    np.testing.assert_array_equal(record.topk_logits[3], [INF, -INF, 0, 1, NAN])


def test_masks_may_be_booleans():
    record = decode(line(damaged("loss_mask", value=[True] * 20 + [False] * 3)), "F")
    assert record.loss_mask.tolist() == [1.0] * 20 + [0.0] * 3
    assert refusal(damaged("loss_mask", 2, value="1")).startswith("loss_mask[2] = '1' is a string")


def test_positions_with_few_entries_are_padded():
    stored = make_record(3)
    stored["topk_logits"][4], stored["topk_token_ids"][4] = [0.0, -2.5], [11, 12]
    record = decode(line(stored), "F")
    assert record.topk_logits[4].tolist() == [0.0, -2.5, -INF, -INF, -INF]
    assert record.topk_token_ids[4].tolist() == [11, 12, 0, 0, 0]
    np.testing.assert_allclose(record.topk_logits[5], stored["topk_logits"][5], rtol=1e-6)


@pytest.mark.parametrize("length", [1, 22, 23, 24])
def test_truncation_cuts_every_array(length):
    whole = decode(line(make_record(3)), "F")
    cut = whole.truncated(length)
    assert len(cut) == min(length, 23)
    assert cut.index == 3
    assert (cut is whole) == (length >= 23)
    for field in dataclasses.fields(whole)[:-2]:
        np.testing.assert_array_equal(getattr(cut, field.name), getattr(whole, field.name)[:length])
    assert decode(line(make_record(3, log_sum_exp_logits=...)), "F").truncated(length).log_sum_exp_logits is None
