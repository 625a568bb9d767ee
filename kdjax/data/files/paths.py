"""Finds the record files that the configured paths stand for.

A path is a file, a glob, or a template whose *file name* contains CHUNK_ID, which stands for 0, 1, 2, ... as in
NeMo-Aligner. Globs skip manifest.json, which describes the record files of its directory.
"""

import dataclasses
import difflib
import errno
import glob
import os
import re
import stat
from pathlib import Path

from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.reader import is_cache
from kdjax.types import UserError

CHUNK_ID = "CHUNK_ID"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A record file or a cache, and how the configuration named it."""

    path: Path
    entry: int  # position in the list of configured paths
    is_chunk: bool  # named by a CHUNK_ID template


def find_sources(paths: tuple[str, ...], n_chunks: int | None = None) -> list[Source]:
    """Returns all files that `paths` stand for, in order: chunks by number, matches of a glob in natural order.

    Raises UserError for a path that is missing, not a regular file or listed twice, for a glob without matches, and for
    a template whose chunks have gaps or do not number `n_chunks`.
    """
    if not paths:
        raise UserError("no data paths given; set data.train to the record files")
    sources = []
    for entry, pattern in enumerate(paths):
        found, is_chunk = _expand(pattern, n_chunks)
        for path in found:
            _require_regular_file(path)
            sources.append(Source(path, entry, is_chunk))
    seen: dict[Path, Path] = {}
    for source in sources:
        real = source.path.resolve()
        if real in seen:
            raise UserError(
                f"{source.path}: this file is listed twice (also as {seen[real]}), so that its records would be read "
                "twice per epoch; list it once"
            )
        seen[real] = source.path
    return sources


def _expand(pattern: str, n_chunks: int | None) -> tuple[list[Path], bool]:
    """Returns the files that one configured path stands for, and whether it is a CHUNK_ID template."""
    path = Path(pattern).expanduser()
    if CHUNK_ID in path.name:
        return _chunks(path, n_chunks), True
    if CHUNK_ID in pattern:
        raise UserError(
            f"{pattern}: CHUNK_ID is replaced only in the file name, and this path has it in the directory; put it "
            f"into the file name {path.name!r}, or list the files"
        )
    if os.path.lexists(path) or not glob.has_magic(pattern):
        return [path], False
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = sorted((m for m in matches if m.name != MANIFEST), key=_natural_order)
    if not matches:
        raise UserError(f"{pattern}: no file matches; check the directory and the pattern")
    return matches, False


def _chunks(template: Path, n_chunks: int | None) -> list[Path]:
    """Returns the files of a CHUNK_ID template by number. Errors list the chunks found and those missing."""
    head, *middle, tail = template.name.split(CHUNK_ID)
    shape = re.escape(head) + r"(\d+)" + "".join(re.escape(part) + r"\1" for part in middle) + re.escape(tail)
    with explain_os_errors(template.parent, "list this directory of chunks"):
        names = sorted(os.listdir(template.parent))
    numbered: dict[int, str] = {}
    for name in names:
        if match := re.fullmatch(shape, name):
            number = int(match[1])
            if number in numbered:
                raise UserError(f"{template}: chunk {number} exists twice: {numbered[number]} and {name}; remove one")
            numbered[number] = name
    if not numbered:
        raise UserError(f"{template}: no chunk found; expected {head}0{tail} and so on in {template.parent}")
    found = _runs(sorted(numbered))
    count = n_chunks if n_chunks is not None else max(numbered) + 1
    missing, extra = _gaps(found, count), _runs([number for number in sorted(numbered) if number >= count])
    if missing or extra:
        raise UserError(
            f"{template}: found {len(numbered)} chunks ({_format(found)}), expected {count} "
            f"({_format([(0, count - 1)])}); missing: {_format(missing)}; extra: {_format(extra)}; chunks are "
            "numbered from 0: add the missing files, correct data.n_chunks, or use a glob"
        )
    return [template.parent / numbered[number] for number in sorted(numbered)]


def _require_regular_file(path: Path) -> None:
    with explain_os_errors(path, "read this record file"):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: this symbolic link to {os.readlink(path)} is broken; restore its target or relink it"
            )
        if not path.exists():
            siblings = os.listdir(path.parent) if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, siblings)
            raise UserError(f"{path}: no such file; {f'did you mean {near[0]}?' if near else 'check the path'}")
        mode = path.stat().st_mode
        if is_cache(path):
            return
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file; records are read by seeking, so save them to one")
        with path.open("rb"):
            pass


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key that puts part_2 before part_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Groups ascending integers into (first, last) of each run of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _gaps(runs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Returns (first, last) of each stretch of range(count) that no run covers."""
    edges = zip([(-1, -1), *runs], [*runs, (count, count)], strict=True)
    between = [(before + 1, min(after, count) - 1) for (_, before), (after, _) in edges]
    return [(first, last) for first, last in between if first <= last]


def _format(runs: list[tuple[int, int]]) -> str:
    """Formats runs for an error message: "0-3, 7", or "none"."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
