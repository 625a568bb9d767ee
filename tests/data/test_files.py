"""Decompression and the index: every way of storing records, damaged and cut files, what is kept in scratch."""

import errno
import gzip
import logging
import os
import zlib

import numpy as np
import pytest
import zstandard
from record_files import line, make_record, make_records, open_paths, token_lists, write

from kdjax.data.files import decompress, index
from kdjax.data.files.scratch import state_key
from kdjax.types import UserError

RECORDS = make_records(23, 7, 11, 5, 13)
PLAIN = b"".join(line(record) for record in RECORDS)


def kept_in(scratch):
    """What is there except the lock files."""
    return [path for path in scratch.iterdir() if path.suffix != ".lock"]


def refused(tmp_path, *paths, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        open_paths(tmp_path, *paths, **knobs)
    return str(caught.value)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    (directory / "plain.jsonl").write_bytes(PLAIN)
    dataset = open_paths(directory, directory / "plain.jsonl")
    assert token_lists(dataset) == [record["tokens"] for record in RECORDS]
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
    dataset = open_paths(tmp_path, tmp_path / name)
    assert token_lists(dataset) == token_lists(expected)
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
        assert len(open_paths(tmp_path, tmp_path / name)) == 5
        sizes = [amount for doing, amount in seen if doing == f"decompressing {name}"]
        assert sizes == [1000] * (len(stored) // 1000) + [len(stored) % 1000]
        assert sum(amount for doing, amount in seen if doing.startswith("indexing")) == len(PLAIN)


def test_compressed_and_plain_files_have_one_fingerprint(tmp_path, expected):
    (tmp_path / "a.gz").write_bytes(gzip.compress(PLAIN))
    assert open_paths(tmp_path, tmp_path / "a.gz").fingerprint == expected.fingerprint
    (tmp_path / "b.jsonl").write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    assert open_paths(tmp_path, tmp_path / "b.jsonl").fingerprint != expected.fingerprint


def test_several_files_templates_and_globs_are_read_in_order(tmp_path, expected):
    names = [write(tmp_path / f"many/part_{i}.jsonl", [RECORDS[i]]) for i in range(5)]
    write(tmp_path / "many/manifest.json", [{"top_k": 5}])  # skipped by a glob
    assert token_lists(open_paths(tmp_path, *names)) == token_lists(expected)
    assert token_lists(open_paths(tmp_path, tmp_path / "many/part_CHUNK_ID.jsonl", n_chunks=5)) == token_lists(expected)
    dataset = open_paths(tmp_path, tmp_path / "many/*")
    assert token_lists(dataset) == token_lists(expected)
    assert dataset.summary()[0] == "5 files, 5 records, 59 tokens"


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
    dataset = open_paths(tmp_path, path, allow_truncated=True)
    assert token_lists(dataset) == [record["tokens"] for record in RECORDS[:4]]
    assert dataset.summary()[-1] == "1 record dropped: cut off at the end of a file"
    assert "dropping the incomplete one" in caplog.text
    assert not [text for text in open_paths(tmp_path, write(tmp_path / "b", RECORDS)).summary() if "cut off" in text]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_compressed_file_cut_off(tmp_path, compress, caplog):
    path = tmp_path / "cut.compressed"
    rng = np.random.default_rng(0)
    records = [make_record(seed, 5, contexts=rng.bytes(3000).hex()) for seed in range(100)]
    stored = compress(b"".join(map(line, records)))
    path.write_bytes(stored[: len(stored) // 2])
    assert "was cut off" in refused(tmp_path, path)
    kept = open_paths(tmp_path, path, allow_truncated=True)
    assert 10 < len(kept) < 90
    assert "using the records before the cut" in caplog.text
    assert "1 record dropped: cut off at the end of a file" in kept.summary()
    caplog.clear()
    again = open_paths(tmp_path, path, allow_truncated=True)
    assert (len(again), again.fingerprint) == (len(kept), kept.fingerprint)
    assert "using the records before the cut" not in caplog.text  # the partial copy was reused
    assert "its data ends before the end mark" in refused(tmp_path, path)  # even though there is a partial copy
    path.write_bytes(stored)
    assert len(open_paths(tmp_path, path, allow_truncated=True)) == 100


def test_files_cut_off_between_records_and_inside_one(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(line(RECORDS[0])) + gzip.compress(line(RECORDS[1]))[:12])
    assert "was cut off" in refused(tmp_path, tmp_path / "a.gz")
    dataset = open_paths(tmp_path, tmp_path / "a.gz", allow_truncated=True)
    assert len(dataset) == 1
    assert dataset.summary()[-1] == "1 record dropped: cut off at the end of a file"
    (tmp_path / "b.jsonl").write_bytes(PLAIN[:-40])
    dataset = open_paths(tmp_path, tmp_path / "a.gz", tmp_path / "b.jsonl", allow_truncated=True)
    assert dataset.summary()[-1] == "2 records dropped: cut off at the end of a file"


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
    passes, kept = [], []

    def watch(module, name):
        real = getattr(module, name)

        def spy(*arguments):
            passes.append(name)
            kept.append(len(list((tmp_path / "scratch").glob("[!.]*"))))
            return real(*arguments)

        monkeypatch.setattr(module, name, spy)

    watch(decompress, "_decompress")
    watch(index, "build")
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(PLAIN))
    for _ in range(3):
        assert len(open_paths(tmp_path, path)) == 5
    assert passes == ["_decompress", "build"]
    path.write_bytes(gzip.compress(b"".join(line(record) for record in RECORDS[:3])))
    os.utime(path, ns=(1, 1))
    assert len(open_paths(tmp_path, path)) == 3
    assert passes == ["_decompress", "build"] * 2
    assert kept == [0, 1] * 2  # the older state makes room first
    assert len(kept_in(tmp_path / "scratch")) == 2  # the older state's copy and index are gone


def test_a_file_rewritten_at_the_same_size_is_indexed_again(tmp_path, expected):
    path = tmp_path / "plain.jsonl"
    path.write_bytes(PLAIN)
    os.utime(path, ns=(2, 2))
    assert open_paths(tmp_path, path).fingerprint == expected.fingerprint
    path.write_bytes(PLAIN.replace(b'"index": 4', b'"index": 9'))
    os.utime(path, ns=(1, 1))
    assert open_paths(tmp_path, path).fingerprint != expected.fingerprint
    assert len(kept_in(tmp_path / "scratch")) == 1  # the older state's index is gone


def test_a_damaged_stored_index_is_built_again(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", RECORDS)
    open_paths(tmp_path, path)
    (kept,) = kept_in(tmp_path / "scratch")
    whole = kept.read_bytes()
    for damaged in (whole[:100], b"", b"nonsense"):
        caplog.clear()
        kept.write_bytes(damaged)
        assert token_lists(open_paths(tmp_path, path)) == [record["tokens"] for record in RECORDS]
        assert "cannot be read; building it again" in caplog.text
    caplog.clear()
    open_paths(tmp_path, path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_stored_index_keeps_its_form(tmp_path):
    """Its name and its arrays: another form would need another FORMAT."""
    path = write(tmp_path / "a.jsonl", RECORDS[:2])
    open_paths(tmp_path, path)
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
    ("text", "length", "number"),
    [
        (b'{"tokens": [1, 2], "index": 1, "index": 2}', 2, 2),  # of equal names JSON takes the last
        (b'{"tokens": [1, 2], "tokens": [1, 2, 3], "index": 1}', 3, 1),
        (b'{"kind": "index", "tokens": [1, 2], "index": 1}', 2, 1),
        (b'{"kind": "tokens", "tokens": [1, 2], "index" : 1}', 2, 1),
        (b'{"tokens" : [ 1 ,2 ] ,"index" :1 }', 2, 1),
        (b'{"tokens": [ ], "index": 1}', 0, 1),
    ],
)
def test_the_index_reads_a_line_as_json_does(tmp_path, text, length, number):
    (tmp_path / "a.jsonl").write_bytes(text + b"\n" + line(RECORDS[1]))
    found = index.build(tmp_path / "a.jsonl")
    assert found.lengths.tolist() == [length, 7]
    assert found.indices.tolist() == [number, 1]


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


def test_padding_may_fill_whole_pieces_between_members(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(decompress, "READ_BYTES", 16)
    (tmp_path / "a.gz").write_bytes((b"\0" * 40).join(gzip.compress(line(record)) for record in RECORDS))
    assert token_lists(open_paths(tmp_path, tmp_path / "a.gz")) == token_lists(expected)


def test_a_compressed_file_cut_off_between_records_is_reported(tmp_path):
    compressor = zlib.compressobj(wbits=31)
    (tmp_path / "a.gz").write_bytes(compressor.compress(PLAIN) + compressor.flush(zlib.Z_SYNC_FLUSH))
    dataset = open_paths(tmp_path, tmp_path / "a.gz", allow_truncated=True)
    assert len(dataset) == len(RECORDS)
    assert "1 record dropped: cut off at the end of a file" in dataset.summary()


def test_records_that_hold_objects_are_read_from_their_start(tmp_path, expected):
    nested = [{"metadata": {"source": {"page": 1}}} | record for record in RECORDS]
    assert token_lists(open_paths(tmp_path, write(tmp_path / "a.jsonl", nested))) == token_lists(expected)
