"""Ends a run that makes no progress although its processes live, such as when one waits for a file that never comes."""

import contextlib
import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

POLL_S = 0.5
# faulthandler ends the process this long after Python should have: six polls, and less than the other processes wait
# for an answer (failures.ACKNOWLEDGE_S), after which they exit and JAX aborts this one.
GIL_GRACE_S = 3.0


class HangError(Exception):
    """There was no progress for too long; the text says since when, and where each thread is."""


class Watchdog:
    """Calls `on_hang` with a `HangError`, from its own thread, when there is no progress for `timeout_s` seconds.

    It starts with the first `record_progress`. Where C code holds Python's interpreter lock, so that no Python thread
    runs, the standard library's faulthandler prints the stacks a little later and exits with 1.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[HangError], None]):
        self._timeout_s, self._on_hang = timeout_s, on_hang
        self._last: tuple[float, str] | None = None  # time and name of the last progress
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kdjax-watchdog", daemon=True)
        self._thread.start()

    def record_progress(self, what: str) -> None:
        """Restarts the timeout. Cheap, except for the first call."""
        if self._last is None:
            self._restart_faulthandler()
        self._last = time.monotonic(), what

    def stop(self) -> None:
        """Stops watching; shutdown is not timed."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def describe(self) -> str:
        """Returns the last progress and the stack of each thread, innermost call last.

        Also cancels faulthandler's exit: the caller ends the process.
        """
        faulthandler.cancel_dump_traceback_later()
        since = self._last[1] if self._last else "the start"
        return f"no progress for {self._timeout_s:g} s (--step-timeout) since {since}\n{_stacks()}"

    def _restart_faulthandler(self) -> None:
        """Takes about 0.1 ms, and so runs once a poll and not once a step."""
        faulthandler.dump_traceback_later(self._timeout_s + GIL_GRACE_S, exit=True)

    def _poll(self) -> None:
        last = None
        while not self._stopped.wait(POLL_S):
            before, last = last, self._last
            if last is None:
                continue
            if last != before:
                self._restart_faulthandler()
            if time.monotonic() - last[0] > self._timeout_s:
                self._on_hang(HangError(self.describe()))
                return


def _stacks() -> str:
    """Returns the stacks of all threads but the watching ones, the main thread first, equal stacks once."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads_by_stack: dict[str, list[str]] = {}
    main = threading.main_thread().ident
    for ident, frame in sorted(sys._current_frames().items(), key=lambda thread: thread[0] != main):
        name = names.get(ident, "unnamed")
        if not name.startswith("kdjax-watch"):
            threads_by_stack.setdefault("".join(traceback.format_stack(frame)), []).append(name)
    return "".join(f"in {', '.join(sorted(names))}:\n{stack}" for stack, names in threads_by_stack.items()).rstrip()


current: Watchdog | None = None  # of this process, inside `watching`


@contextlib.contextmanager
def watching(timeout_s: float, on_hang: Callable[[HangError], None]) -> Iterator[None]:
    """Runs a `Watchdog` of this process inside; 0 seconds: none."""
    global current
    if timeout_s <= 0:
        yield
        return
    current = Watchdog(timeout_s, on_hang)
    try:
        yield
    finally:
        current.stop()
        current = None


def record_progress(what: str) -> None:
    """Tells the watchdog, where there is one, that this process has done something it would not do in a hang."""
    if current is not None:
        current.record_progress(what)
