"""From the configured paths to record files: templates, globs, and paths that cannot be read."""

import errno
import os
from pathlib import Path

import pytest

from kdjax.data.files.paths import Source, find_sources
from kdjax.types import UserError


def touch(directory, *names) -> list[Path]:
    """Makes empty files: nothing here reads them."""
    for name in names:
        (directory / name).touch()
    return [directory / name for name in names]


def find(*paths, n_chunks=None) -> list[Source]:
    return find_sources(tuple(str(path) for path in paths), n_chunks)


def refused(*paths, n_chunks=None) -> str:
    with pytest.raises(UserError) as caught:
        find(*paths, n_chunks=n_chunks)
    return str(caught.value)


def test_sources_say_how_they_were_named(tmp_path):
    a, t, g = touch(tmp_path, "a.jsonl", "t_0.jsonl", "g.jsonl")
    (tmp_path / "g_manifest").mkdir()
    touch(tmp_path / "g_manifest", "manifest.json")
    found = find(tmp_path / "a.jsonl", tmp_path / "t_CHUNK_ID.jsonl", tmp_path / "g*.jsonl")
    assert found == [Source(a, 0, False), Source(t, 1, True), Source(g, 2, False)]
    assert "no file matches" in refused(tmp_path / "g_manifest" / "*")  # which describes records and holds none


def test_chunks_and_globs_are_ordered_by_number(tmp_path):
    ordered = [f"t_{i}_of_{i}.jsonl" for i in range(11)]
    touch(tmp_path, *ordered, "t_3_of_4.jsonl", "t_x_of_x.jsonl")  # the last two are not chunks
    assert [source.path.name for source in find(tmp_path / "t_CHUNK_ID_of_CHUNK_ID.jsonl")] == ordered
    touch(tmp_path, "t_\u00b2.jsonl")  # a superscript two is no number
    ordered[4:4] = ["t_3_of_4.jsonl"]
    found = [source.path.name for source in find(tmp_path / "t_*.jsonl")]
    assert found == [*ordered, "t_x_of_x.jsonl", "t_\u00b2.jsonl"]


def test_paths_may_use_the_home_directory_and_look_like_globs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a.jsonl", "b[1].jsonl", "t.x_0.jsonl", "tax_0.jsonl"]
    touch(tmp_path, *names)
    found = find("~/a.jsonl", "~/b[1].jsonl", "~/t.x_CHUNK_ID.jsonl", "~/**/tax_*")
    assert [source.path.name for source in found] == names


def test_chunk_id_is_replaced_in_the_file_name_only(tmp_path):
    (tmp_path / "CHUNK_ID").mkdir()
    touch(tmp_path / "CHUNK_ID", "t_0.jsonl")
    assert len(find(tmp_path / "CHUNK_ID/t_CHUNK_ID.jsonl")) == 1
    message = refused(tmp_path / "CHUNK_ID/t.jsonl")
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
    touch(tmp_path, *(f"t_{number}.jsonl" for number in numbers))
    message = refused(tmp_path / "t_CHUNK_ID.jsonl", n_chunks=n_chunks)
    assert [part for part in parts if part not in message] == []


def test_a_chunk_number_twice_is_refused(tmp_path):
    touch(tmp_path, "t_0.jsonl", "t_1.jsonl", "t_01.jsonl")
    assert "chunk 1 exists twice: t_01.jsonl and t_1.jsonl" in refused(tmp_path / "t_CHUNK_ID.jsonl")


def test_paths_that_cannot_be_read(tmp_path):
    touch(tmp_path, "train.jsonl")
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
        message = refused(tmp_path / path)
        assert [part for part in parts if part not in message] == []
    assert "no data paths" in refused()
    message = refused(tmp_path / "train.jsonl", tmp_path / "again.jsonl")
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
    touch(tmp_path, "a.jsonl")
    real_open = Path.open
    error = OSError("lost") if number is None else OSError(number, os.strerror(number))

    def refuse(path, *args, **kwargs):
        if path.name == "a.jsonl":
            raise error
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    reason = "lost" if number is None else os.strerror(number)
    message = refused(tmp_path / "a.jsonl")
    assert message.startswith(f"{tmp_path}/a.jsonl: cannot read this record file: {reason}; {remedy}")
