"""`kdjax cache export`: to NeMo-Aligner's JSON lines and to DistillKit's parquet files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
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

from kdjax.cache.__main__ import main
from kdjax.cache.formats import nemo_writer
from kdjax.cache.writer import CacheWriter
from kdjax.data.records import Record, decode
from kdjax.data.shards.manifest import CacheManifest
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.types import UserError

RECORDS = Path(__file__).parents[2] / "data" / "smollm2_topk"


def export(cache: Path, out: Path, format: str = "nemo", **flags: Any) -> Path:
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert main(["export", str(cache), str(out), "--format", format, *words]) == 0
    return out


def make_cache(tmp_path: Path, records: list[Any], **flags: Any) -> Path:
    path = write_lines(tmp_path / "in.jsonl", records)
    run_import(tmp_path / "cache", path, vocab_size=VOCAB, **flags)
    return tmp_path / "cache"


def test_lossless_there_and_back(tmp_path: Path) -> None:
    """The bundled records, exported, are read by training as the originals are."""
    path = RECORDS / "val_with_logits_0.jsonl.gz"
    run_import(tmp_path / "cache", path, lossless=True)
    out = export(tmp_path / "cache", tmp_path / "out", records_per_file=25)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", *(f"records_{i}.jsonl.gz" for i in range(3))]
    again = dataset(out / "records_CHUNK_ID.jsonl.gz", vocab_size=49152)
    assert_same_records(again, dataset(path, vocab_size=49152))
    known = json.loads((out / "manifest.json").read_text())
    bundled = json.loads((RECORDS / "manifest.json").read_text())
    assert known == {name: bundled[name] for name in known}
    assert known.keys() >= {"vocab_size", "kind", "teacher", "license", "top_k"}


@pytest.mark.parametrize("suffix", nemo_writer.SUFFIXES)
def test_odd_records_there_and_back(tmp_path: Path, suffix: str) -> None:
    ragged = nemo(sequence(1, 17))
    ragged["topk_logits"][3], ragged["topk_token_ids"][3] = [0.0], [5]
    records = [ragged, nemo(sequence(2, 19), loss_mask=[0] * 7 + [0.25] * 12), nemo(sequence(3, 1), index=None)]
    cache = make_cache(tmp_path, records, lossless=True)
    out = export(cache, tmp_path / "out", suffix=suffix)
    assert_same_records(dataset(out / f"records_0{suffix}"), dataset(tmp_path / "in.jsonl"))
    other = export(cache, tmp_path / "again", suffix=suffix)
    for path in out.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_every_float32_is_written_exactly() -> None:
    """Also where the shortest decimal, read as float64, would round to a neighbour."""
    bits = np.random.default_rng(0).integers(0, 2**32, (1000, 64), dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(-1))
    zeros = np.zeros(1000, np.int32)
    record = Record(zeros, zeros, np.ones(1000, np.float32), values, np.zeros((1000, 64), np.int32), values[:, 0])
    found = decode(nemo_writer.to_line(record), "here")
    np.testing.assert_array_equal(found.topk_logits.view(np.uint32), values.view(np.uint32))
    np.testing.assert_array_equal(found.log_sum_exp_logits, values[:, 0])


def test_a_quantised_cache(tmp_path: Path) -> None:
    """Training reads the same values from the files as from the cache."""
    cache = make_cache(tmp_path, [nemo(each) for each in sequences(23, 1, 40)])
    out = export(cache, tmp_path / "out")
    assert_same_records(dataset(out / "records_0.jsonl.gz"), dataset(cache))


def test_distillkit_there_and_back(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits, so that a log-probability is off by at most 1/256 of itself."""
    given = sequences(23, 1, 40, 11, 9)
    records = [vllm_prompt(each, 5) for each in given]
    cache = make_cache(tmp_path, records, lossless=True)
    out = export(cache, tmp_path / "out", "distillkit", records_per_file=2)
    assert sorted(p.name for p in out.iterdir()) == [
        "compression_config.yaml",
        *(f"data_{i}.parquet" for i in range(3)),
    ]
    config = yaml.safe_load((out / "compression_config.yaml").read_text())
    assert (config["d"], config["k"], config["exact_k"], config["exact_dtype"]) == (VOCAB, 6, 6, "bfloat16")
    again = run_import(tmp_path / "again", out, lossless=True)
    assert again.manifest.vocab_size == VOCAB
    for record, each in zip(stored(again), given, strict=True):
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.labels, each.ids[1:])
        np.testing.assert_array_equal(np.sort(record.ids[:, :5]), np.sort(each.top(5)[0]))
        present = record.log_probs > -np.inf
        truth = np.take_along_axis(each.log_probs, record.ids.astype(int), 1)
        np.testing.assert_allclose(record.log_probs[present], truth[present], rtol=2**-8)


def test_distillkits_columns(tmp_path: Path) -> None:
    """The types of DistillKit's compressed_logit_schema, and open-instruct's labels: -100 where nothing is learned."""
    record = nemo(sequence(0, 9), loss_mask=[0] * 4 + [1] * 5)
    out = export(make_cache(tmp_path, [record], lossless=True), tmp_path / "out", "distillkit")
    table = pq.read_table(out / "data_0.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    assert {name: text.replace("element: ", "").replace("item: ", "") for name, text in types.items()} == {
        "input_ids": "list<uint64>",
        "compressed_logprobs": "list<list<uint8>>",
        "bytepacked_indices": "list<list<uint8>>",
        "labels": "list<int64>",
    }
    (row,) = table.to_pylist()
    assert row["input_ids"] == [*record["tokens"], record["labels"][-1]]
    assert row["labels"] == [-100] * 5 + record["labels"][4:]
    assert [len(octets) for octets in row["compressed_logprobs"]] == [10] * 9
    assert [len(octets) for octets in row["bytepacked_indices"]] == [5] * 9  # 5 ids of 7 bits
    first = "".join(f"{octet:08b}" for octet in row["bytepacked_indices"][8])
    assert [int(first[i * 7 : i * 7 + 7], 2) for i in range(5)] == record["topk_token_ids"][8]
    again = run_import(tmp_path / "again", out, lossless=True).read(0)
    np.testing.assert_array_equal(again.loss_mask, record["loss_mask"])
    np.testing.assert_array_equal(again.labels[4:], record["labels"][4:])


def test_another_compression(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, [nemo(each, k=11) for each in sequences(23, 40)], lossless=True)
    wanted = {"d": VOCAB, "k": 11, "exact_k": 3, "polynomial_terms": [0, 1, 2, "sqrt"], "exact_dtype": "float32"}
    wanted |= {"delta_encoding": False}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(wanted))
    again = run_import(tmp_path / "again", export(cache, tmp_path / "out", "distillkit", compression_config=config))
    for record, each in zip(stored(again), sequences(23, 40), strict=True):
        truth = np.take_along_axis(each.log_probs, record.ids.astype(int), 1)
        assert np.abs(record.log_probs - truth).mean() < 0.2
    for change, message in (
        ({"k": 12}, r"k = 12, and .* has 11 entries a position; lower k"),
        ({"d": 96}, r"d = 96, and the teacher's vocabulary has 97"),
        ({"error_diffusion": True}, r"error_diffusion is not written"),
    ):
        config.write_text(yaml.safe_dump(wanted | change))
        with pytest.raises(UserError, match=message):
            export(cache, tmp_path / "other", "distillkit", compression_config=config)
    assert not list(tmp_path.glob("other*"))


def test_what_distillkit_cannot_hold(tmp_path: Path) -> None:
    """Nothing is left behind, also of the records that could be written."""
    good, weighted = nemo(sequence(0)), nemo(sequence(1), loss_mask=[0.5] * 23)
    cache = make_cache(tmp_path, [good, weighted])
    with pytest.raises(UserError, match=r"record 2: loss_mask\[0\] = 0.5; DistillKit knows only .*: export to nemo"):
        export(cache, tmp_path / "out", "distillkit")
    ragged = nemo(sequence(1))
    ragged["topk_logits"][3], ragged["topk_token_ids"][3] = [0.0], [5]
    run_import(tmp_path / "b", write_lines(tmp_path / "b.jsonl", [good, ragged]), vocab_size=VOCAB, lossless=True)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"d": VOCAB, "k": 5, "exact_k": 2, "polynomial_terms": [0, 1]}))
    with pytest.raises(UserError, match=r"record 2: position 3 has 1 entries, and polynomials .* need all 5"):
        export(tmp_path / "b", tmp_path / "out", "distillkit", compression_config=config)
    assert not list(tmp_path.glob("out*"))
    export(tmp_path / "b", tmp_path / "out", "distillkit")
    again = run_import(tmp_path / "again", tmp_path / "out", lossless=True).read(1)
    assert (again.log_probs[3] > -np.inf).sum() == 1


def sampled_cache(path: Path) -> Path:
    n = 7
    manifest = CacheManifest(VOCAB, 3, n, targets="sampled", draws=3)
    ones = np.ones((n, 3), np.int64)
    record = StoredRecord(
        np.arange(n), np.arange(n) + 1, np.ones(n, np.float32), np.arange(3) * ones, np.full((n, 3), -1.0, np.float32),
        np.zeros((1, n), np.float32), draws=ones, tail_log_probs=np.full(n, -2.0, np.float32),
    )  # fmt: skip
    writer = CacheWriter(path, manifest, {})
    writer.write_shard(0, [record])
    writer.finish(1)
    return path


@pytest.mark.parametrize("format", ["nemo", "distillkit"])
def test_what_cannot_be_exported(tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match=r"holds sampled targets.*only caches of top-k targets can be exported"):
        export(sampled_cache(tmp_path / "sampled"), tmp_path / "out", format)
    cache = make_cache(tmp_path, [nemo(sequence(0))])
    with pytest.raises(UserError, match="--records-per-file 0: it must be at least 1"):
        export(cache, tmp_path / "out", format, records_per_file=0)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        export(cache, tmp_path / "out", format)


def test_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(tmp_path, [vllm_prompt(sequence(0), 5)])
    export(cache, tmp_path / "out")
    assert "left out: the log-probabilities of the labels" in capsys.readouterr().out
