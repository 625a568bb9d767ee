"""vLLM's prompt_logprobs and Axolotl's columns."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import VOCAB, run_import, sequence, sequences, stored, vllm_prompt, write_lines

from kdjax.cache.__main__ import main
from kdjax.types import UserError

K = 5


def import_vllm(tmp_path: Path, records: list[Any], **flags: Any) -> Any:
    path = write_lines(tmp_path / "prompts.jsonl", records)
    return run_import(tmp_path / "cache", path, vocab_size=VOCAB, lossless=True, **flags)


def test_entry_i_is_about_token_i(tmp_path: Path) -> None:
    given = sequences(23, 1, 17)
    cache = import_vllm(tmp_path, [vllm_prompt(each, K) for each in given])
    assert cache.manifest.target_logits_scales == (1.0,)
    assert cache.manifest.has_label_log_probs
    for record, each in zip(stored(cache), given, strict=True):
        ids, values = each.top(K)
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.labels, each.ids[1:])
        np.testing.assert_array_equal(record.ids[:, :K], ids)
        np.testing.assert_array_equal(record.log_probs[:, :K], values.astype(np.float32))
        np.testing.assert_array_equal(record.log_sums, np.zeros((1, len(ids))))
        # The codes of quantise.py: half a step of sqrt(p) at most, or of p above 1/16, or of log p below 2^-14.
        np.testing.assert_allclose(np.exp(record.label_log_probs), np.exp(each.label_log_probs), atol=1 / 512 + 1e-6)


def test_a_label_beyond_the_top_k_is_no_entry(tmp_path: Path) -> None:
    """Of rank K + 1 it is one: it is the next most likely. Of a later rank it is only the label's log-probability."""
    given = sequence(3, 200)
    cache = import_vllm(tmp_path, [vllm_prompt(given, K)])
    (record,) = stored(cache)
    ranks = (given.log_probs > given.label_log_probs[:, None]).sum(axis=1) + 1
    assert (ranks > K + 1).any()
    assert (ranks == K + 1).any()
    present = record.log_probs > -np.inf
    np.testing.assert_array_equal(present.sum(axis=1), np.where(ranks == K + 1, K + 1, K))
    beyond = ranks > K + 1
    assert not (record.ids[beyond] == given.ids[1:][beyond, None])[present[beyond]].any()
    assert np.isfinite(record.label_log_probs).all()


def test_numbers_instead_of_objects(tmp_path: Path) -> None:
    """Without ranks, the label's entry is one like the others: its log-probability is known all the same."""
    given = sequence(4, 40)
    (record,) = stored(import_vllm(tmp_path, [vllm_prompt(given, K, detailed=False)]))
    in_top = (given.top(K)[0] == given.ids[1:, None]).any(axis=1)
    np.testing.assert_array_equal((record.log_probs > -np.inf).sum(axis=1), np.where(in_top, K, K + 1))


def test_answers_of_a_server(tmp_path: Path) -> None:
    """Prompts are in the answer or in each of its choices; several choices for one prompt are one record."""
    a, b = sequences(11, 13)
    answers = [
        {"id": "1", "object": "chat.completion", "choices": [{"index": 0}], **vllm_prompt(a, K)},
        {"id": "2", "choices": [{"index": i, "text": "", **vllm_prompt(each, K)} for i, each in enumerate((a, a, b))]},
    ]
    cache = import_vllm(tmp_path, answers)
    assert [len(record) for record in stored(cache)] == [11, 11, 13]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("prompt_token_ids"), r"record 1: no field prompt_token_ids.*return_token_ids"),
        (lambda r: r["prompt_logprobs"].pop(), r"prompt_logprobs has 23 entries, and prompt_token_ids 24 tokens"),
        (lambda r: r["prompt_logprobs"].__setitem__(7, None), r"prompt_logprobs\[7\] = None; .*prefix-caching"),
        (lambda r: r["prompt_logprobs"][7].update({"x": 1.0}), r"prompt_logprobs\[7\] has the key 'x'"),
        (
            lambda r: r["prompt_logprobs"][7].update({"5": "-1"}),
            r"prompt_logprobs\[7\]\['5'\] = '-1'; it must be a num",
        ),
        (lambda r: r["prompt_logprobs"][7].update({"5": math.nan}), r"= nan at an unmasked position"),
        (lambda r: r["prompt_logprobs"][7].update({"97": -0.5}), r"topk_token_ids\[6\]\[\d\] = 97 is outside"),
        (lambda r: r["prompt_logprobs"][7].update({"-3": -0.5}), r"topk_token_ids\[6\]\[\d\] = -3 is outside"),
        (lambda r: r["prompt_logprobs"][7].update({"5": 3.0}), r"topk_logits\[6\].*sums to .*, above 1"),
        (lambda r: r["prompt_token_ids"].__setitem__(4, 97), r"labels\[3\] = 97 is outside|tokens\[4\] = 97"),
        (lambda r: r["prompt_token_ids"].__setitem__(4, 1.5), r"prompt_token_ids must be a list of token ids"),
        (lambda r: r["prompt_token_ids"].__setitem__(4, 2**40), r"prompt_token_ids holds the id 1099511627776"),
    ],
)
def test_damaged_records(tmp_path: Path, damage: Any, message: str) -> None:
    record = vllm_prompt(sequence(0), K)
    damage(record)
    with pytest.raises(UserError, match=message):
        import_vllm(tmp_path, [record, vllm_prompt(sequence(1), K)], format="vllm")
    assert not (tmp_path / "cache").exists()


def test_one_damaged_record_may_be_left_out(tmp_path: Path) -> None:
    bad = vllm_prompt(sequence(0), K)
    bad["prompt_logprobs"][7] = None
    cache = import_vllm(tmp_path, [vllm_prompt(sequence(1), K), bad], max_bad_records=1)
    assert [bool(record.loss_mask.any()) for record in stored(cache)] == [True, False]


def test_verify_finds_nothing_wrong(tmp_path: Path) -> None:
    """Positions with fewer entries, and labels whose log-probabilities are known, are as they should be."""
    cache = import_vllm(tmp_path, [vllm_prompt(sequence(seed, 60), K) for seed in range(5)])
    assert main(["verify", str(cache.path)]) == 0


def test_a_wrong_shift_is_refused(tmp_path: Path) -> None:
    """As when every row is about the token after its own."""
    records = [vllm_prompt(sequence(seed, 50), K) for seed in range(6)]
    for record in records:
        rows = record["prompt_logprobs"]
        record["prompt_logprobs"] = [None, *rows[2:], rows[1]]
    with pytest.raises(UserError, match="misaligned by one position"):
        import_vllm(tmp_path, records)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    text = "".join(json.dumps(vllm_prompt(each, K)) + "\n" for each in sequences(11, 13))
    path = tmp_path / "a.jsonl"
    path.write_text(text[:-40])
    with pytest.raises(UserError, match=r"a.jsonl: ends in the middle of line 2, after 1 complete"):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)


def test_the_vocabulary_must_be_given(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [vllm_prompt(sequence(0), K)])
    with pytest.raises(UserError, match="--vocab-size"):
        run_import(tmp_path / "cache", path)
    with pytest.raises(UserError, match="--kind probs: vLLM writes log_probs"):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB, kind="probs")


def axolotl_row(seed: int, length: int = 23, prompt: int = 4) -> tuple[dict[str, Any], Any]:
    """Row j is about token j + 1; the last describes no token, and where nothing is learned the mask is 0."""
    given = sequence(seed, length)
    ids, values = given.top(K)
    values = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    labels = [-100] * prompt + given.ids[prompt:].tolist()
    mask = [[0 if label == -100 else 1] * K for label in labels[1:]] + [[0] * K]
    row = {
        "input_ids": given.ids.tolist(),
        "labels": labels,
        "target_token_ids": [*ids.tolist(), [0] * K],
        "target_logprobs": [*values.tolist(), [-1e9] * K],
        "target_mask": mask,
    }
    return row, given


def test_axolotls_columns(tmp_path: Path) -> None:
    rows = [axolotl_row(seed) for seed in range(3)]
    cache = import_vllm(tmp_path, [row for row, _ in rows])
    assert cache.manifest.target_logits_scales == ()  # renormalised: the rest of the vocabulary is unknown
    for record, (row, given) in zip(stored(cache), rows, strict=True):
        np.testing.assert_array_equal(record.loss_mask, [0, 0, 0] + [1] * 20)
        np.testing.assert_array_equal(record.tokens, given.ids[:-1])
        np.testing.assert_array_equal(record.labels[3:], given.ids[4:])
        np.testing.assert_array_equal(record.log_probs[3:], np.float32(row["target_logprobs"])[3:-1])
        np.testing.assert_array_equal(record.ids[3:], row["target_token_ids"][3:-1])


def test_axolotls_columns_must_match(tmp_path: Path) -> None:
    row, _ = axolotl_row(0)
    row["target_mask"].pop()
    with pytest.raises(UserError, match=r"record 1: input_ids has 24 tokens, .*'target_mask': \(23, 5\)"):
        import_vllm(tmp_path, [row])
    with pytest.raises(UserError, match=r"no field target_mask"):
        import_vllm(tmp_path, [{name: value for name, value in row.items() if name != "target_mask"}])
