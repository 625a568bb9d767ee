"""What a sample of the records says about the whole set: refused, warned about, or printed."""

import gzip
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from record_files import VOCAB, line, make_record, make_records, open_paths, open_records

from kdjax.data.checks import Findings
from kdjax.data.files import decompress
from kdjax.data.records import Record
from kdjax.data.survey import Survey, diagnose
from kdjax.types import UserError

MANY = make_records(*[29] * 20)


def refused(tmp_path, records, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        open_records(tmp_path, records, **knobs)
    return str(caught.value)


def warned(tmp_path, records, **knobs) -> str:
    (warning,) = open_records(tmp_path, records, **knobs).warnings
    return warning


def with_teacher_moved(shift: int) -> list[dict]:
    """Records whose teacher at t predicts labels[t + shift]."""
    moved = []
    for record in MANY:
        record = dict(record)
        for field in ("topk_logits", "topk_token_ids", "log_sum_exp_logits"):
            record[field] = np.roll(record[field], -shift, axis=0).tolist()
        moved.append(record)
    return moved


def agreement(shift: int, positions: range) -> float:
    """Share of the positions of MANY where the teacher's most likely token is the label at t + shift."""
    pairs = [(r["topk_token_ids"][t][0], r["labels"][t + shift]) for r in MANY for t in positions]
    return np.mean([token == label for token, label in pairs])


def test_a_good_set_gives_no_warning_and_a_full_summary(tmp_path):
    records = [record | {"loss_mask": [0] * 9 + [1] * 20} for record in MANY]
    dataset = open_records(tmp_path, records, top_k=3)
    assert dataset.warnings == ()
    here, before, after = agreement(0, range(9, 29)), agreement(-1, range(10, 29)), agreement(1, range(9, 28))
    mass = np.mean(
        [np.exp(np.array(r["topk_logits"])[9:, :3] - np.array(r["log_sum_exp_logits"])[9:, None]).sum(1) for r in MANY]
    )
    assert dataset.summary() == [
        "1 file, 20 records, 580 tokens",
        "the teacher's top 3 tokens at each position, stored as logits",
        "20 records checked: 69.0% of their positions are unmasked (loss_mask > 0)",
        f"the teacher's most likely token is the label at {here:.1%} of positions (alignment check: previous label "
        f"{before:.1%}, next label {after:.1%})",
        f"the top 3 tokens hold {mass:.1%} of the teacher's probability on average",
    ]
    bare = open_records(tmp_path, [make_record(0, log_sum_exp_logits=...)]).summary()
    assert bare[0] == "1 file, 1 record, 23 tokens"
    assert not [text for text in bare if "probability on average" in text]


def test_a_warning_is_shown_once_in_the_log(tmp_path, caplog):
    """Which the command line prints on stderr, and not again among the printed lines."""
    records = json.loads(json.dumps(MANY))
    records[0]["topk_logits"][3].reverse()
    dataset = open_records(tmp_path, records)
    (warning,) = dataset.warnings
    logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in logged] == [f"{tmp_path}/a.jsonl: {warning}"]
    assert not [text for text in dataset.summary() if "warning" in text or "descending" in text]


def test_a_set_without_any_unmasked_position_is_refused(tmp_path):
    message = refused(tmp_path, [record | {"loss_mask": [0] * 29} for record in MANY])
    assert "none of the 20 records checked" in message
    assert "loss_mask is 0" in message


def test_a_masked_record_among_others_is_kept(tmp_path):
    empty = {name: [[]] * 29 for name in ("topk_logits", "topk_token_ids")}
    dataset = open_records(tmp_path, [MANY[0] | {"loss_mask": [0] * 29} | empty, *MANY[1:]])
    assert len(dataset) == 20
    assert not dataset[0].loss_mask.any()
    assert dataset[0].topk_logits.shape == (29, 5)


def test_labels_that_are_not_the_next_token(tmp_path):
    for share, outcome in ((0.1, warned), (0.8, refused)):
        records = []
        for seed, record in enumerate(MANY):
            wrong = np.random.default_rng(seed).random(29) < share
            labels = np.where(wrong, (np.array(record["labels"]) + 1) % VOCAB, record["labels"])
            ids = [[(int(label) + k) % VOCAB for k in range(5)] for label in labels]
            records.append(record | {"labels": labels.tolist(), "topk_token_ids": ids})
        rate = np.mean([r["labels"][t] == r["tokens"][t + 1] for r in records for t in range(28)])
        assert f"only {rate:.1%} of the unmasked labels are the next token" in outcome(tmp_path, records)


def test_labels_are_compared_at_unmasked_positions_only(tmp_path):
    records = [r | {"labels": [5] * 14 + r["labels"][14:], "loss_mask": [0] * 14 + [1] * 15} for r in MANY]
    assert open_records(tmp_path, records).warnings == ()


def survey(**counts) -> Survey:
    """A survey of which nothing needs to be said, but for the given counts."""
    good = {"records": 2, "tokens": 900, "unmasked": 800, "followed": 790, "followable": 790, "largest_top_k": 5}
    return Survey(**(good | {"agreeing": (400, 9, 9), "comparable": (800, 700, 700)} | counts))


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ({}, None),
        ({"followed": 99, "followable": 100}, None),
        ({"followed": 98, "followable": 100}, "warning"),
        ({"followed": 50, "followable": 100}, "warning"),
        ({"followed": 49, "followable": 100}, "error"),
        ({"followed": 0, "followable": 16}, "error"),
        ({"followed": 0, "followable": 15}, None),  # too few to say
        ({"followed": 0, "followable": 0}, None),
    ],
)
def test_the_share_of_labels_that_follow(counts, outcome):
    if outcome == "error":
        with pytest.raises(UserError, match=r"labels must be the tokens shifted by one"):
            diagnose(survey(**counts), None, ignore_teacher_ids=False)
    else:
        warnings = diagnose(survey(**counts), None, ignore_teacher_ids=False)
        assert ["the others should be ends of turns" in text for text in warnings] == [True] * bool(outcome)


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        # At another shift: twice the agreement, and 10 points more, are a misalignment.
        ({"agreeing": (80, 9, 160), "comparable": (800, 800, 800)}, "error"),
        ({"agreeing": (80, 160, 9), "comparable": (800, 800, 800)}, "error"),
        ({"agreeing": (80, 9, 159), "comparable": (800, 800, 800)}, None),
        ({"agreeing": (40, 9, 119), "comparable": (800, 800, 800)}, None),
        ({"agreeing": (400, 9, 790), "comparable": (800, 800, 800)}, None),
        ({"agreeing": (0, 0, 100), "comparable": (100, 100, 100)}, "error"),
        ({"agreeing": (0, 0, 99), "comparable": (99, 99, 99)}, None),  # too few to say
        # Near chance at every shift.
        ({"agreeing": (15, 0, 0)}, "warning"),
        ({"agreeing": (16, 0, 0)}, None),
        ({"agreeing": (9, 0, 0), "comparable": (500, 400, 400)}, "warning"),
        ({"agreeing": (9, 0, 0), "comparable": (499, 600, 600)}, None),  # too few to say
    ],
)
def test_how_far_the_teacher_agrees_with_the_labels(counts, outcome):
    if outcome == "error":
        with pytest.raises(UserError, match=r"misaligned by one position"):
            diagnose(survey(**counts), None, ignore_teacher_ids=False)
    else:
        warnings = diagnose(survey(**counts), None, ignore_teacher_ids=False)
        assert ["misaligned, or assigned to the wrong records" in text for text in warnings] == [True] * bool(outcome)
    assert diagnose(survey(**counts), None, ignore_teacher_ids=True) == []


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_one_position_off_is_refused(tmp_path, shift):
    message = refused(tmp_path, with_teacher_moved(shift))
    assert f"labels[t {'+' if shift > 0 else '-'} 1]" in message
    assert "misaligned by one position" in message


def test_a_teacher_mixed_up_between_records_gives_a_warning(tmp_path):
    teacher = ("topk_logits", "topk_token_ids", "log_sum_exp_logits")
    mixed = [a | {field: b[field] for field in teacher} for a, b in zip(MANY, MANY[1:] + MANY[:1], strict=True)]
    # A larger vocabulary, so that few agree by chance.
    wide = [r | {"topk_token_ids": (np.array(r["topk_token_ids"]) + 1000).tolist()} for r in mixed]
    assert "assigned to the wrong records" in warned(tmp_path, wide, vocab_size=2000)


def test_agreement_counts_pairs_of_unmasked_positions():
    record = Record(
        tokens=np.array([9, 1, 2, 3]),
        labels=np.array([1, 2, 3, 4]),
        loss_mask=np.array([1.0, 1.0, 0.0, 0.5], np.float32),
        topk_logits=np.zeros((4, 1), np.float32),
        topk_token_ids=np.array([[1], [1], [3], [5]]),
    )
    one = Survey.of(record, Findings())
    assert (one.tokens, one.unmasked, one.followed, one.followable) == (4, 3, 2, 2)
    assert one.comparable == (3, 1, 1)
    assert one.agreeing == (1, 1, 0)
    assert one.agreement == (1 / 3, 1, 0)
    assert (one.smallest_top_k, one.largest_top_k, one.with_log_sum_exp) == (1, 1, 0)


def test_surveys_add_up():
    a = Survey(1, 2, 3, 4, 5, (6, 7, 8), (9, 10, 11), Findings(1), 3, 4, 0)
    b = Survey(10, 20, 30, 40, 50, (60, 70, 80), (90, 100, 110), Findings(10), 2, 7, 1)
    assert a + b == Survey(11, 22, 33, 44, 55, (66, 77, 88), (99, 110, 121), Findings(11), 2, 7, 1)
    assert Survey() + a == a + Survey() == a
    assert Survey() + Survey() == Survey()


def test_records_are_surveyed_evenly(tmp_path):
    records = [*MANY]
    records[10] = MANY[10] | {"loss_mask": [2] * 29}
    assert "a.jsonl, record 11: loss_mask[0] = 2" in refused(tmp_path, records)
    assert "record 11: " in refused(tmp_path, records, verify_records=3)  # the first, the middle and the last
    open_records(tmp_path, records, verify_records=2)  # the first and the last
    assert "1 record checked" in open_records(tmp_path, records, verify_records=0).summary()[2]  # at least one
    records[19] = MANY[19] | {"loss_mask": [2] * 29}
    assert "record 20" in refused(tmp_path, records, verify_records=2)
    assert "record 11" in refused(tmp_path, records, verify_records=-1)


def test_long_work_shows_its_progress(tmp_path, monkeypatch, capsys):
    """A line on stdout once it has taken two seconds; processes other than the first have no stdout."""
    clock = iter(range(10_000))
    monkeypatch.setattr("kdjax.cli.time", SimpleNamespace(monotonic=lambda: next(clock)))  # each look takes a second
    monkeypatch.setattr(decompress, "READ_BYTES", 1500)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"".join(map(line, MANY))))
    open_paths(tmp_path, tmp_path / "a.gz")
    printed, errors = capsys.readouterr()
    assert errors == ""
    (plain,) = (tmp_path / "scratch").glob("*.jsonl")
    two_lines = sum(len(line(record)) for record in MANY[:2])
    for start in (
        "decompressing a.gz 3.00k/",
        f"indexing {plain.name} {two_lines / 1000:.2f}k/",
        "checking records 2/20",
    ):
        first = next(text for text in printed.splitlines() if text.startswith(start.partition(" ")[0]))
        assert first.startswith(start)


def test_repaired_rows_are_reported(tmp_path):
    records = json.loads(json.dumps(MANY))
    records[0]["topk_logits"][3].reverse()
    assert warned(tmp_path, records) == (
        "1 of 580 unmasked positions checked were not in descending order and were sorted"
    )
    records = json.loads(json.dumps(MANY))
    records[0]["topk_token_ids"][3][1] = records[0]["topk_token_ids"][3][2]
    assert "1 of 580 unmasked positions checked had an id more than once" in warned(tmp_path, records)
    records = json.loads(json.dumps(MANY))
    records[0]["log_sum_exp_logits"][3] = np.log(np.exp(records[0]["topk_logits"][3]).sum()) - 0.01
    assert "1 of 580 unmasked positions checked sum to more than their logsumexp" in warned(tmp_path, records)


def test_top_k_larger_than_stored_is_refused():
    assert diagnose(survey(), 5, ignore_teacher_ids=False) == []
    with pytest.raises(UserError, match=r"data.top_k = 6, but the records have 5 .* at most 5"):
        diagnose(survey(), 6, ignore_teacher_ids=False)
