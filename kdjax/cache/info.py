"""Describes a cache: its teacher, its size, bytes a token, and what its targets look like.

--picture FILE.svg|png draws how the bytes, entries and masses are distributed; it needs the extra `plot`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdjax.cache.statistics import Statistics, take_statistics
from kdjax.data.shards.manifest import MANIFEST
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.data.survey import counted

SAMPLE = 256  # records that the statistics are taken from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("cache", metavar="CACHE", type=Path)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg|png", help="draw it; needs the extra plot")


def run(arguments: argparse.Namespace) -> None:
    """Prints the description, and draws it if that is asked for."""
    cache = Cache(arguments.cache)
    if arguments.picture is not None:
        from kdjax.cache import picture

        picture.draw(cache, arguments.picture)
    print("\n".join(summarise(cache)))


def summarise(cache: Cache) -> list[str]:
    """Returns lines to print."""
    manifest = cache.manifest
    size = sum(entry.bytes for entry in manifest.shards) + (cache.path / MANIFEST).stat().st_size
    unmasked = sum(entry.unmasked for entry in manifest.shards)
    found = Statistics()
    for record in sample(cache):
        found += take_statistics(record, manifest)
    targets = {
        "topk": f"the teacher's top {manifest.top_k}" + (f" up to {manifest.top_p:g}" if manifest.top_p else ""),
        "sampled": f"{manifest.draws} draws from the teacher",
        "hybrid": f"the teacher's top entries and {manifest.draws} draws from the rest",
    }[manifest.targets]
    scales = ", ".join(f"{1 / scale:g}" for scale in manifest.target_logits_scales) or "none"
    lines = [
        f"{cache.path}: {counted(len(manifest.shards), 'shard')}, {counted(len(cache), 'record')}, "
        f"{manifest.tokens:,} tokens, {unmasked / max(1, manifest.tokens):.1%} unmasked",
        f"teacher {manifest.teacher or 'not named'}, vocabulary {manifest.vocab_size:,}",
        f"{targets} at each position, {manifest.values} values; logsumexp at temperature {scales}",
        f"{size:,} bytes, {size / max(1, manifest.tokens):.1f} a token",
        f"{found.entries:.1f} entries a position",
    ]
    if manifest.targets != "sampled":
        lines.append(
            f"the entries hold {found.mass:.1%} of the teacher's probability; entropy {found.entropy:.2f} nats or "
            f"more; the teacher's most likely token is the label at {found.agreement:.1%} of positions"
        )
    return lines


def sample(cache: Cache) -> Iterator[StoredRecord]:
    """Yields up to `SAMPLE` records, spread evenly over the cache."""
    for i in np.unique(np.linspace(0, len(cache) - 1, min(len(cache), SAMPLE)).round().astype(int)):
        yield cache.read(int(i))
