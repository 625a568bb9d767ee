"""Paths to files to plain lines: templates, globs, packed and damaged files, the scratch directory."""

import errno
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard
from record_files import VOCAB, config, line, make_records, write

from kdjax.data import open_dataset
from kdjax.data.files import decompress, index
from kdjax.data.files.paths import resolve
from kdjax.types import UserError

RECORDS = make_records(23, 7, 11, 5, 13)
PLAIN = b"".join(line(record) for record in RECORDS)


def kept_in(scratch):
    """What is there but the locks by which processes wait for each other."""
    return [path for path in scratch.iterdir() if path.suffix != ".lock"]


def opened(tmp_path, *paths, **knobs):
    return open_dataset(tuple(str(path) for path in paths), config(tmp_path, **knobs), vocab_size=VOCAB)


def refused(tmp_path, *paths, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, *paths, **knobs)
    return str(caught.value)


def contents(dataset):
    return [dataset[i].tokens.tolist() for i in range(len(dataset))]


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "plain.jsonl").write_bytes(PLAIN)
    dataset = opened(tmp_path, tmp_path / "plain.jsonl")
    assert contents(dataset) == [record["tokens"] for record in RECORDS]
    return dataset


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.jsonl.gz", gzip.compress(PLAIN)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(PLAIN)),
        ("members.gz", b"".join(gzip.compress(line(record)) for record in RECORDS) + b"\0" * 100),
        ("frames.zst", b"".join(zstandard.ZstdCompressor().compress(line(record)) for record in RECORDS)),
        ("no_suffix", gzip.compress(PLAIN)),
        ("crlf.jsonl", PLAIN.replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + PLAIN),
        ("blank.jsonl", b"\n  \n" + PLAIN.replace(b"\n", b"\n\n") + b"\r\n"),
        ("no_newline.jsonl", PLAIN[:-1]),
    ],
)
def test_every_dressing_gives_the_same_records(tmp_path, expected, name, packed):
    (tmp_path / name).write_bytes(packed)
    dataset = opened(tmp_path, tmp_path / name)
    assert contents(dataset) == contents(expected)
    assert dataset.warnings == ()
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i].topk_logits, expected[i].topk_logits)


def test_packed_and_plain_have_one_fingerprint(tmp_path, expected):
    (tmp_path / "a.gz").write_bytes(gzip.compress(PLAIN))
    assert opened(tmp_path, tmp_path / "a.gz").fingerprint == expected.fingerprint
    (tmp_path / "b.jsonl").write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    assert opened(tmp_path, tmp_path / "b.jsonl").fingerprint != expected.fingerprint


def test_several_files_templates_and_globs_are_read_in_order(tmp_path, expected):
    names = [write(tmp_path / f"many/part_{i}.jsonl", [RECORDS[i]]) for i in range(5)]
    write(tmp_path / "many/manifest.json", [{"top_k": 5}])  # a glob passes over it
    assert contents(opened(tmp_path, *names)) == contents(expected)
    assert contents(opened(tmp_path, tmp_path / "many/part_CHUNK_ID.jsonl", n_chunks=5)) == contents(expected)
    assert contents(opened(tmp_path, tmp_path / "many/*")) == contents(expected)


def test_chunks_and_globs_are_ordered_by_number(tmp_path):
    for i in range(11):
        write(tmp_path / f"t_{i}_of_{i}.jsonl", [])
    ordered = [f"t_{i}_of_{i}.jsonl" for i in range(11)]
    assert [s.path.name for s in resolve((str(tmp_path / "t_CHUNK_ID_of_CHUNK_ID.jsonl"),))] == ordered
    assert [s.path.name for s in resolve((str(tmp_path / "t_*.jsonl"),))] == ordered


def test_chunk_id_is_replaced_in_the_file_name_only(tmp_path):
    write(tmp_path / "CHUNK_ID/t_0.jsonl", RECORDS)
    assert len(opened(tmp_path, tmp_path / "CHUNK_ID/t_CHUNK_ID.jsonl")) == 5
    said = refused(tmp_path, tmp_path / "CHUNK_ID/t.jsonl")
    assert "replaced in the file name only" in said
    assert "'t.jsonl'" in said


@pytest.mark.parametrize(
    ("numbers", "n_chunks", "parts"),
    [
        ([0, 1, 3, 4, 6], None, ["found 5 chunks (0-1, 3-4, 6)", "missing: 2, 5;"]),
        ([1, 2], None, ["missing: 0;", "numbered from 0", "glob"]),
        ([0, 1], 4, ["found 2 chunks (0-1), expected 4 (0-3)", "missing: 2-3", "data.n_chunks"]),
        ([0, 1, 2], 2, ["extra: 2;", "missing: none"]),
        ([0, 20261231], None, ["expected 20261232", "missing: 1-20261230;"]),
        ([], None, ["no chunk found", "expected t_0.jsonl"]),
    ],
)
def test_missing_and_extra_chunks_are_listed(tmp_path, numbers, n_chunks, parts):
    for number in numbers:
        write(tmp_path / f"t_{number}.jsonl", RECORDS)
    said = refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl", n_chunks=n_chunks)
    assert [part for part in parts if part not in said] == []


def test_a_chunk_number_twice_is_refused(tmp_path):
    for name in ("t_0.jsonl", "t_1.jsonl", "t_01.jsonl"):
        write(tmp_path / name, RECORDS)
    assert "chunk 1 is there twice" in refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl")


def test_records_of_a_chunk_are_counted(tmp_path):
    write(tmp_path / "t_0.jsonl", RECORDS)
    write(tmp_path / "t_1.jsonl", RECORDS[:2])
    said = refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl", n_examples_per_chunk=5)
    for part in ("t_1.jsonl", "holds 2 records", "n_examples_per_chunk says 5"):
        assert part in said
    assert len(opened(tmp_path, tmp_path / "t_CHUNK_ID.jsonl")) == 7


def test_paths_that_cannot_be_read(tmp_path):
    write(tmp_path / "train.jsonl", RECORDS)
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "link.jsonl")
    os.symlink(tmp_path / "train.jsonl", tmp_path / "again.jsonl")
    os.mkfifo(tmp_path / "fifo")
    for path, parts in {
        "trian.jsonl": ["no such file", "did you mean train.jsonl?"],
        "link.jsonl": ["symbolic link", "gone.jsonl", "missing"],
        "nothing/*.jsonl": ["no file matches"],
        ".": ["directory", "glob"],
        "fifo": ["not a regular file"],
        "nowhere/t_CHUNK_ID.jsonl": ["nowhere: cannot list", "No such file"],
    }.items():
        said = refused(tmp_path, tmp_path / path)
        assert [part for part in parts if part not in said] == []
    assert "no data paths" in refused(tmp_path)
    assert "listed twice" in refused(tmp_path, tmp_path / "train.jsonl", tmp_path / "again.jsonl")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "give this user the permission"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check that the disk is there"),
    ],
)
def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch, number, remedy):
    write(tmp_path / "a.jsonl", RECORDS)
    real_open = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "a.jsonl":
            raise OSError(number, os.strerror(number))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    said = refused(tmp_path, tmp_path / "a.jsonl")
    assert "a.jsonl: cannot read" in said
    assert os.strerror(number) in said
    assert remedy in said


def test_an_empty_file_is_refused(tmp_path):
    for name, packed in {"a.jsonl": b"", "blank.jsonl": b"\n\n", "a.gz": gzip.compress(b"")}.items():
        (tmp_path / name).write_bytes(packed)
        assert "holds no record" in refused(tmp_path, tmp_path / name)


def test_a_file_cut_inside_a_record(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_bytes(PLAIN[:-40])
    for _ in range(2):  # the second time from the kept index
        said = refused(tmp_path, path)
        for part in ("cut.jsonl", "ends mid-record after 4 complete records", "data.allow_truncated=True"):
            assert part in said
    dataset = opened(tmp_path, path, allow_truncated=True)
    assert contents(dataset) == [record["tokens"] for record in RECORDS[:4]]
    assert "1 record(s) cut off at the end of a file and dropped" in dataset.summary()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_packed_file_cut_off(tmp_path, pack):
    path = tmp_path / "cut.packed"
    plain = b"".join(line(record) for record in make_records(*[29] * 200))
    path.write_bytes(pack(plain)[: len(pack(plain)) // 2])
    assert "was cut off" in refused(tmp_path, path)
    kept = opened(tmp_path, path, allow_truncated=True)
    assert 10 < len(kept) < 190
    assert len(opened(tmp_path, path, allow_truncated=True)) == len(kept)  # reused
    assert "data.allow_truncated=True" in refused(tmp_path, path)  # though a copy of the part is there


def test_damaged_packed_data_is_refused_even_when_truncation_is_allowed(tmp_path):
    packed = bytearray(gzip.compress(PLAIN))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(packed)
    said = refused(tmp_path, tmp_path / "a.gz", allow_truncated=True)
    assert "damaged near byte" in said
    assert "fetch this file again" in said


def test_unpacking_and_indexing_are_done_once_for_each_state_of_a_file(tmp_path, monkeypatch):
    passes = []
    for module, name in ((decompress, "_unpack"), (index, "build")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: passes.append(name) or real(*a))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(PLAIN))
    for _ in range(3):
        assert len(opened(tmp_path, path)) == 5
    assert passes == ["_unpack", "build"]
    path.write_bytes(gzip.compress(b"".join(line(record) for record in RECORDS[:3])))
    os.utime(path, ns=(1, 1))
    assert len(opened(tmp_path, path)) == 3
    assert passes == ["_unpack", "build"] * 2
    assert len(kept_in(tmp_path / "scratch")) == 2  # the older state's copy and index are gone


def test_a_file_rewritten_at_the_same_size_is_indexed_again(tmp_path, expected):
    path = tmp_path / "plain.jsonl"
    path.write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    os.utime(path, ns=(1, 1))
    assert opened(tmp_path, path).fingerprint != expected.fingerprint


def test_a_damaged_kept_index_is_built_again(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    opened(tmp_path, path)
    (kept,) = kept_in(tmp_path / "scratch")
    kept.write_bytes(kept.read_bytes()[:100])
    assert contents(opened(tmp_path, path)) == [record["tokens"] for record in RECORDS]


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.gz").write_bytes(gzip.compress(PLAIN))

    def full(source, unpacker, out):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decompress, "_unpack", full)
    said = refused(tmp_path, tmp_path / "a.gz")
    assert "No space left" in said
    assert "data.scratch_dir" in said
    assert str(tmp_path / "scratch") in said
    assert kept_in(tmp_path / "scratch") == []
    said = refused(tmp_path, path, scratch_dir=str(path))
    assert "cannot use this scratch directory" in said


def test_the_systems_scratch_is_private(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", RECORDS)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert len(opened(tmp_path, path, scratch_dir=None)) == 5
    (scratch,) = tmp_path.glob("kdjax-*")
    assert scratch.stat().st_mode & 0o777 == 0o700
    scratch.rename(tmp_path / "kdjax-4242")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert "belongs to another user" in refused(tmp_path, path, scratch_dir=None)


def test_the_index_tells_nested_names_from_the_records_own(tmp_path):
    (first, second, third) = RECORDS[:3]
    first = {"metadata": {"tokens": [1, 2], "index": 77}, "contexts": 'say "tokens": [1]'} | first
    second = {"contexts": "{not json}", **second, "answers": None}
    third = {**third, "tokens": [], "index": 2}
    fourth = {"metadata": {"index": 77}, "tokens": [1, 2]}
    found = index.build(write(tmp_path / "a.jsonl", [first, second, third, fourth, {"tokens": "?"}, [1], {"index": 3}]))
    assert found.lengths.tolist() == [23, 7, 0, 2, index.UNREADABLE, index.UNREADABLE, index.UNREADABLE]
    assert found.indices.tolist()[:4] == [0, 1, 2, index.NO_INDEX]
    assert found.lines.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_record_is_one_read_at_its_place(tmp_path, monkeypatch):
    dataset = opened(tmp_path, write(tmp_path / "a.jsonl", RECORDS))
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: reads.append((size, at)) or real(fd, size, at))
    assert dataset[3].tokens.tolist() == RECORDS[3]["tokens"]
    assert reads == [(len(line(RECORDS[3])) - 1, len(b"".join(map(line, RECORDS[:3]))))]
