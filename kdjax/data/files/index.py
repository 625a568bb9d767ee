"""The index of a file of records: where each one lies and how long it is, found in one pass and kept.

With it any record is one read away, lengths are known without parsing (rows can be packed, over-long records
counted), and a file that is cut off or is no file of records is refused before a step is taken.
"""

import array
import dataclasses
import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kdjax.data.errors import explained, progress_bar
from kdjax.data.files.decompress import PlainFile
from kdjax.data.files.scratch import remove_older, written_whole

log = logging.getLogger(__name__)

FORMAT = 1  # of the kept file; another number is another name
UNREADABLE = -1  # tokens of a line that is no record
NO_INDEX = -1  # index of a record without one

_BOM = b"\xef\xbb\xbf"
_TOKENS = re.compile(rb'"tokens"\s*:\s*\[([^\[\]]*)\]')
_INDEX = re.compile(rb'"index"\s*:\s*(\d{1,18})\s*[,}]')


@dataclasses.dataclass(frozen=True)
class Index:
    """One entry a record (N of them), in file order. Blank lines are not records."""

    offsets: Int[np.ndarray, "N"]  # bytes from the start of the file
    sizes: Int[np.ndarray, "N"]  # bytes, without the line's end
    lengths: Int[np.ndarray, "N"]  # tokens; UNREADABLE where the line is no record
    indices: Int[np.ndarray, "N"]  # the record's "index" field, or NO_INDEX
    lines: Int[np.ndarray, "N"]  # line number, from 1
    digest: str  # blake2b of the whole file
    is_cut: bool  # the last line ends inside a record; it has no entry here

    def __len__(self) -> int:
        return len(self.offsets)


def load_or_build(file: PlainFile, scratch: Path) -> Index:
    """The index kept in `scratch` for this state of the file, or a new one, then kept."""
    kept = scratch / f"{file.key}.index{FORMAT}.npz"
    if kept.exists():
        try:
            return _load(kept)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            log.warning("%s: this kept index cannot be read; building it again", kept)
    index = build(file.path)
    remove_older(scratch, file.key.removesuffix("-cut"))
    fields = dataclasses.asdict(index)
    with written_whole(kept) as out:
        np.savez(out, **fields)
    return index


def _load(kept: Path) -> Index:
    with kept.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("offsets", "sizes", "lengths", "indices", "lines")}
        return Index(**arrays, digest=str(stored["digest"]), is_cut=bool(stored["is_cut"]))


def build(path: Path) -> Index:
    """Read `path` once, line by line. LF, CRLF, a byte-order mark and blank lines are all fine."""
    rows = array.array("q")  # five integers a record
    digest = hashlib.blake2b(digest_size=16)
    offset, last = 0, b""
    log.info("indexing %s", path)
    with (
        explained(path, "read this file of records"),
        path.open("rb", buffering=1 << 20) as file,
        progress_bar(f"indexing {path.name}", path.stat().st_size, "B") as bar,
    ):
        for number, line in enumerate(file, start=1):
            digest.update(line)
            bar.update(len(line))
            skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if record := line[skipped:].strip():
                start = offset + line.index(record[:1], skipped)
                rows.extend((start, len(record), *_outline(record), number))
                last = record
            offset += len(line)
    is_cut = bool(rows) and not _is_json(last)
    table = np.array(rows, np.int64).reshape(-1, 5)
    offsets, sizes, lengths, indices, lines = np.ascontiguousarray(table[:-1].T if is_cut else table.T)
    return Index(offsets, sizes, lengths, indices, lines, digest.hexdigest(), is_cut)


def _outline(line: bytes) -> tuple[int, int]:
    """(tokens, index) of a record, by pattern where that is certain, else by parsing the line."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return UNREADABLE, NO_INDEX
    if line.count(b"{") != 1 or line.count(b'"tokens"') != 1 or line.count(b'"index"') > 1:
        return _outline_by_parsing(line)  # something nested, where these names may mean something else
    tokens, index = _TOKENS.search(line), _INDEX.search(line)
    if tokens is None:
        return UNREADABLE, NO_INDEX
    length = tokens[1].count(b",") + 1 if tokens[1].strip() else 0
    return length, int(index[1]) if index else NO_INDEX


def _outline_by_parsing(line: bytes) -> tuple[int, int]:
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
