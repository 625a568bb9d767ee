"""Explains the operating system's errors to the user: what failed, why, and what to do about it."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from kdjax.types import UserError

_GRANT = "grant this user access, or use another path"
_FREE = "free some space, or set data.scratch_dir to a directory on another disk"
_REMEDIES: dict[int | None, str] = {
    errno.ENOENT: "check the path",
    errno.EACCES: _GRANT,
    errno.EPERM: _GRANT,
    errno.EISDIR: "list the files in it, for example with a glob such as DIR/*.jsonl",
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EROFS: "set data.scratch_dir to a writable directory",
    errno.EMFILE: "raise the limit on open files (ulimit -n) above the number of data files",
}


@contextlib.contextmanager
def explain_os_errors(path: Path | str, action: str) -> Iterator[None]:
    """Turns an OSError raised in the block into a UserError: "PATH: cannot ACTION: REASON; REMEDY"."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "check that the disk is mounted and healthy")
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}; {remedy}") from error
