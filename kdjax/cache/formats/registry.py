"""Finds the files that an import names, and the format that they are in."""

from collections.abc import Sequence
from pathlib import Path

from kdjax.cache.formats import distillkit, maxtext, megatron, nemo, vllm
from kdjax.cache.formats.foreign import Format, Opened, Options
from kdjax.data.files.paths import Source, find_sources
from kdjax.data.shards.reader import is_cache
from kdjax.types import UserError

FORMATS: dict[str, Format] = {  # in the order in which they are tried: from the surest sign to the weakest
    "distillkit": distillkit,
    "megatron": megatron,
    "maxtext": maxtext,
    "vllm": vllm,
    "nemo": nemo,
}
SUFFIXES = (".parquet", ".tar", ".array_record", ".arrayrecord", ".jsonl", ".jsonl.gz", ".jsonl.zst")


def find_inputs(inputs: Sequence[str]) -> list[Source]:
    """Returns the files: those named, and of a directory those with the first of SUFFIXES that any has.

    Raises UserError as `find_sources` does, and for a directory that is a cache already or has no such file.
    """
    patterns = []
    for name in inputs:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            patterns.append(name)
            continue
        if is_cache(directory):
            raise UserError(f"{name}: this is a cache already; kdjax cache merge and split read it")
        suffix = next((suffix for suffix in SUFFIXES if any(directory.glob("*" + suffix))), None)
        if suffix is None:
            raise UserError(f"{name}: no file in this directory ends in {', '.join(SUFFIXES)}; name the files")
        patterns.append(str(directory / f"*{suffix}"))
    return find_sources(tuple(patterns))


def choose(sources: Sequence[Source], wanted: str | None, options: Options) -> str:
    """Returns the format: the `wanted` one, or else the one that all files look like.

    Raises UserError if a file looks like none of them, or if files look like different ones.
    """
    if wanted is not None:
        return wanted
    found: dict[str, Path] = {}
    for source in sources:
        name = next((name for name, each in FORMATS.items() if each.detect(source.path, options)), None)
        if name is None:
            raise UserError(
                f"{source.path}: looks like no format that can be imported; if it is one, name it with --format "
                f"{'|'.join(FORMATS)}"
            )
        found.setdefault(name, source.path)
    if len(found) > 1:
        listed = ", ".join(f"{path} ({name})" for name, path in found.items())
        raise UserError(f"the files are of different formats: {listed}; import each format apart, then merge")
    return next(iter(found))


def open_format(name: str, sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files as the format of this name."""
    return FORMATS[name].open_sources(sources, options)
