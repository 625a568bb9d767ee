"""JSON lines, plain or compressed, of which each holds records of some program. Kept open; read by seeking."""

import json
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.cache.formats.foreign import digest_of, make_index
from kdjax.cli import Progress
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.decompress import PlainFile, decompress
from kdjax.data.files.index import UNREADABLE, Index
from kdjax.data.files.paths import Source
from kdjax.data.files.scratch import exclusive_lock, open_scratch
from kdjax.data.records import RecordError
from kdjax.types import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def first_object(path: Path, scratch_dir: str | None) -> dict[str, Any] | None:
    """Returns the first line of a file as a JSON object, None if it is not one."""
    with explain_os_errors(path, "read this record file"):
        plain = _plain(path, scratch_dir)
        with plain.path.open("rb") as file:
            lines = (line.removeprefix(BYTE_ORDER_MARK) for line in file)
            line = next((line for line in lines if line.strip()), b"")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(path: Path, scratch_dir: str | None) -> PlainFile:
    scratch = open_scratch(scratch_dir)
    with exclusive_lock(scratch, path):
        return decompress(path, scratch, allow_truncated=False)


class JsonLines:
    """An open file and where its records are.

    Args:
        source: the file.
        scratch_dir: where a decompressed copy is kept.
        count_records: returns the length of each record of a line, of which one line may hold several. It may raise
            RecordError, and the line counts as one record that cannot be read.
    """

    is_cut = False

    def __init__(
        self, source: Source, scratch_dir: str | None, count_records: Callable[[dict[str, Any]], Sequence[int]]
    ):
        self.source = source
        plain = _plain(source.path, scratch_dir)
        places = list[tuple[int, int, int]]()
        lengths, lines = list[int](), list[int]()
        offset, last = 0, (0, b"")
        with (
            explain_os_errors(plain.path, "read this record file"),
            plain.path.open("rb", buffering=1 << 20) as file,
            Progress(f"indexing {source.path.name}", plain.path.stat().st_size, "B", delay_s=2.0) as progress,
        ):
            for number, line in enumerate(file, start=1):
                progress.add(len(line))
                start, text = offset, line
                offset += len(line)
                if number == 1 and text.startswith(BYTE_ORDER_MARK):
                    start, text = start + len(BYTE_ORDER_MARK), text[len(BYTE_ORDER_MARK) :]
                if not text.strip():
                    continue
                last = number, text
                try:
                    found = count_records(parse(text))
                except RecordError:
                    found = [UNREADABLE]
                places += [(start, len(text), part) for part in range(len(found))]
                lengths += found
                lines += [number] * len(found)
        self._refuse_cut(last, len(set(lines)))
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.index: Index = make_index(lengths, digest_of(source.path), lines)
        with explain_os_errors(plain.path, "read this record file"):
            self._descriptor = os.open(plain.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def object(self, number: int) -> tuple[dict[str, Any], int]:
        """Returns the line with record `number`, and which of its records that is."""
        offset, size, part = self._places[number]
        with explain_os_errors(self.where(number), "read this record"):
            text = os.pread(self._descriptor, int(size), int(offset))
        return parse(text), int(part)

    def where(self, number: int) -> str:
        """Returns the file and the record, counted from 1, for messages."""
        line = int(self.index.lines[number])
        return f"{self.source.path}, record {number + 1}" + ("" if line == number + 1 else f" (line {line})")

    def _refuse_cut(self, last: tuple[int, bytes], count: int) -> None:
        number, text = last
        try:
            json.loads(text or b"{}")
        except (ValueError, RecursionError):
            if not text.endswith(b"\n"):
                raise UserError(
                    f"{self.source.path}: ends in the middle of line {number}, after {count - 1} complete ones; copy "
                    "it again, or remove that line"
                ) from None


def parse(text: bytes) -> dict[str, Any]:
    """Returns the object on a line. Raises RecordError if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not valid JSON ({error}); generate this line again or remove it") from error
    if not isinstance(found, dict):
        raise RecordError(f"a line holds a {type(found).__name__}; it must be a JSON object")
    return found
