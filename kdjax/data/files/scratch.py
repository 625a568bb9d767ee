"""The scratch directory: where indices and unpacked copies are kept between runs.

Every name in it starts with a digest of the source's path, then one of its size and modification time: what
belongs to an older state of a file is recognised, and removed when the newer one is written.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kdjax.data.errors import explained
from kdjax.types import UserError


def open_scratch(configured: str | None) -> Path:
    """The directory `configured`, or one under the system's; made if need be, tried by writing."""
    path = Path(configured).expanduser() if configured else Path(tempfile.gettempdir()) / f"kdjax-{os.getuid()}"
    with explained(path, "use this scratch directory"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if configured is None and path.stat().st_uid != os.getuid():
            raise UserError(f"{path}: this scratch directory belongs to another user; set data.scratch_dir")
        with tempfile.TemporaryFile(dir=path) as trial:
            trial.write(b"\0")
    return path


@contextlib.contextmanager
def alone(scratch: Path, source: Path) -> Iterator[None]:
    """Whoever else comes here for `source` waits, so that one process unpacks and indexes it and the others find it.

    Where the file system knows no locks every process does so for itself, which `written_whole` makes safe.
    """
    lock = scratch / f".{_place(source)}.lock"
    with explained(lock, "write this file"):
        file = lock.open("a")
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def state_key(source: Path) -> str:
    """A name for the present state of a file: "<digest of path>-<digest of size and modification time>"."""
    with explained(source, "read this file of records"):
        status = source.stat()
    state = hashlib.blake2b(b"%d %d" % (status.st_size, status.st_mtime_ns), digest_size=8).hexdigest()
    return f"{_place(source)}-{state}"


def _place(source: Path) -> str:
    return hashlib.blake2b(os.fsencode(source.resolve()), digest_size=8).hexdigest()


def remove_older(scratch: Path, key: str) -> None:
    """Delete what was kept for older states of the file of `key`. Readers keep what they have open."""
    place = key.partition("-")[0]
    for kept in scratch.glob(f"{place}-*"):
        if not kept.name.startswith(key):
            kept.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when complete, whoever else writes it at the same time."""
    with explained(target, "write this file"):
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
