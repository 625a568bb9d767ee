"""Which records of a set are used, what each looks like, and damage within and beyond what is allowed."""

import dataclasses
import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from record_files import VOCAB, config, line, make_record, make_records, open_paths, open_records, write

from kdjax.data import train_batches
from kdjax.data.dataset import FINGERPRINT_KNOBS
from kdjax.types import UserError


def refused(tmp_path, records, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        open_records(tmp_path, records, **knobs)
    return str(caught.value)


def lengths(dataset) -> list[int]:
    return [len(dataset[i]) for i in range(len(dataset))]


def test_indexing_beyond_the_set(tmp_path):
    dataset = open_records(tmp_path, make_records(7, 12))
    assert lengths(dataset) == [7, 12]
    for i in (2, -1):
        with pytest.raises(IndexError, match=f"record {i} of 2"):
            dataset[i]


def test_an_error_names_file_record_and_line(tmp_path):
    records = make_records(7, 7, 7)
    records[2]["labels"][1] = 999
    (tmp_path / "b.jsonl").write_bytes(b"\n" + b"".join(map(line, records)))
    with pytest.raises(UserError) as caught:
        open_paths(tmp_path, tmp_path / "b.jsonl")
    assert str(caught.value).startswith(f"{tmp_path}/b.jsonl, record 3 (line 4): labels[1] = 999 ")


def test_top_k_may_differ_between_records(tmp_path):
    ragged = [make_record(0, top_k=3), make_record(1, top_k=5), make_record(2, top_k=4)]
    dataset = open_records(tmp_path, ragged)
    assert dataset.top_k == 5
    assert "the teacher's top 5 tokens at each position (in some records 3), stored as logits" in dataset.summary()
    assert dataset[0].topk_token_ids.tolist() == [[*row, 0, 0] for row in ragged[0]["topk_token_ids"]]
    assert dataset[0].topk_logits.shape == (23, 5)
    assert (dataset[0].topk_logits[:, 3:] == -np.inf).all()
    np.testing.assert_allclose(dataset[2].topk_logits[:, :4], ragged[2]["topk_logits"], rtol=1e-6)
    dataset = open_records(tmp_path, ragged, top_k=2)
    assert dataset[1].topk_token_ids.tolist() == [row[:2] for row in ragged[1]["topk_token_ids"]]
    assert "data.top_k = 6, but the records have 5" in refused(tmp_path, ragged, top_k=6)


def test_a_later_record_with_more_entries_asks_for_top_k(tmp_path):
    records = [make_record(0), make_record(1, top_k=7), make_record(2)]
    dataset = open_records(tmp_path, records, verify_records=2)
    with pytest.raises(UserError) as caught:
        dataset[1]
    for part in ("a.jsonl, record 2: has 7 teacher entries", "more than the 5 of the 2 records", "data.top_k to 7"):
        assert part in str(caught.value)
    assert open_records(tmp_path, records, verify_records=2, top_k=4)[1].top_k == 4


def test_the_logsumexp_may_be_missing(tmp_path):
    without = make_record(1, log_sum_exp_logits=...)
    assert open_records(tmp_path, [make_record(0)]).has_log_sum_exp
    dataset = open_records(tmp_path, [make_record(0), without])
    assert not dataset.has_log_sum_exp
    assert dataset[0].log_sum_exp_logits is None
    message = refused(tmp_path, [make_record(0), without], need_log_sum_exp=True)
    for part in ("record 2", "no field log_sum_exp_logits", "loss.tail"):
        assert part in message
    dataset = open_records(tmp_path, [make_record(0), without, make_record(2)], verify_records=2)
    with pytest.raises(UserError, match=r"record 2: no field log_sum_exp_logits.*verify_records=-1"):
        dataset[1]


def test_over_long_records(tmp_path):
    records = make_records(7, 12, 5, 11, 10)
    message = refused(tmp_path, records, sequence_length=10)
    for part in ("record 2", "12 tokens", "data.sequence_length = 10", "2 of 5", "longest has 12", "over_long=drop"):
        assert part in message
    dataset = open_records(tmp_path, records, sequence_length=10, over_long="drop")
    assert lengths(dataset) == [7, 5, 10]
    assert dataset.summary()[-1] == "2 records dropped: longer than 10 tokens"
    dataset = open_records(tmp_path, records, sequence_length=10, over_long="truncate")
    assert lengths(dataset) == [7, 10, 5, 10, 10]
    assert dataset[1].labels.tolist() == records[1]["labels"][:10]
    assert dataset[1].topk_token_ids.tolist() == records[1]["topk_token_ids"][:10]
    assert dataset.summary()[-1] == "2 records truncated to 10 tokens"
    assert "no record is left: 5 of 5 in 1 file(s)" in refused(tmp_path, records, sequence_length=4, over_long="drop")


def test_records_with_the_index_of_a_later_one(tmp_path):
    again = [make_record(6, length=8, index=1), make_record(7, length=9, index=1)]
    records = [*make_records(7, 12, 5), *again, make_record(8, index=...), make_record(9, index=...)]
    dataset = open_records(tmp_path, records)
    assert lengths(dataset) == [7, 12, 5, 8, 9, 23, 23]
    (warning,) = dataset.warnings
    assert warning.startswith("2 records with the index of a later record")
    assert not [text for text in dataset.summary() if "same index" in text]
    dataset = open_records(tmp_path, records, dedupe=True)
    assert lengths(dataset) == [7, 5, 9, 23, 23]
    assert dataset.warnings == ()
    assert dataset.summary()[-1] == "2 records skipped: a later record has the same index"
    paths = [write(tmp_path / f"{n}.jsonl", make_records(7, 12)) for n in "xy"]  # each numbered from 0
    assert len(open_paths(tmp_path, *paths, dedupe=True)) == 4
    assert len(open_paths(tmp_path, tmp_path / "[xy].jsonl", dedupe=True)) == 2  # one path, so one numbering


def damaged_set() -> list[dict]:
    records = make_records(*[11] * 6)
    records[1]["labels"][4] = VOCAB
    records[3]["topk_logits"][2][0] = float("nan")
    return records


def test_damage_within_the_limit_has_no_weight(tmp_path, caplog, monkeypatch):
    dataset = open_records(tmp_path, damaged_set(), max_bad_records=2)
    reads, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or real(*place))
    assert dataset.bad_records == 2
    assert dataset.summary()[-1] == "2 records skipped: damaged"
    assert "4 records checked" in dataset.summary()[2]
    for i in (1, 3, 1, 3):
        record = dataset[i]
        assert len(record) == 11
        assert record.topk_logits.shape == record.topk_token_ids.shape == (11, 5)
        arrays = [getattr(record, field.name) for field in dataclasses.fields(record)[:-2]]
        assert not any(array.any() for array in arrays)
    assert reads == []  # a record that is known to be damaged is not read again
    messages = [r.getMessage() for r in caplog.records if "record skipped" in r.getMessage()]
    assert len(messages) == 2
    assert f"(1 of at most 2): {tmp_path}/a.jsonl, record 2: labels[4] = {VOCAB}" in messages[0]
    (batch,) = train_batches(dataset, config(tmp_path), global_size=6, start_step=0, stop_step=1, rows=slice(None))
    assert batch.loss_mask.sum() == 4 * 11
    for record in (records := damaged_set()):
        del record["log_sum_exp_logits"]
    assert open_records(tmp_path, records, max_bad_records=2)[1].log_sum_exp_logits is None


def test_damage_beyond_the_limit_stops_the_run(tmp_path):
    message = refused(tmp_path, damaged_set())
    assert "a.jsonl, record 2: labels[4]" in message
    assert "damaged records so far" not in message
    message = refused(tmp_path, damaged_set(), max_bad_records=1)
    for part in ("record 4: topk_logits[2][0] = nan", "damaged records so far: 2", "data.max_bad_records = 1"):
        assert part in message
    dataset = open_records(tmp_path, damaged_set(), verify_records=1)
    for _ in range(2):  # each thread that reads ahead must see it, not only the first
        with pytest.raises(UserError, match=r"record 2: labels\[4\] = 97"):
            dataset[1]


def test_damage_found_later_is_counted_once_whatever_the_threads(tmp_path):
    dataset = open_records(tmp_path, damaged_set(), max_bad_records=2, verify_records=1)
    assert dataset.bad_records == 0
    threads = [threading.Thread(target=lambda: [dataset[i] for i in range(6)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dataset.bad_records == 2


def test_damage_that_the_index_shows_is_met_at_the_start(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [line(record) for record in make_records(*[11] * 6)]
    path.write_bytes(b"".join([*good[:3], b'{"tokens": [1, 2\n', b'{"labels": [1]}\n', *good[3:]]))
    with pytest.raises(UserError, match="record 4: not valid JSON"):
        open_paths(tmp_path, path, verify_records=1)
    with pytest.raises(UserError, match="record 5: no field tokens"):
        open_paths(tmp_path, path, verify_records=1, max_bad_records=1)
    dataset = open_paths(tmp_path, path, verify_records=1, max_bad_records=2)
    assert lengths(dataset) == [11, 11, 11, 1, 1, 11, 11, 11]


def test_records_that_look_sound_are_read_only_if_surveyed(tmp_path, monkeypatch):
    reads, real = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or real(*place))
    open_records(tmp_path, [make_record(0), *[make_record(seed, length=1) for seed in range(1, 5)]], verify_records=1)
    assert len(reads) == 1


def test_a_record_without_tokens_is_damaged(tmp_path):
    records = make_records(11, 11, 11)
    records[1]["tokens"] = []
    assert "record 2: tokens is empty" in refused(tmp_path, records, verify_records=1)


def test_a_set_of_damaged_records_only_is_refused(tmp_path):
    records = [record | {"loss_mask": [2] * 29} for record in make_records(29, 29, 29)]
    assert "every record checked is damaged (3, within data.max_bad_records = 5)" in refused(
        tmp_path, records, max_bad_records=5
    )


def test_a_file_rewritten_during_a_run_is_noticed(tmp_path):
    dataset = open_records(tmp_path, make_records(11, 11, 11), verify_records=1)
    path = tmp_path / "a.jsonl"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"[", b"[[", 20))
    with pytest.raises(UserError, match=r"a.jsonl, record 3: "):
        dataset[2]
    path.write_bytes(original)
    dataset = open_records(tmp_path, make_records(11, 11, 11), verify_records=1)
    shorter = line(make_record(2, length=10)).rstrip()
    start = len(b"".join(original.splitlines(keepends=True)[:2]))
    path.write_bytes(original[:start] + shorter.ljust(len(original) - start - 1) + b"\n")
    with pytest.raises(UserError, match=r"a.jsonl, record 3: has changed since the file was indexed"):
        dataset[2]


CHANGES = {
    "sequence_length": 32,
    "top_k": 4,
    "shuffle": False,
    "seed": 7,
    "pack": True,
    "over_long": "drop",
    "kind": "log_probs",
    "dedupe": True,
}


def test_the_fingerprint_covers_what_is_read_and_nothing_else(tmp_path):
    records = make_records(*[11] * 3, log_sum_exp_logits=...)
    for record in records:
        record["topk_logits"] = [[-1.0, -2.0, -3.0, -4.0, -5.0]] * 11  # fit both as logits and as log-probabilities
    plain = open_records(tmp_path, records).fingerprint
    assert open_records(tmp_path, records).fingerprint == plain
    others = {knob: open_records(tmp_path, records, **{knob: value}).fingerprint for knob, value in CHANGES.items()}
    assert others.keys() == set(FINGERPRINT_KNOBS)
    assert len({plain, *others.values()}) == 1 + len(CHANGES)
    assert open_records(tmp_path, records[:2]).fingerprint not in {plain, *others.values()}
    same = {"read_threads": 1, "prefetch": 1, "verify_records": 3, "scratch_dir": str(tmp_path / "other")}
    assert open_records(tmp_path, records, **same).fingerprint == plain
    assert (tmp_path / "other").is_dir()


def test_a_record_is_one_read_at_its_place(tmp_path, monkeypatch):
    records = make_records(23, 7, 11, 5, 13)
    dataset = open_records(tmp_path, records)
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: reads.append((size, at)) or real(fd, size, at))
    assert dataset[3].tokens.tolist() == records[3]["tokens"]
    assert reads == [(len(line(records[3])) - 1, len(b"".join(map(line, records[:3]))))]

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"a.jsonl, record 2: cannot read this record: Input/output error; check"):
        dataset[1]


def test_a_file_cut_short_while_it_is_open(tmp_path):
    dataset = open_records(tmp_path, make_records(5, 7, 9), verify_records=1)
    os.truncate(tmp_path / "a.jsonl", 300)
    with pytest.raises(UserError, match=r"a.jsonl, record 3: not valid JSON"):
        dataset[2]


def test_files_are_closed_with_their_dataset(tmp_path):
    def descriptors() -> list[Path]:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return [link for link in links if link.is_symlink() and os.readlink(link) == str(tmp_path / "a.jsonl")]

    dataset = open_records(tmp_path, make_records(7, 12))
    assert len(descriptors()) == 1
    del dataset
    assert descriptors() == []


def test_records_of_a_chunk_are_counted(tmp_path):
    records = make_records(7, 12, 5)
    write(tmp_path / "t_0.jsonl", records)
    second = write(tmp_path / "t_1.jsonl", records[:2])
    template = tmp_path / "t_CHUNK_ID.jsonl"
    with pytest.raises(UserError, match=r"t_1.jsonl: holds 2 records, but data.n_examples_per_chunk is 3;"):
        open_paths(tmp_path, template, n_examples_per_chunk=3)
    assert len(open_paths(tmp_path, template)) == 5
    assert len(open_paths(tmp_path, second, n_examples_per_chunk=3)) == 2  # not a chunk
