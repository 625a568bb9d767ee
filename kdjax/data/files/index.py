"""The index of a record file: where each record starts and how long it is, found in one pass and kept in scratch.

With the index any record takes one read, lengths are known without parsing (to pack rows and to find over-long
records), and a file that was cut off or holds no records is refused before the first step.
"""

import array
import dataclasses
import hashlib
import json
import logging
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kdjax.cli import Progress
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.decompress import PlainFile
from kdjax.data.files.scratch import atomic_write, remove_stale

log = logging.getLogger(__name__)

FORMAT = 1  # version of the stored index, part of its name
UNREADABLE = -1  # length of a line that is not a record
NO_INDEX = -1  # "index" of a record without that field

_BOM = b"\xef\xbb\xbf"
_TOKENS = re.compile(rb'"tokens"\s*:\s*\[([^\[\]]*)\]')
_INDEX = re.compile(rb'"index"\s*:\s*(\d{1,18})\s*[,}]')


@dataclasses.dataclass(frozen=True)
class Index:
    """One entry per record (N records), in file order. Blank lines are not records."""

    offsets: Int[np.ndarray, "N"]  # bytes from the start of the file
    sizes: Int[np.ndarray, "N"]  # bytes, without the line ending
    lengths: Int[np.ndarray, "N"]  # tokens; UNREADABLE where the line is not a record
    indices: Int[np.ndarray, "N"]  # the record's "index" field, or NO_INDEX
    lines: Int[np.ndarray, "N"]  # line number, from 1
    digest: str  # blake2b of the whole file
    is_cut: bool  # the file ends in the middle of a record, which has no entry here

    def __len__(self) -> int:
        return len(self.offsets)


def load_or_build(file: PlainFile, scratch: Path) -> Index:
    """Returns the index stored in `scratch` for this state of the file, or builds and stores it."""
    stored = scratch / f"{file.key}.index{FORMAT}.npz"
    if stored.exists():
        try:
            return _load(stored)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            log.warning("%s: this stored index cannot be read; building it again", stored)
    index = build(file.path)
    remove_stale(scratch, file.key.removesuffix("-cut"))
    with atomic_write(stored) as out:
        np.savez(out, **dataclasses.asdict(index))
    return index


def _load(path: Path) -> Index:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("offsets", "sizes", "lengths", "indices", "lines")}
        return Index(**arrays, digest=str(stored["digest"]), is_cut=bool(stored["is_cut"]))


def build(path: Path) -> Index:
    """Indexes the file in one pass. Accepts LF and CRLF line endings, a byte-order mark and blank lines."""
    rows = array.array("q")  # five integers per record: its offset, size, length, "index" and line
    digest = hashlib.blake2b(digest_size=16)
    offset, last = 0, b""
    log.info("indexing %s", path)
    with (
        explain_os_errors(path, "read this record file"),
        path.open("rb", buffering=1 << 20) as file,
        Progress(f"indexing {path.name}", path.stat().st_size, "B", delay_s=2.0, lines_to=sys.stdout) as progress,
    ):
        for number, line in enumerate(file, start=1):
            digest.update(line)
            progress.add(len(line))
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if record := line[skipped:].strip():
                start = offset + line.index(record[:1], skipped)
                rows.extend((start, len(record), *_scan(record), number))
                last = record
            offset += len(line)
    is_cut = bool(rows) and not _is_json(last)
    table = np.array(rows, np.int64).reshape(-1, 5)
    offsets, sizes, lengths, indices, lines = np.ascontiguousarray(table[:-1].T if is_cut else table.T)
    return Index(offsets, sizes, lengths, indices, lines, digest.hexdigest(), is_cut)


def _scan(line: bytes) -> tuple[int, int]:
    """Returns a record's number of tokens and its "index": by pattern where that is certain, else by parsing."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return UNREADABLE, NO_INDEX
    if line.count(b"{") != 1 or line.count(b'"tokens"') != 1 or line.count(b'"index"') > 1:
        return _parse(line)  # nested objects or strings, which may hold these names too
    tokens, index = _TOKENS.search(line), _INDEX.search(line)
    if tokens is None:
        return UNREADABLE, NO_INDEX
    length = tokens[1].count(b",") + 1 if tokens[1].strip() else 0
    return length, int(index[1]) if index else NO_INDEX


def _parse(line: bytes) -> tuple[int, int]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return UNREADABLE, NO_INDEX
    tokens, index = record.get("tokens"), record.get("index")
    length = len(tokens) if isinstance(tokens, list) else UNREADABLE
    return length, index if type(index) is int and 0 <= index < 1 << 63 else NO_INDEX


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
