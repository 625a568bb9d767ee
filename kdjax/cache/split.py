"""Splits records off a cache into a second one, as for validation: every n-th record, evenly spread.

CACHE stays as it is; OUT_A receives the share --share of its records, and OUT_B the others.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from kdjax.cache.info import summarise
from kdjax.cache.merge import write_selection
from kdjax.data.shards.reader import Cache
from kdjax.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("cache", metavar="CACHE", type=Path)
    parser.add_argument("out_a", metavar="OUT_A", type=Path)
    parser.add_argument("out_b", metavar="OUT_B", type=Path)
    parser.add_argument("--share", type=float, default=0.95, help="of the records in OUT_A (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Splits the cache, or goes on with a split that was interrupted."""
    cache = Cache(arguments.cache)
    count = round(len(cache) * (1 - arguments.share))
    if not 0 < arguments.share < 1 or not 0 < count < len(cache):
        raise UserError(f"--share {arguments.share} of {len(cache)} records leaves one of the two caches empty")
    chosen = set(np.linspace(0, len(cache) - 1, count).round().astype(int).tolist())
    manifest = dataclasses.replace(cache.manifest, shards=(), source={"split_from": cache.manifest.source})
    rest = [(cache, i) for i in range(len(cache)) if i not in chosen]
    for out, part in ((arguments.out_a, rest), (arguments.out_b, [(cache, i) for i in sorted(chosen)])):
        write_selection(out, manifest, part, f"writing {out}")
        print("\n".join(summarise(Cache(out))))
