"""The run directory: it belongs to one configuration, and only that configuration may resume it."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from kdjax import config as configs
from kdjax.config import Config
from kdjax.types import UserError

log = logging.getLogger("kdjax")


@contextlib.contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Holds RUN for one run: creates it with its config.json, or checks that RUN has the same configuration.

    Also proves that RUN is writable. The lock goes with the process, so that one that was killed leaves none. On a file
    system without locks there is no protection.

    Raises UserError when another process holds RUN, and with the differences when RUN has another configuration.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("a")
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--workdir {workdir}: another process is training there; wait for its end, or name another directory"
            ) from error
        except OSError:
            pass
        _claim(workdir, config)
        yield


def _claim(workdir: Path, config: Config) -> None:
    path = workdir / "config.json"
    try:
        if path.exists() and _has_begun(workdir):
            _compare(workdir, configs.from_json(path.read_text()), config)
        fresh = path.with_suffix(".new")
        fresh.write_text(configs.to_json(config))
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be written: {error}") from error


def _has_begun(workdir: Path) -> bool:
    """Returns whether RUN holds any results; a run that failed before its first metrics left none."""
    log_file = workdir / "metrics.jsonl"
    return (log_file.exists() and log_file.stat().st_size > 0) or any(workdir.glob("checkpoints/*"))


def _compare(workdir: Path, old: Config, new: Config) -> None:
    changed = configs.differences(old, new)
    refused = [change for change in changed if not _may_change(change[0], new)]
    if refused:
        lines = "\n".join(f"  {key}: {before!r} in the run, {now!r} now" for key, before, now in refused)
        hint = ""
        if all(_is_data(key) for key, _, _ in refused):
            hint = ", or set resume.allow_data_change=True to continue with other data"
        raise UserError(
            f"{workdir} holds a run with another configuration:\n{lines}\n"
            f"Use the old values to resume it, or another --workdir to start a new run{hint}."
        )
    for key, before, now in changed:
        log.warning("%s resumes with %s = %r (was %r)", workdir, key, now, before)


def _is_data(key: str) -> bool:
    return key.startswith("data.") or key == "batch.global_size"


def _may_change(key: str, new: Config) -> bool:
    return configs.KNOBS[key].resumable or (new.resume.allow_data_change and _is_data(key))


def check_data(then: str, now: str, config: Config) -> None:
    """Raises UserError when the records' fingerprint differs from the one that the checkpoint was trained on."""
    if then != now and not config.resume.allow_data_change:
        raise UserError(
            f"the training records changed since the checkpoint was saved (fingerprint {then} then, {now} now): "
            "continuing would repeat some records and skip others. Restore the records, use another --workdir, or set "
            "resume.allow_data_change=True"
        )
