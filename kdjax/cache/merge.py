"""Merges caches into one, in their order. Records keep their targets; each gets a new number as its index.

The caches must have been made alike: the same teacher, vocabulary, targets, values and temperatures.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdjax.cache.info import summarise
from kdjax.cache.writer import CacheWriter, plan_shards, progress_of
from kdjax.cli import Progress
from kdjax.data.shards.manifest import CacheManifest
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.types import UserError

# What the caches may differ in.
FREE = {"shards", "first_ids", "top_k", "sequence_length", "source", "license"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("caches", metavar="CACHE", type=Path, nargs="+")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the new cache")


def run(arguments: argparse.Namespace) -> None:
    """Merges the caches, or goes on with a merge that was interrupted."""
    caches = [Cache(path) for path in arguments.caches]
    first = caches[0].manifest
    for cache in caches[1:]:
        _require_alike(caches[0], cache)
    manifests = [cache.manifest for cache in caches]
    manifest = dataclasses.replace(
        first,
        top_k=max(m.top_k for m in manifests),
        sequence_length=max(m.sequence_length for m in manifests),
        source={"merged_from": [m.source for m in manifests]},
        shards=(),
    )
    write_selection(arguments.out, manifest, [(cache, i) for cache in caches for i in range(len(cache))], "merging")
    print("\n".join(summarise(Cache(arguments.out))))


def write_selection(out: Path, manifest: CacheManifest, chosen: Sequence[tuple[Cache, int]], doing: str) -> None:
    """Writes the chosen records of open caches as a new cache, numbered from 0."""
    lengths = []
    for cache, i in chosen:
        shard, number = cache.place(i)
        lengths.append(int(cache.shards[shard].index.lengths[number]))
    shards = plan_shards(lengths)
    caches = list(dict.fromkeys(cache for cache, _ in chosen))
    settings = {"from": [[entry.sha256 for entry in cache.manifest.shards] for cache in caches], "records": len(chosen)}
    writer = CacheWriter(out, manifest, settings)
    with Progress(doing, sum(lengths), "token", delay_s=1.0) as progress:
        for number, numbers in enumerate(shards):
            if not writer.is_done(number):
                writer.write_shard(number, progress_of(_renumbered(chosen, numbers), progress))
    writer.finish(len(shards))


def _renumbered(chosen: Sequence[tuple[Cache, int]], numbers: range) -> Iterator[StoredRecord]:
    for number in numbers:
        cache, i = chosen[number]
        yield dataclasses.replace(cache.read(i), index=number)


def _require_alike(first: Cache, other: Cache) -> None:
    for field in dataclasses.fields(CacheManifest):
        mine, theirs = getattr(first.manifest, field.name), getattr(other.manifest, field.name)
        if field.name not in FREE and mine != theirs:
            raise UserError(
                f"{other.path}: its {field.name} is {theirs!r}, and that of {first.path} is {mine!r}; only caches that "
                "were made alike can be merged"
            )
