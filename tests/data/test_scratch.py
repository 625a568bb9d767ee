"""The scratch directory, shared by processes and runs."""

import os
import threading
import time
from pathlib import Path

import pytest
from record_files import make_records, open_paths, write

from kdjax.data.files.scratch import exclusive_lock, remove_stale, state_key
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


def test_stale_entries_are_removed_and_no_others(tmp_path):
    path = write(tmp_path / "a.jsonl", make_records(23, 7, 11, 5, 13))
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
    for name, size, modified in (("a", 1, 1), ("a", 2, 1), ("a", 1, 2), ("b", 1, 1)):
        (tmp_path / name).write_bytes(b"x" * size)
        os.utime(tmp_path / name, ns=(modified, modified))
        keys.add(state_key(tmp_path / name))
    assert len(keys) == 4
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
