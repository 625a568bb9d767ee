"""Writes a cache shard by shard, in any order and by several processes, and goes on after it was killed.

building.json holds the settings until the cache is complete, so that a second run can tell whether it continues the
same cache. A shard counts when its entry (shard-00000.json) lies beside it; all entries become the manifest's list.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.manifest import MANIFEST, CacheManifest, ShardEntry, read_cache_manifest, write_manifest
from kdjax.data.shards.record_bytes import StoredRecord, encode
from kdjax.data.shards.shard import ShardWriter, file_sha256, shard_name
from kdjax.types import UserError

SETTINGS = "building.json"
SHARD_TOKENS = 2**18  # tokens of a shard: what is lost when a build is killed


def plan_shards(lengths: Iterable[int], shard_tokens: int = SHARD_TOKENS) -> list[range]:
    """Returns the records of each shard: as many as fit into `shard_tokens`, at least one."""
    shards, start, tokens, stop = [], 0, 0, 0
    for stop, length in enumerate(lengths):
        if tokens and tokens + length > shard_tokens:
            shards.append(range(start, stop))
            start, tokens = stop, 0
        tokens += length
    return [*shards, range(start, stop + 1)] if tokens else shards


def is_complete(directory: Path, settings: Mapping[str, Any]) -> bool:
    """Returns whether the directory holds a complete cache that was made with these settings."""
    if not (directory / MANIFEST).exists():
        return False
    return read_cache_manifest(directory).source == json.loads(json.dumps(dict(settings)))


class CacheWriter:
    """A cache that is being written.

    Args:
        directory: of the cache; created if missing.
        manifest: what the cache will hold, without its shards.
        settings: everything that decides the content of the records, in JSON's types.

    Raises UserError if the directory holds a complete cache, an incomplete one with other settings, or other files.
    """

    def __init__(self, directory: Path, manifest: CacheManifest, settings: Mapping[str, Any]):
        self.directory, self.manifest = directory, manifest
        self._coding = manifest.coding
        settings = json.loads(json.dumps(dict(settings)))
        path = directory / SETTINGS
        if (directory / MANIFEST).exists():
            raise UserError(f"{directory} holds a complete cache; name another directory, or remove it")
        if path.exists():
            _require_same(path, settings)
            return
        with explain_os_errors(directory, "create this directory"):
            directory.mkdir(parents=True, exist_ok=True)
            others = sorted(entry.name for entry in directory.iterdir())
        if others and not all(name.startswith((SETTINGS, "shard-")) for name in others):
            raise UserError(f"{directory} holds other files ({others[0]}); name a new directory")
        _write_atomically(path, settings)

    def is_done(self, number: int) -> bool:
        """Returns whether the shard is complete."""
        return self._entry_path(number).exists()

    def write_shard(self, number: int, records: Iterable[StoredRecord]) -> None:
        """Writes one shard. It counts as complete only at the end."""
        writer = ShardWriter(self.directory / shard_name(number))
        tokens = unmasked = count = 0
        try:
            for record in records:
                writer.write(record, encode(record, self._coding))
                count, tokens = count + 1, tokens + len(record)
                unmasked += int((record.loss_mask > 0).sum())
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        size = writer.path.stat().st_size
        entry = ShardEntry(writer.path.name, count, tokens, unmasked, size, file_sha256(writer.path))
        _write_atomically(self._entry_path(number), dataclasses.asdict(entry))

    def finish(self, shards: int) -> CacheManifest:
        """Writes the manifest of a cache whose shards are all complete. Only one process may call this."""
        entries = []
        for number in range(shards):
            path = self._entry_path(number)
            with explain_os_errors(path, "read this shard's entry"):
                entries.append(ShardEntry(**json.loads(path.read_text())))
        manifest = dataclasses.replace(self.manifest, shards=tuple(entries))
        write_manifest(self.directory, manifest)
        for number in range(shards):
            self._entry_path(number).unlink()
        (self.directory / SETTINGS).unlink()
        return manifest

    def _entry_path(self, number: int) -> Path:
        return (self.directory / shard_name(number)).with_suffix(".json")


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError, with the differences, unless the settings are those of the cache that was begun."""
    try:
        begun = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove {path.parent} to start over") from error
    differences = [
        f"{key}: {begun.get(key)!r} there, {settings.get(key)!r} now"
        for key in sorted(begun.keys() | settings.keys())
        if begun.get(key) != settings.get(key)
    ]
    if differences:
        raise UserError(
            f"{path.parent} holds a cache that was begun with other settings ({'; '.join(differences)}); repeat the "
            "command with those, name another directory, or remove this one"
        )


def _write_atomically(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path, "write this file"):
        with partial.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)


def progress_of(records: Iterable[StoredRecord], progress: Any) -> Iterator[StoredRecord]:
    """Yields the records and adds their tokens to a progress bar."""
    for record in records:
        yield record
        progress.add(len(record))
