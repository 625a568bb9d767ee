"""What the user sees while files are read: errors with a remedy, and bars for what takes long."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from kdjax.types import UserError

SHOW_AFTER = 2.0  # seconds a pass may take before its bar appears

_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "give this user the permission, or another path",
    errno.EPERM: "give this user the permission, or another path",
    errno.EISDIR: "it is a directory: name the files in it, for example with a glob, DIR/*.jsonl",
    errno.ENOSPC: "the disk is full: free some space, or set data.scratch_dir to another disk",
    errno.EDQUOT: "the quota is used up: free some space, or set data.scratch_dir to another disk",
    errno.EROFS: "the disk is read-only: set data.scratch_dir to one that can be written",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n) above the number of data files",
}


@contextlib.contextmanager
def explained(path: Path | str, doing: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names the path, what was being done, and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check that the disk is there and well")
        raise UserError(f"{path}: cannot {doing}: {error.strerror or error}; {remedy}") from error


def progress_bar(doing: str, total: int, unit: str) -> tqdm:
    """A bar on stderr that shows itself when stderr is a terminal and the work takes more than a moment."""
    return tqdm(total=total, desc=doing, unit=unit, unit_scale=True, delay=SHOW_AFTER, disable=None, leave=False)
