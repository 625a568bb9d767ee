"""`kdjax cache import`: any format through the same loop."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from foreign_files import (
    VOCAB,
    assert_same_records,
    dataset,
    nemo,
    run_import,
    sequence,
    sequences,
    stored,
    vllm_prompt,
    write_lines,
)

from kdjax.cache import import_records, writer
from kdjax.data.shards.reader import Cache
from kdjax.types import UserError

RECORDS = Path(__file__).parents[2] / "data" / "smollm2_topk"


def test_lossless_records_are_those_of_the_json_lines(tmp_path: Path) -> None:
    path = RECORDS / "val_with_logits_0.jsonl.gz"
    run_import(tmp_path / "cache", path, lossless=True)
    assert_same_records(dataset(tmp_path / "cache", vocab_size=49152), dataset(path, vocab_size=49152))


def test_lossless_masks_ragged_entries_and_missing_logsumexps(tmp_path: Path) -> None:
    ragged = nemo(sequence(1, 17))
    ragged["topk_logits"][3] = ragged["topk_logits"][3][:2]
    ragged["topk_token_ids"][3] = ragged["topk_token_ids"][3][:2]
    masked = nemo(sequence(2, 19), loss_mask=[0] * 7 + [1] * 12)
    weighted = nemo(sequence(3, 11), loss_mask=[0.25, 0.75] + [1] * 9)
    for name, records in (
        ("all", [ragged, masked, weighted]),
        ("none", [nemo(sequence(seed, 13), log_sum_exp_logits=None) for seed in range(3)]),
    ):
        path = write_lines(tmp_path / f"{name}.jsonl", records)
        run_import(tmp_path / name, path, vocab_size=VOCAB, lossless=True)
        assert_same_records(dataset(tmp_path / name), dataset(path))


def test_quantised_probabilities_are_near(tmp_path: Path) -> None:
    """quantise.py: no probability is off by more than half a step, 1/512."""
    path = RECORDS / "val_with_logits_0.jsonl.gz"
    cache = run_import(tmp_path / "cache", path)
    wanted = dataset(path, vocab_size=49152)
    for i in (0, 17, 63):
        record, found = wanted[i], cache.read(i)
        truth = {
            (t, int(token)): np.exp(value - record.log_sum_exp_logits[t])
            for t, (tokens, values) in enumerate(zip(record.topk_token_ids, record.topk_logits, strict=True))
            for token, value in zip(tokens, values, strict=True)
        }
        for t, (tokens, values) in enumerate(zip(found.ids, found.log_probs, strict=True)):
            for token, value in zip(tokens, values, strict=True):
                assert abs(np.exp(value) - truth[t, int(token)]) <= 1 / 512 + 1e-6


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_detects_the_format_of_compressed_lines(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    for name, make in (("nemo", nemo), ("vllm", vllm_prompt)):
        text = "".join(json.dumps(make(each, 5)) + "\n" for each in sequences(11, 13))
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(pack(text.encode()))
        cache = run_import(tmp_path / name, path, vocab_size=VOCAB)
        assert cache.manifest.source["format"] == name
        assert [len(record) for record in stored(cache)] == [11, 13]


def test_byte_order_mark_line_endings_and_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps(vllm_prompt(each, 5)) for each in sequences(11, 13)]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff\r\n" + lines[0] + "\r\n\r\n" + lines[1]).encode())
    cache = run_import(tmp_path / "cache", tmp_path / "a.jsonl", vocab_size=VOCAB)
    assert [len(record) for record in stored(cache)] == [11, 13]


def test_names_a_format_that_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(UserError, match=r"a.txt: looks like no format .*--format distillkit\|megatron\|maxtext"):
        run_import(tmp_path / "cache", tmp_path / "a.txt", vocab_size=VOCAB)
    write_lines(tmp_path / "a.jsonl", [nemo(sequence(0))])
    write_lines(tmp_path / "b.jsonl", [vllm_prompt(sequence(0), 5)])
    with pytest.raises(UserError, match=r"different formats: .*a.jsonl \(nemo\), .*b.jsonl \(vllm\)"):
        run_import(tmp_path / "cache", tmp_path / "a.jsonl", tmp_path / "b.jsonl", vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"record 1: no field prompt_logprobs"):
        run_import(tmp_path / "cache", tmp_path / "a.jsonl", format="vllm", vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


def test_directories(tmp_path: Path) -> None:
    """All files of one kind, in natural order."""
    source = tmp_path / "in"
    source.mkdir()
    for number in (10, 2):
        write_lines(source / f"part_{number}.jsonl", [vllm_prompt(sequence(0, number), 5)])
    cache = run_import(tmp_path / "cache", source, vocab_size=VOCAB)
    assert [len(record) for record in stored(cache)] == [2, 10]
    with pytest.raises(UserError, match="this is a cache already"):
        run_import(tmp_path / "other", tmp_path / "cache", vocab_size=VOCAB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no file in this directory ends in .parquet"):
        run_import(tmp_path / "other", tmp_path / "empty", vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_token_ids": [[97, 1, 2, 3, 4]] * 23}, r"topk_token_ids\[0\]\[0\] = 97 is outside"),
        ({"loss_mask": [2] * 23}, r"loss_mask\[0\] = 2; it must be 0 or 1"),
        ({"topk_logits": [[0, -1, -2, -3, float("nan")]] * 23}, r"topk_logits\[0\]\[4\] = nan"),
        ({"labels": [1, 2]}, r"labels has 2 positions, tokens has 23"),
        ({"topk_logits": [[0.5, 0.2, 0.1, 0.1, 0.05]] * 23}, r"looks like probabilities"),
        ({"tokens": ["5"] * 23}, r"tokens\[0\] = '5' is a string"),
        ({"loss_mask": [0] * 23}, r"none of the 1 records checked has an unmasked position"),
    ],
)
def test_damaged_records_leave_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [nemo(sequence(0)) | change])
    with pytest.raises(UserError, match=message):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


def test_kind_and_manifest(tmp_path: Path) -> None:
    given = sequence(0)
    values = np.exp(given.top(5)[1])
    path = write_lines(tmp_path / "a.jsonl", [nemo(given, topk_logits=values.tolist(), log_sum_exp_logits=None)])
    (record,) = stored(run_import(tmp_path / "cache", path, vocab_size=VOCAB, kind="probs", lossless=True))
    np.testing.assert_allclose(record.log_probs, given.top(5)[1], rtol=1e-6)
    known = {"vocab_size": VOCAB, "kind": "probs", "teacher": "T", "license": "L", "teacher_temperature": 2.0}
    (tmp_path / "manifest.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"--vocab-size 96: .*manifest.json says that the teacher's vocabulary has 97"):
        run_import(tmp_path / "other", path, vocab_size=VOCAB - 1)
    manifest = run_import(tmp_path / "other", path, license="mine").manifest
    assert (manifest.teacher, manifest.license, manifest.teacher_temperature) == ("T", "mine", 2.0)


class _Killed(BaseException):
    pass


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is the same, byte for byte, as one that was not interrupted; complete shards are not written again."""
    monkeypatch.setattr(import_records, "plan_shards", lambda lengths: writer.plan_shards(lengths, 50))
    path = write_lines(tmp_path / "a.jsonl", [vllm_prompt(each, 5) for each in sequences(*[23] * 9)])
    run_import(tmp_path / "whole", path, vocab_size=VOCAB)
    original, written = writer.CacheWriter.write_shard, []

    def write_shard(self: Any, number: int, records: Any) -> None:
        if len(written) == 2:
            next(iter(records))
            raise _Killed
        written.append(number)
        original(self, number, records)

    monkeypatch.setattr(writer.CacheWriter, "write_shard", write_shard)
    with pytest.raises(_Killed):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"no cache\.json, so this cache is not complete"):
        Cache(tmp_path / "cache")
    written.clear()
    monkeypatch.setattr(writer.CacheWriter, "write_shard", original)
    with pytest.raises(UserError, match=r"begun with other settings \(values: 'quantised' there, 'float32' now\)"):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB, lossless=True)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.arrayrecord")}
    assert len(before) == 2
    run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name, time in before.items():
        assert (tmp_path / "cache" / name).stat().st_mtime_ns == time


def test_changed_input_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [vllm_prompt(each, 5) for each in sequences(23, 23)])
    monkeypatch.setattr(writer.CacheWriter, "write_shard", lambda *_: (_ for _ in ()).throw(_Killed()))
    with pytest.raises(_Killed):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    write_lines(path, [vllm_prompt(each, 5) for each in sequences(23, 22)])
    with pytest.raises(UserError, match=r"begun with other settings \(data: "):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    shutil.rmtree(tmp_path / "cache")
