"""The scratch directory, which keeps indices and decompressed copies of record files between runs.

Each name in it starts with a digest of the source's path, followed by a digest of the source's size and modification
time. Entries for an older state of a file can thus be recognised; they are deleted when newer ones are written.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kdjax.data.errors import explain_os_errors
from kdjax.types import UserError


def open_scratch(configured: str | None) -> Path:
    """Returns the scratch directory, created if missing and checked to be writable.

    Without `configured` it is a directory of this user under the system's temporary directory. Raises UserError if
    the directory cannot be written or if the default one belongs to another user.
    """
    path = Path(configured).expanduser() if configured else Path(tempfile.gettempdir()) / f"kdjax-{os.getuid()}"
    with explain_os_errors(path, "use this scratch directory"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if configured is None and path.stat().st_uid != os.getuid():
            raise UserError(f"{path}: this scratch directory belongs to another user; set data.scratch_dir")
        with tempfile.TemporaryFile(dir=path) as trial:
            trial.write(b"\0")
    return path


@contextlib.contextmanager
def exclusive_lock(scratch: Path, source: Path) -> Iterator[None]:
    """Holds a lock on `source`: one process decompresses and indexes the file, the others wait and reuse the result.

    On a file system without locks every process does the work itself, which `atomic_write` makes safe.
    """
    lock = scratch / f".{_path_digest(source)}.lock"
    with explain_os_errors(lock, "write this file"):
        file = lock.open("a")
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def state_key(source: Path) -> str:
    """Returns a name for the file's present state: "<digest of path>-<digest of size and modification time>"."""
    with explain_os_errors(source, "read this record file"):
        status = source.stat()
    state = hashlib.blake2b(b"%d %d" % (status.st_size, status.st_mtime_ns), digest_size=8).hexdigest()
    return f"{_path_digest(source)}-{state}"


def _path_digest(source: Path) -> str:
    return hashlib.blake2b(os.fsencode(source.resolve()), digest_size=8).hexdigest()


def remove_stale(scratch: Path, key: str) -> None:
    """Deletes what belongs to older states of the file with this `state_key`. Open files stay readable."""
    path_digest = key.partition("-")[0]
    for entry in scratch.glob(f"{path_digest}-*"):
        if not entry.name.startswith(key):
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """Opens a file that gets the name `target` only once it is complete, even if several processes write it."""
    with explain_os_errors(target, "write this file"):
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
