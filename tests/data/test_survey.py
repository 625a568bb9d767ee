"""What a sample says about the whole set, manifests, and damage met within and beyond its allowance."""

import json
import threading

import numpy as np
import pytest
from record_files import VOCAB, config, line, make_record, make_records, open_records, write

from kdjax.data import open_dataset, train_batches
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
    """Records whose teacher at t speaks of labels[t + shift]."""
    moved = []
    for record in MANY:
        record = dict(record)
        for field in ("topk_logits", "topk_token_ids", "log_sum_exp_logits"):
            record[field] = np.roll(record[field], -shift, axis=0).tolist()
        moved.append(record)
    return moved


def test_a_good_set_gives_no_warning_and_a_full_summary(tmp_path):
    records = [record | {"loss_mask": [0] * 9 + [1] * 20} for record in MANY]
    dataset = open_records(tmp_path, records, top_k=3)
    assert dataset.warnings == ()
    said = "\n".join(dataset.summary())
    for part in ("1 file(s), 20 records, 580 tokens", "69.0% of tokens unmasked", "top-k 3", "kind logits"):
        assert part in said
    agreement = np.mean([r["topk_token_ids"][t][0] == r["labels"][t] for r in MANY for t in range(9, 29)])
    assert f"is the label at {agreement:.1%} of positions" in said
    mass = np.mean(
        [np.exp(np.array(r["topk_logits"])[9:, :3] - np.array(r["log_sum_exp_logits"])[9:, None]).sum(1) for r in MANY]
    )
    assert f"top-3 holds {mass:.1%} of the teacher's probability" in said


def test_a_set_without_any_unmasked_position_is_refused(tmp_path):
    said = refused(tmp_path, [record | {"loss_mask": [0] * 29} for record in MANY])
    assert "none of the 20 records checked" in said
    assert "loss_mask is 0" in said


def test_a_masked_record_among_others_is_kept(tmp_path):
    dataset = open_records(tmp_path, [MANY[0] | {"loss_mask": [0] * 29}, *MANY[1:]])
    assert len(dataset) == 20
    assert not dataset[0].loss_mask.any()


@pytest.mark.parametrize(("share", "outcome"), [(0.1, "warning"), (0.8, "error")])
def test_labels_that_are_not_the_next_token(tmp_path, share, outcome):
    records = []
    for seed, record in enumerate(MANY):
        wrong = np.random.default_rng(seed).random(29) < share
        labels = np.where(wrong, (np.array(record["labels"]) + 1) % VOCAB, record["labels"])
        records.append(record | {"labels": labels.tolist(), "topk_token_ids": make_ids(labels)})
    said = (refused if outcome == "error" else warned)(tmp_path, records)
    rate = np.mean([r["labels"][t] == r["tokens"][t + 1] for r in records for t in range(28)])
    assert f"only {rate:.1%} of the unmasked labels are the next token" in said


def make_ids(labels) -> list[list[int]]:
    return [[(int(label) + k) % VOCAB for k in range(5)] for label in labels]


def test_labels_are_compared_at_unmasked_positions_only(tmp_path):
    records = [r | {"labels": [5] * 14 + r["labels"][14:], "loss_mask": [0] * 14 + [1] * 15} for r in MANY]
    assert open_records(tmp_path, records).warnings == ()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_one_position_off_is_refused(tmp_path, shift):
    said = refused(tmp_path, with_teacher_moved(shift))
    assert f"labels[t {'+' if shift > 0 else '-'} 1]" in said
    assert "misaligned by one position" in said


def test_a_teacher_scrambled_between_records_raises_the_alarm(tmp_path):
    teacher = ("topk_logits", "topk_token_ids", "log_sum_exp_logits")
    scrambled = [a | {field: b[field] for field in teacher} for a, b in zip(MANY, MANY[1:] + MANY[:1], strict=True)]
    wide = [
        r | {"topk_token_ids": (np.array(r["topk_token_ids"]) + 1000).tolist()} for r in scrambled
    ]  # so that chance is low
    assert "misaligned or scrambled" in warned(tmp_path, wide, vocab_size=2000)


def test_records_are_surveyed_evenly(tmp_path):
    records = [*MANY]
    records[10] = MANY[10] | {"loss_mask": [2] * 29}
    assert "a.jsonl, record 11: loss_mask[0] = 2" in refused(tmp_path, records)
    open_records(tmp_path, records, verify_records=2)  # the first and the last
    records[19] = MANY[19] | {"loss_mask": [2] * 29}
    assert "record 20" in refused(tmp_path, records, verify_records=2)
    assert "record 11" in refused(tmp_path, records, verify_records=-1)


def test_mended_rows_are_reported(tmp_path):
    records = json.loads(json.dumps(MANY))
    records[0]["topk_logits"][3].reverse()
    assert "1 of 580 unmasked positions checked were not in descending order" in warned(tmp_path, records)
    records = json.loads(json.dumps(MANY))
    records[0]["topk_token_ids"][3][1] = records[0]["topk_token_ids"][3][2]
    assert "1 of 580 unmasked positions checked held an id twice" in warned(tmp_path, records)
    records = json.loads(json.dumps(MANY))
    records[0]["log_sum_exp_logits"][3] = np.log(np.exp(records[0]["topk_logits"][3]).sum()) - 0.01
    assert "1 of 580 unmasked positions checked sum to more" in warned(tmp_path, records)


def test_top_k_between_records(tmp_path):
    ragged = [make_record(0, top_k=3), make_record(1, top_k=5), make_record(2, top_k=4)]
    dataset = open_records(tmp_path, ragged)
    assert dataset.top_k == 5
    assert "top-k 5 (in some records 3)" in "\n".join(dataset.summary())
    assert (dataset[0].topk_logits[:, 3:] == -np.inf).all()
    assert not dataset[0].topk_token_ids[:, 3:].any()
    np.testing.assert_allclose(dataset[2].topk_logits[:, :4], ragged[2]["topk_logits"], rtol=1e-6)
    dataset = open_records(tmp_path, ragged, top_k=2)
    assert dataset[1].topk_token_ids.tolist() == [row[:2] for row in ragged[1]["topk_token_ids"]]
    said = refused(tmp_path, ragged, top_k=6)
    for part in ("data.top_k = 6", "hold 5", "at most 5"):
        assert part in said


def test_a_later_record_with_more_entries_asks_for_top_k(tmp_path):
    records = [make_record(0), make_record(1, top_k=7), make_record(2)]
    dataset = open_records(tmp_path, records, verify_records=2)
    with pytest.raises(UserError) as caught:
        dataset[1]
    for part in ("a.jsonl, record 2", "holds 7", "more than the 5", "data.top_k"):
        assert part in str(caught.value)
    assert open_records(tmp_path, records, verify_records=2, top_k=4)[1].top_k == 4


def test_log_sum_exp_missing(tmp_path):
    without = make_record(1, log_sum_exp_logits=...)
    assert open_records(tmp_path, [make_record(0)]).has_log_sum_exp
    dataset = open_records(tmp_path, [make_record(0), without])
    assert not dataset.has_log_sum_exp
    assert dataset[0].log_sum_exp_logits is None
    said = refused(tmp_path, [make_record(0), without], need_log_sum_exp=True)
    for part in ("record 2", "no field log_sum_exp_logits", "loss.tail"):
        assert part in said
    dataset = open_records(tmp_path, [make_record(0), without, make_record(2)], verify_records=2)
    with pytest.raises(UserError, match=r"record 2: no field log_sum_exp_logits.*verify_records=-1"):
        dataset[1]


def test_over_long_records(tmp_path):
    records = make_records(7, 12, 5, 11)
    said = refused(tmp_path, records, sequence_length=10)
    for part in ("record 2", "12 tokens", "data.sequence_length = 10", "2 of 4", "longest has 12", "over_long=drop"):
        assert part in said
    dataset = open_records(tmp_path, records, sequence_length=10, over_long="drop")
    assert [len(dataset[i]) for i in range(len(dataset))] == [7, 5]
    assert "2 record(s) longer than 10 tokens and dropped" in dataset.summary()
    dataset = open_records(tmp_path, records, sequence_length=10, over_long="truncate")
    assert [len(dataset[i]) for i in range(len(dataset))] == [7, 10, 5, 10]
    assert dataset[1].labels.tolist() == records[1]["labels"][:10]
    assert dataset[1].topk_token_ids.tolist() == records[1]["topk_token_ids"][:10]
    assert "2 record(s) longer than 10 tokens and truncated" in dataset.summary()
    assert "no record is left: of 4" in refused(tmp_path, records, sequence_length=4, over_long="drop")


def test_repeated_indices(tmp_path):
    again = make_record(7, length=9, index=1)
    records = [*make_records(7, 12, 5), again, make_record(8, index=...), make_record(9, index=...)]
    assert "1 record(s) share their index" in warned(tmp_path, records)
    dataset = open_records(tmp_path, records, dedupe=True)
    assert [len(dataset[i]) for i in range(len(dataset))] == [7, 5, 9, 23, 23]
    assert dataset.warnings == ()
    assert "1 record(s) superseded by a later one of the same index and left out" in dataset.summary()
    paths = tuple(str(write(tmp_path / f"{n}.jsonl", make_records(7, 12))) for n in "xy")  # two sets, two numberings
    assert len(open_dataset(paths, config(tmp_path, dedupe=True), vocab_size=VOCAB)) == 4


def damaged_set() -> list[dict]:
    records = make_records(*[11] * 6)
    records[1]["labels"][4] = VOCAB
    records[3]["topk_logits"][2][0] = float("nan")
    return records


def test_damage_within_its_allowance_weighs_nothing(tmp_path, caplog):
    dataset = open_records(tmp_path, damaged_set(), max_bad_records=2)
    assert dataset.bad_records == 2
    assert "2 record(s) damaged and left out" in dataset.summary()
    for i in (1, 3, 1, 3):
        record = dataset[i]
        assert len(record) == 11
        assert not record.loss_mask.any()
        assert np.isfinite(record.topk_logits).all()
    said = [r.getMessage() for r in caplog.records if "record left out" in r.getMessage()]
    assert len(said) == 2
    assert f"a.jsonl, record 2: labels[4] = {VOCAB}" in said[0]
    (batch,) = train_batches(dataset, config(tmp_path), global_size=6, start_step=0, stop_step=1, rows=slice(None))
    assert batch.loss_mask.sum() == 4 * 11


def test_damage_beyond_its_allowance_stops_the_run(tmp_path):
    assert "a.jsonl, record 2: labels[4]" in refused(tmp_path, damaged_set())
    said = refused(tmp_path, damaged_set(), max_bad_records=1)
    for part in ("record 4: topk_logits[2][0] = nan", "damaged records so far: 2", "data.max_bad_records = 1"):
        assert part in said


def test_damage_found_later_is_counted_once_whatever_the_threads(tmp_path):
    dataset = open_records(tmp_path, damaged_set(), max_bad_records=2, verify_records=1)
    assert dataset.bad_records == 0
    threads = [threading.Thread(target=lambda: [dataset[i] for i in range(6)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dataset.bad_records == 2


def test_damage_that_the_index_shows_is_met_at_start(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [line(record) for record in make_records(*[11] * 6)]
    path.write_bytes(b"".join([*good[:3], b'{"tokens": [1, 2\n', b'{"labels": [1]}\n', *good[3:]]))
    opening = {"vocab_size": VOCAB}
    with pytest.raises(UserError, match="record 4: not valid JSON"):
        open_dataset((str(path),), config(tmp_path, verify_records=1), **opening)
    with pytest.raises(UserError, match="record 5: no field tokens"):
        open_dataset((str(path),), config(tmp_path, verify_records=1, max_bad_records=1), **opening)
    assert len(open_dataset((str(path),), config(tmp_path, verify_records=1, max_bad_records=2), **opening)) == 8


def test_a_set_of_damage_only_is_refused(tmp_path):
    records = [record | {"loss_mask": [2] * 29} for record in MANY[:3]]
    assert "every record checked is damaged (3" in refused(tmp_path, records, max_bad_records=5)


def test_a_file_rewritten_under_a_run_is_noticed(tmp_path):
    dataset = open_records(tmp_path, make_records(11, 11, 11), verify_records=1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"[", b"[[", 20))
    with pytest.raises(UserError, match=r"a.jsonl, record 3: "):
        dataset[2]


def manifest(tmp_path, **fields):
    (tmp_path / "manifest.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("fields", "knobs", "parts"),
    [
        ({"kind": "log_probs"}, {}, ["kind is 'log_probs'", "data.kind is 'logits'", "set data.kind=log_probs"]),
        ({"teacher_temperature": 2}, {}, ["is 2", "data.teacher_temperature is 1", "data.teacher_temperature=2"]),
        ({}, {"teacher_temperature": 2.0, "target_logits_scale": 0.5}, ["applied twice", "= 2 ", "= 0.5 "]),
        ({"top_k": 5}, {"top_k": 8}, ["top_k is 5", "data.top_k is 8", "at most 5"]),
        ({"vocab_size": 128}, {}, ["128", f"model.vocab_size is {VOCAB}", "cross_tokenizer=rank_match"]),
        ({"tokenizer_sha256": "ab"}, {"tokenizer_sha256": "cd"}, ["is ab", "is cd", "cross_tokenizer=rank_match"]),
        ({"top_k": "5"}, {}, ["top_k = '5' is a str", "must be int"]),
    ],
)
def test_a_manifest_that_disagrees_is_refused(tmp_path, fields, knobs, parts):
    manifest(tmp_path, **fields)
    said = refused(tmp_path, MANY, **knobs)
    assert [part for part in parts if part not in said] == []
    assert not fields or "manifest.json" in said


def test_a_manifest_that_agrees_is_shown(tmp_path):
    manifest(
        tmp_path,
        teacher="T-1B",
        license="MIT",
        kind="logits",
        teacher_temperature=2.0,
        vocab_size=VOCAB - 2,  # the student's is padded
        tokenizer_sha256="ab",
        top_k=5,
        sequence_length=29,
        notes=["anything"],
    )
    dataset = open_records(tmp_path, MANY, teacher_temperature=2.0, tokenizer_sha256="ab")
    assert dataset.warnings == ()
    assert f"{tmp_path}/manifest.json: teacher T-1B, licence MIT" in dataset.summary()
    manifest(tmp_path, vocab_size=5000, tokenizer_sha256="ab")
    assert len(open_records(tmp_path, MANY, tokenizer_sha256="cd", ignore_teacher_ids=True)) == 20


def test_a_manifest_that_promises_less_than_there_is(tmp_path):
    manifest(tmp_path, top_k=3, sequence_length=20)
    warnings = open_records(tmp_path, MANY).warnings
    assert [w.partition("json: ")[2] for w in warnings] == [
        "top_k is 3, but records hold 5",
        "sequence_length is 20, but a record has 29 tokens",
    ]


@pytest.mark.parametrize(("text", "part"), [("{", "not valid JSON"), ("[]", "a manifest is a JSON object")])
def test_a_malformed_manifest_is_refused(tmp_path, text, part):
    (tmp_path / "manifest.json").write_text(text)
    said = refused(tmp_path, MANY)
    assert part in said
    assert "manifest.json" in said


def test_indexing_beyond_the_set(tmp_path):
    dataset = open_records(tmp_path, MANY)
    for i in (20, -1):
        with pytest.raises(IndexError, match="of 20"):
            dataset[i]
