"""Packed files (gzip, zstd) unpacked once, so that any record can be read at its place.

They are told by their first bytes, not by their names, and may have several members one after the other.
"""

import dataclasses
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from kdjax.data.errors import explained, progress_bar
from kdjax.data.files.scratch import remove_older, state_key, written_whole
from kdjax.types import UserError

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16  # of a packed file at a time; at gzip's limit of 1032:1 they unpack to 65 MiB

_UNPACKERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),  # 31: with gzip's header and checksum
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


@dataclasses.dataclass(frozen=True)
class PlainFile:
    """A file of records as plain lines: the source itself if it was not packed, else its copy in scratch."""

    path: Path
    key: str  # of the source's present state, in scratch
    is_cut: bool = False  # the packed file was cut off, and this is what could be read


class _CutOff(Exception):
    """The packed data ends before its end mark."""


def unpack(source: Path, scratch: Path, allow_truncated: bool) -> PlainFile:
    """`source` as plain lines, unpacked into `scratch` unless it is plain already or was unpacked before.

    A packed file that was cut off is an error, unless `allow_truncated`: then what can be read is kept, under
    another name, so that a later strict reading does not take it for the whole.
    """
    key = state_key(source)
    with explained(source, "read this file of records"), source.open("rb") as file:
        magic = file.read(4)
    unpacker = next((make for start, make in _UNPACKERS.items() if magic.startswith(start)), None)
    if unpacker is None:
        return PlainFile(source, key)
    whole, partial = (
        PlainFile(scratch / f"{key}.jsonl", key),
        PlainFile(scratch / f"{key}-cut.jsonl", f"{key}-cut", is_cut=True),
    )
    if whole.path.exists():
        return whole
    if allow_truncated and partial.path.exists():
        return partial
    remove_older(scratch, key)
    log.info("unpacking %s to %s", source, whole.path)
    try:
        with written_whole(whole.path) as out:
            _unpack(source, unpacker, out)
        return whole
    except _CutOff:
        if not allow_truncated:
            raise UserError(
                f"{source}: this packed file was cut off, its data ends before its end mark; fetch it "
                "again, or keep what can be read with data.allow_truncated=True"
            ) from None
    with written_whole(partial.path) as out:
        try:
            _unpack(source, unpacker, out)
        except _CutOff:
            log.warning("%s: this packed file was cut off; kept the records before the cut", source)
    return partial


def _unpack(source: Path, unpacker: Callable[[], Any], out: IO[bytes]) -> None:
    """Unpack every member of `source` into `out`. _CutOff after the last byte if the last has no end."""
    stream = unpacker()
    for chunk, place in _chunks(source):
        rest = chunk
        while rest:
            if stream.eof:  # another member follows; zeros are padding
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                stream = unpacker()
            try:
                plain = stream.decompress(rest)
            except (zlib.error, zstandard.ZstdError) as error:
                raise UserError(
                    f"{source}: the packed data is damaged near byte {place}: {error}; fetch this file again"
                ) from error
            out.write(plain)
            rest = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise _CutOff


def _chunks(source: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes, where they start) of `source`, piece by piece."""
    with explained(source, "read this packed file"):
        file = source.open("rb")
        size = source.stat().st_size
    with file, progress_bar(f"unpacking {source.name}", size, "B") as bar:
        while True:
            place = file.tell()
            with explained(source, "read this packed file"):
                chunk = file.read(READ_BYTES)
            if not chunk:
                return
            bar.update(len(chunk))
            yield chunk, place
