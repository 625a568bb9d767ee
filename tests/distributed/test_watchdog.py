"""What ends a run that stands still, and leaves alone one that moves."""

import subprocess
import sys
import time
from pathlib import Path

from kdjax.distributed import processes
from kdjax.distributed.watchdog import Hung, Watchdog

ROOT = Path(__file__).parent.parent.parent


def test_it_waits_for_the_first_move_and_for_as_long_as_there_are_more() -> None:
    ended: list[Hung] = []
    watchdog = Watchdog(1, ended.append)
    time.sleep(1.7)
    for _ in range(17):
        watchdog.moved("a step")
        time.sleep(0.1)
    assert ended == []
    watchdog.moved("the last step")
    time.sleep(1.7)
    watchdog.stop()
    (hung,) = ended
    assert str(hung).startswith("nothing has moved for 1 s (--step-timeout) since the last step\nin MainThread:\n")
    assert "time.sleep(1.7)" in str(hung)
    assert "in kdjax-watch" not in str(hung)


def test_after_a_stop_nothing_ends() -> None:
    """Not from Python either: the timer in C would end pytest."""
    ended: list[Hung] = []
    watchdog = Watchdog(0.2, ended.append)
    watchdog.moved("a step")
    watchdog.stop()
    time.sleep(1)
    assert ended == []


def alone(step_s: str, then: str) -> subprocess.CompletedProcess[str]:
    """A process on its own that moves once and then does that."""
    program = (
        "import ctypes, time\n"
        "from kdjax import processes, watchdog\n"
        "watchdog.PYTHON_S = 1\n"
        f"with processes.together(None, step_s={step_s}):\n"
        "    processes.moved('step 7')\n"
        f"    {then}\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=False)


def test_a_process_on_its_own_is_watched_when_asked_for() -> None:
    done = alone("1", "time.sleep(60)")
    assert done.returncode == processes.HUNG
    assert "error: nothing has moved for 1 s (--step-timeout) since step 7\nin MainThread:\n" in done.stderr
    assert alone("None", "time.sleep(3)").returncode == 0
    assert alone("0", "time.sleep(3)").returncode == 0


def test_one_that_holds_python_is_ended_too() -> None:
    done = alone("1", "ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    assert 'File "<string>", line 6 in <module>' in done.stderr
