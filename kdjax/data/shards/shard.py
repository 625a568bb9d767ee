"""One shard of a cache: an ArrayRecord file of records, the last of which lists the others.

A shard appears under its name only when it is complete, so that a build that was killed leaves none half-written.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int

from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.record_bytes import DIGEST_BYTES, StoredRecord, tokens_hash
from kdjax.data.shards.symbols import DamagedError
from kdjax.types import UserError

SUFFIX = ".arrayrecord"
MAGIC = "kdjax shard 1"
NO_INDEX = -1  # "index" of a record that has none
# A group of one record, so that a read fetches nothing else; records are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0"  # reads are in random order
OPEN_READERS = 128  # each takes a file descriptor, and a large cache has thousands of shards


def shard_name(number: int) -> str:
    """Returns the file name of a shard."""
    return f"shard-{number:05d}{SUFFIX}"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What the last record of a shard says about the others (N records)."""

    lengths: Int[np.ndarray, "N"]  # tokens
    indices: Int[np.ndarray, "N"]  # the "index" of each record, or NO_INDEX
    hashes: Int[np.ndarray, "N"]  # `tokens_hash` of each record's tokens, as uint64

    def __len__(self) -> int:
        return len(self.lengths)


class ShardWriter:
    """Writes one shard. Use `close` when all records are written; without it nothing appears under the name."""

    def __init__(self, path: Path):
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        with explain_os_errors(self._partial, "create this shard"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)
            self._partial.touch()  # ArrayRecord's own errors do not tell a full disk from a missing directory
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)
        self._lengths: list[int] = []
        self._indices: list[int] = []
        self._hashes: list[bytes] = []

    def write(self, record: StoredRecord, encoded: bytes) -> None:
        """Appends a record; `encoded` are its bytes."""
        self._put(encoded)
        self._lengths.append(len(record))
        self._indices.append(NO_INDEX if record.index is None else record.index)
        self._hashes.append(tokens_hash(record.tokens))

    def close(self) -> None:
        """Writes the index and moves the complete shard to its name."""
        index = {
            "magic": MAGIC,
            "lengths": np.array(self._lengths, "<u4").tobytes(),
            "indices": np.array(self._indices, "<i8").tobytes(),
            "hashes": b"".join(self._hashes),
        }
        self._put(msgpack.packb(index))
        with _as_user_error(self._partial, "write this shard"):
            self._writer.close()
        with explain_os_errors(self._partial, "write this shard"):
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
            self._partial.rename(self.path)

    def abandon(self) -> None:
        """Removes what was written."""
        self._partial.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        with _as_user_error(self._partial, "write this shard"):
            self._writer.write(data)


class Shard:
    """An open shard. Safe to read from several threads."""

    def __init__(self, path: Path):
        self.path = path
        with explain_os_errors(path, "read this shard"), path.open("rb"):
            pass
        with _as_user_error(path, "read this shard", "it is damaged or was cut off: copy it again"):
            self.index = self._read_index()

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> bytes:
        """Returns the bytes of record `number`. Raises DamagedError if they cannot be read."""
        try:
            return _reader_of(self).read([int(number)])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise DamagedError(_first_line(error)) from error

    def _read_index(self) -> ShardIndex:
        reader = _reader_of(self)
        count = reader.num_records()
        if not count:
            raise ValueError("it holds no record")
        fields: dict[str, Any] = msgpack.unpackb(reader.read([count - 1])[0])
        if not isinstance(fields, dict) or fields.get("magic") != MAGIC:
            raise ValueError("its last record is not a shard index")
        index = ShardIndex(
            np.frombuffer(fields["lengths"], "<u4").astype(np.int64),
            np.frombuffer(fields["indices"], "<i8"),
            np.frombuffer(fields["hashes"], "<u8"),
        )
        counts = {len(index.lengths), len(index.indices), len(index.hashes), count - 1}
        if len(counts) != 1:
            raise ValueError(f"its index lists {len(index.lengths)} records, and it holds {count - 1}")
        return index


@functools.lru_cache(maxsize=OPEN_READERS)
def _reader_of(shard: Shard) -> Any:
    """Returns the shard's open reader: a new one if many other shards were read since."""
    return array_record_module.ArrayRecordReader(str(shard.path), READER_OPTIONS)


@contextlib.contextmanager
def _as_user_error(
    path: Path, action: str, remedy: str = "check that the disk has room and is healthy"
) -> Iterator[None]:
    """Turns ArrayRecord's errors, and those of a malformed index, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: cannot {action}: {_first_line(error)}; {remedy}") from error


def _first_line(error: BaseException) -> str:
    """Returns an error's message without the source locations that ArrayRecord appends."""
    return re.split(r";? *=== Source Location|\n", str(error))[0]


assert DIGEST_BYTES == 8  # hashes are read as uint64
