"""Output directories that appear complete or not at all, on disks that have room for them."""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kdjax.types import UserError

log = logging.getLogger("kdjax")


def refuse_existing(out: Path, force: bool, marker: str) -> None:
    """Raises UserError when `out` may not be written. Commands call this before they read anything.

    `force` may replace only a directory that holds `marker`, a file that the command writes.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out} exists already; name another directory, or pass --force to replace it")
    if not (out / marker).is_file():
        raise UserError(f"--force replaces only directories that hold {marker}, and {out} does not; move it away")


@contextlib.contextmanager
def output_directory(out: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """Yields a new directory that is renamed to `out` if the block succeeds, and removed if it fails.

    With `force` it replaces `out`. Raises UserError when the disk has less than `nbytes` free, or fills up.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise UserError(
            f"{out.parent} has {free / 1e6:,.1f} MB free and the model may need {nbytes / 1e6:,.1f} MB; "
            "free some space or name a directory on another disk"
        )
    prefix = f".{out.name}.incomplete-"
    for other in out.parent.glob(f"{prefix}*"):
        log.warning("%s is left from a conversion that was killed (delete it), or one is still running", other)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        directory.chmod(0o777 & ~_umask())  # mkdtemp makes directories that only their owner can read
        with _full_disk_errors(out, nbytes):
            yield directory
        _move_into_place(directory, out, force)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _move_into_place(directory: Path, out: Path, force: bool) -> None:
    if not (force and out.exists()):
        directory.rename(out)
        return
    replaced = directory.with_name(directory.name + "-replaced")
    out.rename(replaced)
    try:
        directory.rename(out)
    except BaseException:
        replaced.rename(out)
        raise
    shutil.rmtree(replaced)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _full_disk_errors(out: Path, nbytes: int) -> Iterator[None]:
    """Turns errors of a full disk into UserError. TensorStore's are ValueError or RuntimeError with the OS's text."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        texts = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
        if getattr(error, "errno", None) in texts or any(text in str(error) for text in texts.values()):
            raise UserError(
                f"{out.parent} filled up before {out.name} was complete ({error}); nothing was left behind. "
                f"The model may need {nbytes / 1e6:,.1f} MB: free some space or name a directory on another disk"
            ) from error
        raise
