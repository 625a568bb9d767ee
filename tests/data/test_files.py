"""From paths to uncompressed, indexed files: templates, globs, damaged files, the scratch directory."""

import errno
import gzip
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard
from record_files import VOCAB, config, line, make_record, make_records, write

from kdjax.data import open_dataset
from kdjax.data.files import decompress, index
from kdjax.data.files.paths import Source, find_sources
from kdjax.data.files.scratch import remove_stale, state_key
from kdjax.types import UserError

RECORDS = make_records(23, 7, 11, 5, 13)
PLAIN = b"".join(line(record) for record in RECORDS)


def kept_in(scratch):
    """What is there except the lock files."""
    return [path for path in scratch.iterdir() if path.suffix != ".lock"]


def opened(tmp_path, *paths, **knobs):
    return open_dataset(tuple(str(path) for path in paths), config(tmp_path, **knobs), vocab_size=VOCAB)


def refused(tmp_path, *paths, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, *paths, **knobs)
    return str(caught.value)


def contents(dataset):
    return [dataset[i].tokens.tolist() for i in range(len(dataset))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    (directory / "plain.jsonl").write_bytes(PLAIN)
    dataset = opened(directory, directory / "plain.jsonl")
    assert contents(dataset) == [record["tokens"] for record in RECORDS]
    return dataset


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.jsonl.gz", gzip.compress(PLAIN)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(PLAIN)),
        ("members.gz", b"".join(gzip.compress(line(record)) for record in RECORDS) + b"\0" * 100),
        ("frames.zst", b"".join(zstandard.ZstdCompressor().compress(line(record)) for record in RECORDS)),
        ("no_suffix", gzip.compress(PLAIN)),
        ("crlf.jsonl", PLAIN.replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + PLAIN),
        ("blank.jsonl", b"\n  \n" + PLAIN.replace(b"\n", b"\n\n") + b"\r\n"),
        ("indented.jsonl", b"".join(b"  " + line(record) for record in RECORDS)),
        ("no_newline.jsonl", PLAIN[:-1]),
    ],
)
def test_every_way_of_storing_gives_the_same_records(tmp_path, expected, name, stored):
    (tmp_path / name).write_bytes(stored)
    dataset = opened(tmp_path, tmp_path / name)
    assert contents(dataset) == contents(expected)
    assert dataset.warnings == ()
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i].topk_logits, expected[i].topk_logits)


def test_a_byte_order_mark_is_skipped_only_at_the_start(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(PLAIN + b"\xef\xbb\xbf" + line(RECORDS[0]) + line(RECORDS[1]))
    assert index.build(tmp_path / "a.jsonl").lengths.tolist() == [23, 7, 11, 5, 13, index.UNREADABLE, 7]


def test_large_files_are_decompressed_in_pieces(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("kdjax.cli.Progress.add", lambda bar, amount, text="": seen.append((bar._doing, amount)))
    monkeypatch.setattr(decompress, "READ_BYTES", 1000)
    for name, pack in (("a.gz", gzip.compress), ("a.zst", zstandard.ZstdCompressor().compress)):
        seen.clear()
        stored = pack(PLAIN)
        (tmp_path / name).write_bytes(stored)
        assert len(opened(tmp_path, tmp_path / name)) == 5
        sizes = [amount for doing, amount in seen if doing == f"decompressing {name}"]
        assert sizes == [1000] * (len(stored) // 1000) + [len(stored) % 1000]
        assert sum(amount for doing, amount in seen if doing.startswith("indexing")) == len(PLAIN)


def test_compressed_and_plain_files_have_one_fingerprint(tmp_path, expected):
    (tmp_path / "a.gz").write_bytes(gzip.compress(PLAIN))
    assert opened(tmp_path, tmp_path / "a.gz").fingerprint == expected.fingerprint
    (tmp_path / "b.jsonl").write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    assert opened(tmp_path, tmp_path / "b.jsonl").fingerprint != expected.fingerprint


def test_several_files_templates_and_globs_are_read_in_order(tmp_path, expected):
    names = [write(tmp_path / f"many/part_{i}.jsonl", [RECORDS[i]]) for i in range(5)]
    write(tmp_path / "many/manifest.json", [{"top_k": 5}])  # skipped by a glob
    assert contents(opened(tmp_path, *names)) == contents(expected)
    assert contents(opened(tmp_path, tmp_path / "many/part_CHUNK_ID.jsonl", n_chunks=5)) == contents(expected)
    dataset = opened(tmp_path, tmp_path / "many/*")
    assert contents(dataset) == contents(expected)
    assert dataset.summary()[0] == "5 files, 5 records, 59 tokens"


def test_sources_say_how_they_were_named(tmp_path):
    a, t, g = (write(tmp_path / name, RECORDS) for name in ("a.jsonl", "t_0.jsonl", "g.jsonl"))
    paths = tuple(str(tmp_path / name) for name in ("a.jsonl", "t_CHUNK_ID.jsonl", "g*"))
    assert find_sources(paths) == [Source(a, 0, False), Source(t, 1, True), Source(g, 2, False)]


def test_chunks_and_globs_are_ordered_by_number(tmp_path):
    for i in range(11):
        write(tmp_path / f"t_{i}_of_{i}.jsonl", [])
    write(tmp_path / "t_3_of_4.jsonl", [])  # not a chunk: the two numbers differ
    ordered = [f"t_{i}_of_{i}.jsonl" for i in range(11)]
    assert [s.path.name for s in find_sources((str(tmp_path / "t_CHUNK_ID_of_CHUNK_ID.jsonl"),))] == ordered
    ordered.insert(4, "t_3_of_4.jsonl")
    assert [s.path.name for s in find_sources((str(tmp_path / "t_*.jsonl"),))] == ordered


def test_paths_may_use_the_home_directory_and_look_like_globs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "b[1].jsonl", "t.x_0.jsonl", "tax_0.jsonl"):
        write(tmp_path / name, RECORDS)
    paths = ("~/a.jsonl", "~/b[1].jsonl", "~/t.x_CHUNK_ID.jsonl", "~/**/tax_*")
    names = ["a.jsonl", "b[1].jsonl", "t.x_0.jsonl", "tax_0.jsonl"]
    assert [source.path.name for source in find_sources(paths)] == names


def test_chunk_id_is_replaced_in_the_file_name_only(tmp_path):
    write(tmp_path / "CHUNK_ID/t_0.jsonl", RECORDS)
    assert len(opened(tmp_path, tmp_path / "CHUNK_ID/t_CHUNK_ID.jsonl")) == 5
    message = refused(tmp_path, tmp_path / "CHUNK_ID/t.jsonl")
    assert "replaced only in the file name" in message
    assert "'t.jsonl'" in message


@pytest.mark.parametrize(
    ("numbers", "n_chunks", "parts"),
    [
        ([0, 1, 3, 4, 6], None, ["found 5 chunks (0-1, 3-4, 6), expected 7 (0-6)", "missing: 2, 5; extra: none;"]),
        ([1, 2], None, ["missing: 0;", "numbered from 0", "glob"]),
        ([0, 1], 4, ["found 2 chunks (0-1), expected 4 (0-3)", "missing: 2-3", "data.n_chunks"]),
        ([0, 1, 2], 2, ["extra: 2;", "missing: none"]),
        ([0, 1, 5, 6, 9], 3, ["missing: 2; extra: 5-6, 9;"]),
        ([0, 20261231], None, ["expected 20261232", "missing: 1-20261230;"]),
        ([], None, ["no chunk found", "expected t_0.jsonl"]),
    ],
)
def test_missing_and_extra_chunks_are_listed(tmp_path, numbers, n_chunks, parts):
    for number in numbers:
        write(tmp_path / f"t_{number}.jsonl", RECORDS)
    message = refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl", n_chunks=n_chunks)
    assert [part for part in parts if part not in message] == []


def test_a_chunk_number_twice_is_refused(tmp_path):
    for name in ("t_0.jsonl", "t_1.jsonl", "t_01.jsonl"):
        write(tmp_path / name, RECORDS)
    assert "chunk 1 exists twice: t_" in refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl")


def test_records_of_a_chunk_are_counted(tmp_path):
    write(tmp_path / "t_0.jsonl", RECORDS)
    second = write(tmp_path / "t_1.jsonl", RECORDS[:2])
    message = refused(tmp_path, tmp_path / "t_CHUNK_ID.jsonl", n_examples_per_chunk=5)
    for part in ("t_1.jsonl", "holds 2 records", "n_examples_per_chunk is 5"):
        assert part in message
    assert len(opened(tmp_path, tmp_path / "t_CHUNK_ID.jsonl")) == 7
    assert len(opened(tmp_path, second, n_examples_per_chunk=5)) == 2  # not a chunk


def test_paths_that_cannot_be_read(tmp_path):
    write(tmp_path / "train.jsonl", RECORDS)
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "link.jsonl")
    os.symlink(tmp_path / "train.jsonl", tmp_path / "again.jsonl")
    os.mkfifo(tmp_path / "fifo")
    for path, parts in {
        "trian.jsonl": ["no such file; did you mean train.jsonl?"],
        "xyz": ["no such file; check the path"],
        "no_directory/train.jsonl": ["no such file; check the path"],
        "link.jsonl": [f"this symbolic link to {tmp_path}/gone.jsonl is broken"],
        "nothing/*.jsonl": ["no file matches"],
        ".": ["cannot read this record file: Is a directory", "glob"],
        "fifo": ["not a regular file"],
        "nowhere/t_CHUNK_ID.jsonl": ["nowhere: cannot list", "No such file or directory; check the path"],
    }.items():
        message = refused(tmp_path, tmp_path / path)
        assert [part for part in parts if part not in message] == []
    assert "no data paths" in refused(tmp_path)
    message = refused(tmp_path, tmp_path / "train.jsonl", tmp_path / "again.jsonl")
    assert message.startswith(f"{tmp_path}/again.jsonl: this file is listed twice (also as {tmp_path}/train.jsonl)")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "grant this user access"),
        (errno.EPERM, "grant this user access"),
        (errno.EMFILE, "raise the limit on open files (ulimit -n)"),
        (errno.EDQUOT, "free some space, or set data.scratch_dir"),
        (errno.EROFS, "set data.scratch_dir to a writable"),
        (errno.EIO, "check that the disk is mounted and healthy"),
        (None, "check that the disk is mounted and healthy"),
    ],
)
def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch, number, remedy):
    write(tmp_path / "a.jsonl", RECORDS)
    real_open = Path.open
    error = OSError("lost") if number is None else OSError(number, os.strerror(number))

    def refuse(path, *args, **kwargs):
        if path.name == "a.jsonl":
            raise error
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    reason = "lost" if number is None else os.strerror(number)
    message = refused(tmp_path, tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl: cannot read this record file: {reason}; {remedy}")


def test_an_empty_file_is_refused(tmp_path):
    for name, stored in {"a.jsonl": b"", "blank.jsonl": b"\n\n", "a.gz": gzip.compress(b"")}.items():
        (tmp_path / name).write_bytes(stored)
        assert "holds no record" in refused(tmp_path, tmp_path / name)


def test_a_file_cut_inside_a_record(tmp_path, caplog):
    path = tmp_path / "cut.jsonl"
    path.write_bytes(PLAIN[:-40])
    for _ in range(2):  # the second time from the stored index
        message = refused(tmp_path, path)
        for part in ("cut.jsonl: ends in the middle of a record, after 4 complete ones", "data.allow_truncated=True"):
            assert part in message
    dataset = opened(tmp_path, path, allow_truncated=True)
    assert contents(dataset) == [record["tokens"] for record in RECORDS[:4]]
    assert dataset.summary()[-1] == "1 record dropped: cut off at the end of a file"
    assert "dropping the incomplete one" in caplog.text
    assert not [text for text in opened(tmp_path, write(tmp_path / "b", RECORDS)).summary() if "cut off" in text]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_compressed_file_cut_off(tmp_path, compress, caplog):
    path = tmp_path / "cut.compressed"
    rng = np.random.default_rng(0)
    records = [make_record(seed, 5, contexts=rng.bytes(3000).hex()) for seed in range(100)]
    stored = compress(b"".join(map(line, records)))
    path.write_bytes(stored[: len(stored) // 2])
    assert "was cut off" in refused(tmp_path, path)
    kept = opened(tmp_path, path, allow_truncated=True)
    assert 10 < len(kept) < 90
    assert "using the records before the cut" in caplog.text
    assert "1 record dropped: cut off at the end of a file" in kept.summary()
    caplog.clear()
    again = opened(tmp_path, path, allow_truncated=True)
    assert (len(again), again.fingerprint) == (len(kept), kept.fingerprint)
    assert "using the records before the cut" not in caplog.text  # the partial copy was reused
    assert "data.allow_truncated=True" in refused(tmp_path, path)  # even though there is a partial copy
    path.write_bytes(stored)
    assert len(opened(tmp_path, path, allow_truncated=True)) == 100


def test_a_file_cut_off_between_members_has_all_it_needs(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(line(RECORDS[0])) + gzip.compress(line(RECORDS[1]))[:12])
    assert "was cut off" in refused(tmp_path, tmp_path / "a.gz")
    assert len(opened(tmp_path, tmp_path / "a.gz", allow_truncated=True)) == 1


def test_damaged_compressed_data_is_refused_even_if_truncation_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(decompress, "READ_BYTES", 500)
    stored = bytearray(gzip.compress(PLAIN))
    stored[1234] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(stored)
    message = refused(tmp_path, tmp_path / "a.gz", allow_truncated=True)
    assert "damaged near byte" in message
    assert int(message.partition("near byte ")[2].partition(":")[0]) % 500 == 0
    assert "copy or download this file again" in message
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 50)
    assert "damaged near byte 0: " in refused(tmp_path, tmp_path / "a.zst")


def test_each_state_of_a_file_is_decompressed_and_indexed_once(tmp_path, monkeypatch):
    passes = []
    for module, name in ((decompress, "_decompress"), (index, "build")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: passes.append(name) or real(*a))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(PLAIN))
    for _ in range(3):
        assert len(opened(tmp_path, path)) == 5
    assert passes == ["_decompress", "build"]
    path.write_bytes(gzip.compress(b"".join(line(record) for record in RECORDS[:3])))
    os.utime(path, ns=(1, 1))
    assert len(opened(tmp_path, path)) == 3
    assert passes == ["_decompress", "build"] * 2
    assert len(kept_in(tmp_path / "scratch")) == 2  # the older state's copy and index are gone


def test_stale_entries_are_removed_and_no_others(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    key = state_key(path)
    digest = key.partition("-")[0]
    names = {f"{key}.jsonl", f"{key}-cut.jsonl", f"{digest}-old.jsonl", f"other{digest}-x", "unrelated"}
    (tmp_path / "scratch").mkdir()
    for name in names:
        (tmp_path / "scratch" / name).touch()
    remove_stale(tmp_path / "scratch", key)
    assert {entry.name for entry in (tmp_path / "scratch").iterdir()} == names - {f"{digest}-old.jsonl"}


def test_a_key_tells_path_size_and_time(tmp_path):
    keys = set()
    for name, size, time in (("a", 1, 1), ("a", 2, 1), ("a", 1, 2), ("b", 1, 1)):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, ns=(time, time))
        keys.add(state_key(tmp_path / name))
    assert len(keys) == 4
    os.symlink(tmp_path / "b", tmp_path / "link")
    assert state_key(tmp_path / "link") in keys
    with pytest.raises(UserError, match="cannot read this record file"):
        state_key(tmp_path / "missing")


def test_a_file_rewritten_at_the_same_size_is_indexed_again(tmp_path, expected):
    path = tmp_path / "plain.jsonl"
    path.write_bytes(PLAIN)
    os.utime(path, ns=(2, 2))
    assert opened(tmp_path, path).fingerprint == expected.fingerprint
    path.write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    os.utime(path, ns=(1, 1))
    assert opened(tmp_path, path).fingerprint != expected.fingerprint


def test_a_damaged_stored_index_is_built_again(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", RECORDS)
    opened(tmp_path, path)
    (kept,) = kept_in(tmp_path / "scratch")
    whole = kept.read_bytes()
    for damaged in (whole[:100], b"", b"nonsense"):
        caplog.clear()
        kept.write_bytes(damaged)
        assert contents(opened(tmp_path, path)) == [record["tokens"] for record in RECORDS]
        assert "cannot be read; building it again" in caplog.text
    caplog.clear()
    opened(tmp_path, path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_stored_index_keeps_its_form(tmp_path):
    """Its name and its arrays: another form would need another FORMAT."""
    path = write(tmp_path / "a.jsonl", RECORDS[:2])
    opened(tmp_path, path)
    (kept,) = kept_in(tmp_path / "scratch")
    assert kept.name == f"{state_key(path)}.index1.npz"
    with np.load(kept) as stored:
        arrays = {name: stored[name].tolist() for name in stored.files}
    first, second = (len(line(record)) for record in RECORDS[:2])
    assert arrays == {
        "offsets": [0, first],
        "sizes": [first - 1, second - 1],
        "lengths": [23, 7],
        "indices": [0, 1],
        "lines": [1, 2],
        "digest": index.build(path).digest,
        "is_cut": False,
    }
    assert len(arrays["digest"]) == 32


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.gz").write_bytes(gzip.compress(PLAIN))

    def full(source, make_stream, out):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decompress, "_decompress", full)
    message = refused(tmp_path, tmp_path / "a.gz")
    for part in (str(tmp_path / "scratch"), "cannot write this file: No space left", "data.scratch_dir"):
        assert part in message
    assert kept_in(tmp_path / "scratch") == []
    assert "cannot use this scratch directory" in refused(tmp_path, path, scratch_dir=str(path))


def test_the_scratch_directory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", RECORDS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(opened(tmp_path, path, scratch_dir="~/one/two")) == 5
    assert len(kept_in(tmp_path / "one" / "two")) == 1
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert len(opened(tmp_path, path, scratch_dir=None)) == 5
    (scratch,) = tmp_path.glob("kdjax-*")
    assert scratch.name == f"kdjax-{os.getuid()}"
    assert scratch.stat().st_mode & 0o777 == 0o700
    scratch.rename(tmp_path / "kdjax-4242")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert "belongs to another user" in refused(tmp_path, path, scratch_dir=None)
    assert len(opened(tmp_path, path, scratch_dir=str(tmp_path / "kdjax-4242"))) == 5  # as it was named


@pytest.mark.parametrize(
    ("stored", "length", "number"),
    [
        (RECORDS[0], 23, 0),
        ({"metadata": {"tokens": [1, 2], "index": 77}, "contexts": 'say "tokens": [1]'} | RECORDS[0], 23, 0),
        ({"contexts": "{not json}", **RECORDS[1], "answers": None}, 7, 1),
        ({"contexts": '"index": 5,', "tokens": [1, 2, 3], "index": 2}, 3, 2),
        ({"contexts": '"tokens": [5]', "tokens": [1, 2, 3], "index": 2}, 3, 2),
        ({"contexts": '"tokens"', "tokens": [1, 2, 3]}, 3, -1),
        ({"tokens": [], "index": 2}, 0, 2),
        ({"tokens": [7], "index": 2}, 1, 2),
        ({"metadata": {"index": 77}, "tokens": [1, 2]}, 2, -1),
        ({"tokens": [1, 2], "index": -3}, 2, -1),
        ({"tokens": [1, 2], "index": 10**18 - 1}, 2, 10**18 - 1),
        ({"tokens": [1, 2], "index": 10**18}, 2, -1),
        ({"tokens": [1, 2], "index": {"a": 1}}, 2, -1),
        ({"tokens": [1, 2], "index": 2**63 - 1, "a": {}}, 2, 2**63 - 1),
        ({"tokens": [1, 2], "index": 2**63, "a": {}}, 2, -1),
        ({"tokens": [1, 2], "index": 0, "a": {}}, 2, 0),
        ({"tokens": [1, 2], "index": -1, "a": {}}, 2, -1),
        ({"tokens": [1, 2], "index": True, "a": {}}, 2, -1),
        ({"tokens": [1, 2], "index": "5"}, 2, -1),
        ({"tokens": "?", "index": 3}, -1, -1),
        ({"tokens": "?", "index": 3, "a": {}}, -1, 3),
        ([1], -1, -1),
        ({"index": 3}, -1, 3),
    ],
)
def test_the_index_tells_nested_names_from_the_records_own(tmp_path, stored, length, number):
    found = index.build(write(tmp_path / "a.jsonl", [stored, RECORDS[1]]))
    assert found.lengths.tolist() == [length, 7]
    assert found.indices.tolist() == [number, 1]
    assert found.lines.tolist() == [1, 2]
    assert not found.is_cut


@pytest.mark.parametrize(
    "text",
    [
        b'{"tokens": [1, 2], "a": {]}',
        b'{"tokens": [1, 2]',
        b'"tokens": [1, 2]}',
        b'{"a": ' + b"[" * 100_000 + b"{" + b"]" * 100_000 + b"}",
    ],
)
def test_lines_that_are_not_json_are_known_from_the_index(tmp_path, text):
    (tmp_path / "a.jsonl").write_bytes(text + b"\n" + line(RECORDS[1]))
    found = index.build(tmp_path / "a.jsonl")
    assert found.lengths.tolist() == [index.UNREADABLE, 7]
    assert found.indices.tolist() == [index.NO_INDEX, 1]
    (tmp_path / "b.jsonl").write_bytes(line(RECORDS[1]) + text)
    found = index.build(tmp_path / "b.jsonl")
    assert found.is_cut
    assert len(found) == 1


def test_a_record_is_one_read_at_its_place(tmp_path, monkeypatch):
    dataset = opened(tmp_path, write(tmp_path / "a.jsonl", RECORDS))
    reads = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: reads.append((size, at)) or real(fd, size, at))
    assert dataset[3].tokens.tolist() == RECORDS[3]["tokens"]
    assert reads == [(len(line(RECORDS[3])) - 1, len(b"".join(map(line, RECORDS[:3]))))]

    def lose(fd, size, at):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", lose)
    with pytest.raises(UserError, match=r"a.jsonl, record 4: cannot read this record: Input/output error"):
        dataset[3]


def test_files_are_closed_with_their_dataset(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)

    def descriptors() -> list[str]:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return [link for link in links if link.is_symlink() and os.readlink(link) == str(path)]

    dataset = opened(tmp_path, path)
    assert len(descriptors()) == 1
    del dataset
    assert descriptors() == []
