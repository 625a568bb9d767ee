"""From the configured paths to the files of records behind them.

A path is a file, a glob, or a template whose *file name* holds CHUNK_ID, which stands for 0, 1, 2, ... as in
NeMo-Aligner. A glob passes over manifest.json, which describes the records beside it.
"""

import dataclasses
import difflib
import errno
import glob
import os
import re
import stat
from pathlib import Path

from kdjax.data.errors import explained
from kdjax.types import UserError

CHUNK_ID = "CHUNK_ID"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of records as the configuration named it."""

    path: Path
    entry: int  # which of the configured paths it came from
    is_chunk: bool  # it stands behind a CHUNK_ID template


def resolve(paths: tuple[str, ...], n_chunks: int | None = None) -> list[Source]:
    """Every file behind `paths`, in order; chunks by number, the matches of a glob in natural order.

    Raises UserError for a path that is missing, not a regular file or listed twice, for a glob without
    matches, and for a template whose chunks have gaps or are not `n_chunks`.
    """
    if not paths:
        raise UserError("no data paths given; set data.train to the files of records")
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
                f"{source.path}: the same file is listed twice (also as {seen[real]}); its records would "
                "count double: name it once"
            )
        seen[real] = source.path
    return sources


def _expand(pattern: str, n_chunks: int | None) -> tuple[list[Path], bool]:
    """The files behind one configured path, and whether it is a CHUNK_ID template."""
    path = Path(pattern).expanduser()
    if CHUNK_ID in path.name:
        return _chunks(path, n_chunks), True
    if CHUNK_ID in pattern:
        raise UserError(
            f"{pattern}: CHUNK_ID is replaced in the file name only, and here only the directory contains "
            f"it; put it into the file name {path.name!r}, or list the files"
        )
    if os.path.lexists(path) or not glob.has_magic(pattern):
        return [path], False
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = sorted((m for m in matches if m.name != MANIFEST), key=_natural)
    if not matches:
        raise UserError(f"{pattern}: no file matches; check the directory and the pattern")
    return matches, False


def _chunks(template: Path, n_chunks: int | None) -> list[Path]:
    """The files behind a CHUNK_ID template, by number. Errors list what was found and what is missing."""
    head, *middle, tail = template.name.split(CHUNK_ID)
    shape = re.escape(head) + r"(\d+)" + "".join(re.escape(part) + r"\1" for part in middle) + re.escape(tail)
    with explained(template.parent, "list this directory of chunks"):
        names = sorted(os.listdir(template.parent), key=lambda name: _natural(Path(name)))
    numbered: dict[int, str] = {}
    for name in names:
        if match := re.fullmatch(shape, name):
            number = int(match[1])
            if number in numbered:
                raise UserError(f"{template}: chunk {number} is there twice: {numbered[number]} and {name}; remove one")
            numbered[number] = name
    if not numbered:
        raise UserError(f"{template}: no chunk found; expected {head}0{tail} and so on in {template.parent}")
    found = _runs(sorted(numbered))
    count = n_chunks if n_chunks is not None else max(numbered) + 1
    missing, extra = _gaps(found, count), _runs([number for number in sorted(numbered) if number >= count])
    if missing or extra:
        raise UserError(
            f"{template}: found {len(numbered)} chunks ({_listed(found)}), expected {count} "
            f"({_listed([(0, count - 1)])}); missing: {_listed(missing)}; extra: {_listed(extra)}; chunks are "
            "numbered from 0: bring the missing files, correct data.n_chunks, or give a glob"
        )
    return [template.parent / numbered[number] for number in sorted(numbered)]


def _require_regular_file(path: Path) -> None:
    with explained(path, "read this file of records"):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a symbolic link to {os.readlink(path)}, which is missing; restore it or relink")
        if not path.exists():
            siblings = os.listdir(path.parent) if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, siblings, n=1)
            raise UserError(f"{path}: no such file; {f'did you mean {near[0]}?' if near else 'check the path'}")
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: not a regular file; records are read at any position, so save it to one")
        with path.open("rb"):
            pass


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key under which part_2 comes before part_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive integers in ascending ones."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _gaps(runs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """(first, last) of each stretch of range(count) that no run covers."""
    edges = zip([(-1, -1), *runs], [*runs, (count, count)], strict=True)
    between = [(before + 1, min(after, count) - 1) for (_, before), (after, _) in edges]
    return [(first, last) for first, last in between if first <= last]


def _listed(runs: list[tuple[int, int]]) -> str:
    """Runs for people: "0-3, 7"."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
