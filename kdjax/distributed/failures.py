"""Ends all processes when one of them fails, with each failure printed once.

JAX's coordination service, which runs in process 0, notices processes that die: it names those that sent no heartbeat
and aborts the others. Python's exceptions and hangs are published in the service's key-value store, which every process
polls.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from kdjax.distributed import watchdog
from kdjax.distributed.cluster import HANG_EXIT_CODE, Cluster
from kdjax.distributed.rendezvous import describe_processes
from kdjax.distributed.watchdog import HangError
from kdjax.types import UserError

POLL_S = 0.5
ACKNOWLEDGE_S = 5.0  # ten polls; a process that has not acknowledged the failure by then is dead or hangs
FINISH_S = 3600  # between the first process and the last to finish: room for a checkpoint

# Keys of the key-value store, each followed by a process index.
FAILED, ACKNOWLEDGED, REPORTED, EXITING = (
    f"kdjax/{name}/" for name in ("failed", "acknowledged", "reported", "exiting")
)


class FailureMonitor:
    """Polls for a failure of any process, from its own thread, and then ends this process."""

    def __init__(self, client: Any, cluster: Cluster):
        self._client, self._cluster = client, cluster
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kdjax-watch-failures", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> NoReturn:
        """Publishes `error` and ends this process together with the others."""
        if isinstance(error, UserError):
            code, text = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, "stopped at once"
        elif isinstance(error, HangError):
            code, text = HANG_EXIT_CODE, str(error)
        else:
            code, text = 1, "".join(traceback.format_exception(error)).rstrip()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._write(FAILED, json.dumps([code, text]))
            self._thread.join()  # which ends this process
        exit_now(code, f"error on process {self._cluster.process} of {self._cluster.processes}: {text}")

    def finish(self) -> None:
        """Waits for all processes to finish; until then a failure of any of them still ends this one."""
        try:
            self._client.wait_at_barrier("kdjax/finish", FINISH_S * 1000)
        except jax.errors.JaxRuntimeError as error:
            self.fail(error)
        self._finished.set()
        self._thread.join()

    def _poll(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: JAX itself ends this process
            while not self._finished.wait(POLL_S):
                if self._read(FAILED):
                    self._end()

    def _end(self) -> NoReturn:
        """Exits with the failure's code. Process 0 prints every failure and exits last, as it hosts the service."""
        process, count, failures = self._cluster.process, self._cluster.processes, self._failures()
        hangs = any(code == HANG_EXIT_CODE for code, _ in failures.values())
        if hangs and process not in failures and watchdog.current is not None:
            # The process whose timeout ends first may be waiting for the one that really hangs.
            self._write(FAILED, json.dumps([HANG_EXIT_CODE, watchdog.current.describe()]))
        self._write(ACKNOWLEDGED)
        wait_until(lambda: len(self._read(ACKNOWLEDGED)) == count, ACKNOWLEDGE_S)
        time.sleep(POLL_S)  # what fails on one process often fails on all
        failures, alive = self._failures(), set(self._read(ACKNOWLEDGED))
        code, report = failures[min(failures)][0], format_failures(failures, alive, count)
        if process != 0:
            is_reported = wait_until(lambda: bool(self._read(REPORTED)), 2 * ACKNOWLEDGE_S)
            self._write(EXITING)
            # Where process 0 hangs, the first process that does not reports in its place.
            exit_now(code, "" if is_reported or process != min(alive - {0}) else report)
        sys.stdout.flush()
        print(report, file=sys.stderr, flush=True)
        self._write(REPORTED)
        wait_until(lambda: len(self._read(EXITING)) >= len(alive) - 1, ACKNOWLEDGE_S)
        exit_now(code)

    def _write(self, prefix: str, value: str = "") -> None:
        self._client.key_value_set(f"{prefix}{self._cluster.process}", value, allow_overwrite=True)

    def _read(self, prefix: str) -> dict[int, str]:
        """Returns what the processes have written under a prefix."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(prefix)}

    def _failures(self) -> dict[int, tuple[int, str]]:
        """Returns the exit code and error text of each process that failed."""
        return {process: json.loads(failure) for process, failure in self._read(FAILED).items()}


def format_failures(failures: Mapping[int, tuple[int, str]], alive: set[int], count: int) -> str:
    """Returns each error text once, with the processes it occurred on, and lists those not `alive`, of `count`."""
    lines = []
    for text in dict.fromkeys(text for _, text in failures.values()):
        affected = [process for process, (_, other) in sorted(failures.items()) if other == text]
        where = "" if len(affected) == count else f" on {describe_processes(affected, count)}"
        lines.append(f"error{where}: {text}")
    if silent := sorted(set(range(count)) - alive):
        where = describe_processes(silent, count)
        lines.append(f"error: no answer from {where}: killed or hanging; this may have come first")
    return "\n".join(lines)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Returns whether `condition` becomes true within that time."""
    end = time.monotonic() + timeout_s
    while not (is_met := condition()) and time.monotonic() < end:
        time.sleep(POLL_S / 5)
    return is_met


def exit_now(code: int, text: str = "") -> NoReturn:
    """Exits without the interpreter's clean-up, in which JAX would wait for processes that are gone."""
    if text:
        print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
