"""Decompresses gzip and zstd files once, so that any record can be read by seeking to it.

The format is recognised by the first bytes, not by the name. A file may consist of several gzip members or zstd frames.
"""

import dataclasses
import logging
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from kdjax.cli import Progress
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.scratch import atomic_write, remove_stale, state_key
from kdjax.types import UserError

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16  # compressed bytes per read; at gzip's limit of 1032:1 they expand to 65 MiB

_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {  # by the file's first bytes
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),  # 31: expect gzip's header and checksum
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


@dataclasses.dataclass(frozen=True)
class PlainFile:
    """An uncompressed record file: the source itself, or its decompressed copy in the scratch directory."""

    path: Path
    key: str  # the source's `state_key`; with "-cut" appended for a partial copy
    is_cut: bool = False  # the compressed file was cut off; this holds what could be decompressed


class _CutOff(Exception):
    """The compressed data ends before its end mark."""


def decompress(source: Path, scratch: Path, allow_truncated: bool) -> PlainFile:
    """Returns `source` as an uncompressed file; decompresses it into `scratch` unless that has been done before.

    Raises UserError for a compressed file that was cut off, unless `allow_truncated`: then whatever can be decompressed
    is kept, under another name, so that a later strict read does not mistake it for the whole.
    """
    key = state_key(source)
    with explain_os_errors(source, "read this record file"), source.open("rb") as file:
        magic = file.read(4)
    make_stream = next((make for start, make in _DECOMPRESSORS.items() if magic.startswith(start)), None)
    if make_stream is None:
        return PlainFile(source, key)
    whole = PlainFile(scratch / f"{key}.jsonl", key)
    partial = PlainFile(scratch / f"{key}-cut.jsonl", f"{key}-cut", is_cut=True)
    if whole.path.exists():
        return whole
    if allow_truncated and partial.path.exists():
        return partial
    remove_stale(scratch, key)
    log.info("decompressing %s to %s", source, whole.path)
    try:
        with atomic_write(whole.path) as out:
            _decompress(source, make_stream, out)
        return whole
    except _CutOff:
        if not allow_truncated:
            raise UserError(
                f"{source}: this compressed file was cut off: its data ends before the end mark; copy or download it "
                "again, or use the records before the cut with data.allow_truncated=True"
            ) from None
    with atomic_write(partial.path) as out:
        try:
            _decompress(source, make_stream, out)
        except _CutOff:
            log.warning("%s: this compressed file was cut off; using the records before the cut", source)
    return partial


def _decompress(source: Path, make_stream: Callable[[], Any], out: IO[bytes]) -> None:
    """Decompresses every member of `source` into `out`. Raises _CutOff, after writing all, if the last has no end."""
    stream = make_stream()
    for chunk, offset in _chunks(source):
        rest = chunk
        while rest:
            if stream.eof:  # another member follows, or padding with zeros
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                stream = make_stream()
            try:
                plain = stream.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                raise UserError(
                    f"{source}: the compressed data is damaged near byte {offset}: {error}; copy or download this file "
                    "again"
                ) from error
            out.write(plain)
            rest = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise _CutOff


def _chunks(source: Path) -> Iterator[tuple[bytes, int]]:
    """Yields `source` in pieces of READ_BYTES, each with its offset, and shows the progress."""
    with explain_os_errors(source, "read this compressed file"):
        file = source.open("rb")
        size = source.stat().st_size
    with file, Progress(f"decompressing {source.name}", size, "B", delay_s=2.0, lines_to=sys.stdout) as progress:
        while True:
            offset = file.tell()
            with explain_os_errors(source, "read this compressed file"):
                chunk = file.read(READ_BYTES)
            if not chunk:
                return
            progress.add(len(chunk))
            yield chunk, offset
