"""A cache opened for reading: any record by its number, in one read."""

import bisect
import itertools
from pathlib import Path

from kdjax.data.records import RecordError
from kdjax.data.shards.manifest import MANIFEST, CacheManifest, read_cache_manifest
from kdjax.data.shards.record_bytes import StoredRecord, decode
from kdjax.data.shards.shard import Shard
from kdjax.data.shards.symbols import DamagedError
from kdjax.types import UserError


def is_cache(path: Path) -> bool:
    """Returns whether the path is a directory with a cache, complete or not."""
    return path.is_dir() and ((path / MANIFEST).exists() or any(path.glob("shard-*")))


class Cache:
    """A complete cache. Safe to read from several threads.

    Attributes:
        path: its directory.
        manifest: the content of cache.json.
        shards: its open shards.
    """

    def __init__(self, path: Path):
        if not (path / MANIFEST).exists():
            raise UserError(
                f"{path}: no {MANIFEST}, so this cache is not complete; run the command that builds it again, which "
                "continues where it stopped"
            )
        self.path = path
        self.manifest: CacheManifest = read_cache_manifest(path)
        self._coding = self.manifest.coding
        self.shards = [Shard(path / entry.file) for entry in self.manifest.shards]
        for shard, entry in zip(self.shards, self.manifest.shards, strict=True):
            if len(shard) != entry.records:
                raise UserError(
                    f"{shard.path}: holds {len(shard)} records, and {MANIFEST} lists {entry.records}; copy it again"
                )
        self._ends = list(itertools.accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.manifest.records

    def place(self, i: int) -> tuple[int, int]:
        """Returns shard and number in it of record `i`."""
        shard = bisect.bisect_right(self._ends, i)
        return shard, i - (self._ends[shard] - len(self.shards[shard]))

    def where(self, i: int) -> str:
        """Returns the file and the record's number in it, counted from 1, for messages."""
        shard, number = self.place(i)
        return f"{self.shards[shard].path}, record {number + 1}"

    def read(self, i: int) -> StoredRecord:
        """Returns record `i`. Raises RecordError, which names file and record, if it is damaged."""
        shard, number = self.place(i)
        try:
            record = decode(self.shards[shard].read(number), self._coding)
        except DamagedError as error:
            raise RecordError(
                f"{self.where(i)}: damaged: {error}; copy the shard again, or allow records to be left out with "
                "data.max_bad_records"
            ) from error
        if len(record) != self.shards[shard].index.lengths[number]:
            raise RecordError(f"{self.where(i)}: its length differs from the shard's index; copy the shard again")
        return record
