"""Records that become unreadable after the data set was opened."""

import errno
import os
from pathlib import Path

import pytest
from record_files import make_records, open_records

from kdjax.types import UserError


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    dataset = open_records(tmp_path, make_records(5, 7, 9))
    (file,) = tmp_path.glob("*.jsonl")
    os.truncate(file, 300)
    with pytest.raises(UserError, match=rf"{file}, record 3: not valid JSON"):
        dataset[2]


def test_a_read_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    dataset = open_records(tmp_path, make_records(5, 7, 9))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"\.jsonl, record 2: cannot read this record: Input/output error; check"):
        dataset[1]
