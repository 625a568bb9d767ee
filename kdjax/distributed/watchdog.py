"""Ends a run that stands still though its processes live: one waits for a file, say, and the others for its part."""

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable

LOOK_EVERY_S = 0.5
PYTHON_S = 3.0  # six looks; and less than the others wait for an answer before they leave, and JAX aborts who is left


class Hung(Exception):
    """Nothing has moved for too long; the text says since when, and where each thread is."""


class Watchdog:
    """Calls `end` with `Hung` when nothing has moved for `patience_s` seconds, from its own thread.

    Where Python itself stands still, in C code that does not let go of it, the standard library's faulthandler prints
    the stacks a little later and ends the process with 1. It watches from the first `moved` on.
    """

    def __init__(self, patience_s: float, end: Callable[[Hung], None]):
        self._patience_s, self._end = patience_s, end
        self._last: tuple[float, str] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kdjax-watchdog", daemon=True)
        self._thread.start()

    def moved(self, what: str) -> None:
        """Something has been done. Costs nothing but the first time."""
        if self._last is None:
            self._arm()
        self._last = time.monotonic(), what

    def stop(self) -> None:
        """The rest may take as long as it likes."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def report(self) -> str:
        """The last that was done, and where each thread is now, innermost call last. The end is in good hands then."""
        faulthandler.cancel_dump_traceback_later()
        since = self._last[1] if self._last else "the start"
        return f"nothing has moved for {self._patience_s:g} s (--step-timeout) since {since}\n{_stacks()}"

    def _arm(self) -> None:
        """Takes about a tenth of a millisecond, and so is not done in every step."""
        faulthandler.dump_traceback_later(self._patience_s + PYTHON_S, exit=True)

    def _watch(self) -> None:
        last = None
        while not self._stopped.wait(LOOK_EVERY_S):
            before, last = last, self._last
            if last is None:
                continue
            if last != before:
                self._arm()
            if time.monotonic() - last[0] > self._patience_s:
                self._end(Hung(self.report()))
                return


def _stacks() -> str:
    """Of all threads but those that watch, the main one first, each stack once."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    having: dict[str, list[str]] = {}
    main = threading.main_thread().ident
    for ident, frame in sorted(sys._current_frames().items(), key=lambda thread: thread[0] != main):
        name = names.get(ident, "unnamed")
        if not name.startswith("kdjax-watch"):
            having.setdefault("".join(traceback.format_stack(frame)), []).append(name)
    return "".join(f"in {', '.join(sorted(names))}:\n{stack}" for stack, names in having.items()).rstrip()
