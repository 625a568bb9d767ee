"""The scratch directory, shared by processes and runs."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from record_files import make_records, open_paths, write

from kdjax.data.files.scratch import atomic_write, exclusive_lock, open_scratch, remove_stale, state_key
from kdjax.types import UserError


def test_one_process_at_a_time_indexes_a_file(tmp_path: Path) -> None:
    inside, most = 0, 0

    def index() -> None:
        nonlocal inside, most
        with exclusive_lock(tmp_path, tmp_path / "records.jsonl"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=index) for _ in range(4)]
    for thread in threads:
        thread.start()
    with exclusive_lock(tmp_path, tmp_path / "other.jsonl"):  # another file is no reason to wait
        for thread in threads:
            thread.join(timeout=10)
    assert most == 1


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    with atomic_write(target) as file:
        (partial,) = (path.name for path in tmp_path.iterdir() if path != target)
        assert partial.startswith(".")
        assert partial.endswith(".tmp")
        file.write(b"new")
        assert target.read_text() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), atomic_write(target):
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_scratch_directory_on_a_full_disk_is_refused(tmp_path, monkeypatch):
    def on_full_disk(dir):
        assert dir == tmp_path
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr("tempfile.TemporaryFile", on_full_disk)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot use this scratch directory: No space left on device"):
        open_scratch(str(tmp_path))


def test_stale_entries_are_removed_and_no_others(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", make_records(23, 7, 11, 5, 13))
    key = state_key(path)
    digest = key.partition("-")[0]
    names = {f"{key}.jsonl", f"{key}-cut.jsonl", f"{digest}-old.jsonl", f"other{digest}-x", "unrelated"}
    (tmp_path / "scratch").mkdir()
    for name in names:
        (tmp_path / "scratch" / name).touch()
    remove_stale(tmp_path / "scratch", key)
    assert {entry.name for entry in (tmp_path / "scratch").iterdir()} == names - {f"{digest}-old.jsonl"}
    # Another process may remove them at the same time.
    monkeypatch.setattr(Path, "glob", lambda directory, pattern: [directory / f"{digest}-gone"])
    remove_stale(tmp_path / "scratch", key)


def test_a_key_tells_path_size_and_time(tmp_path):
    keys = set()
    for name, size, modified in (("a", 1, 1), ("a", 2, 1), ("a", 1, 2), ("b", 1, 1)):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, ns=(modified, modified))
        keys.add(state_key(tmp_path / name))
    assert len(keys) == 4
    # The names of what is in scratch: if they changed, all files would be decompressed and indexed again.
    path_digest, _, state_digest = state_key(tmp_path / "b").partition("-")
    assert path_digest == hashlib.blake2b(bytes(tmp_path / "b"), digest_size=8).hexdigest()
    assert state_digest == "ca30e42721abf3c2"
    os.symlink(tmp_path / "b", tmp_path / "link")
    assert state_key(tmp_path / "link") in keys
    with pytest.raises(UserError, match="cannot read this record file"):
        state_key(tmp_path / "missing")


def test_the_scratch_directory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", make_records(23, 7, 11, 5, 13))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_paths(tmp_path, path, scratch_dir="~/one/two")) == 5
    assert len(list((tmp_path / "one" / "two").glob("*.npz"))) == 1
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert len(open_paths(tmp_path, path, scratch_dir=None)) == 5
    (scratch,) = tmp_path.glob("kdjax-*")
    assert scratch.name == f"kdjax-{os.getuid()}"
    assert scratch.stat().st_mode & 0o777 == 0o700
    scratch.rename(tmp_path / "kdjax-4242")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(UserError, match="kdjax-4242: this scratch directory belongs to another user"):
        open_paths(tmp_path, path, scratch_dir=None)
    assert len(open_paths(tmp_path, path, scratch_dir=str(tmp_path / "kdjax-4242"))) == 5  # as it was named
