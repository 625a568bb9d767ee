"""The watchdog: it ends a run that hangs, and leaves alone one that makes progress."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import toy_problem as toy
from launching import ROOT, write_config

import kdjax.train
from kdjax.distributed import processes, watchdog
from kdjax.distributed.cluster import HANG_EXIT_CODE
from kdjax.distributed.watchdog import HangError, Watchdog


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "POLL_S", 0.05)


def test_it_waits_for_the_first_progress_and_as_long_as_there_is_more() -> None:
    hangs: list[HangError] = []
    dog = Watchdog(0.4, hangs.append)
    time.sleep(0.6)
    for _ in range(6):
        dog.record_progress("a step")
        time.sleep(0.1)
    assert hangs == []
    dog.record_progress("the last step")
    time.sleep(0.6)
    dog.stop()
    (hang,) = hangs
    assert str(hang).startswith("no progress for 0.4 s (--step-timeout) since the last step\nin MainThread:\n")
    assert "time.sleep(0.6)" in str(hang)
    assert "in kdjax-watch" not in str(hang)


def test_a_stopped_watchdog_ends_nothing() -> None:
    """Not from Python and not from faulthandler, which would end pytest."""
    hangs: list[HangError] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "GIL_GRACE_S", 0.1)
        dog = Watchdog(0.2, hangs.append)
        dog.record_progress("a step")
        dog.stop()
    time.sleep(0.5)
    assert hangs == []


def test_a_single_process_is_watched_only_when_asked_for() -> None:
    for timeout_s in (None, 0):
        with processes.joined(None, step_timeout_s=timeout_s):
            watchdog.record_progress("nobody listens")
            assert watchdog.current is None
    with processes.joined(None, step_timeout_s=60):
        assert watchdog.current is not None
    assert watchdog.current is None


def test_training_records_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []
    monkeypatch.setattr(watchdog, "record_progress", recorded.append)
    kdjax.train.run(toy.config(tmp_path), tmp_path / "run", devices=jax.devices()[:1])

    def validation(steps: int) -> list[str]:
        return [f"a batch of the validation after {steps} steps"] * 2

    def dispatches(*steps: int) -> list[str]:
        return [f"the dispatch of step {step}" for step in steps]

    first = [*validation(0), "the start", *dispatches(0, 1, 2, 3), *validation(4), "the end of step 3"]
    assert recorded == [*first, *dispatches(4, 5, 6, 7), *validation(8), "the end of step 7"]


def test_a_training_run_that_hangs_ends_with_its_stack(tmp_path: Path) -> None:
    """A single process; --step-timeout reaches its watchdog."""
    file = write_config(tmp_path, val=())
    hang = "import sys, time\nsys.modules['__main__'].train_batches = lambda *args, **kwargs: time.sleep(99)\n"
    file.write_text(hang + file.read_text())
    words = ["--config", str(file), "--workdir", str(tmp_path / "run"), "--step-timeout", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.train", *words], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == HANG_EXIT_CODE, done.stderr
    assert "error: no progress for 1 s (--step-timeout) since the start\nin MainThread:\n" in done.stderr
    assert "time.sleep(99)" in done.stderr


def test_a_process_that_holds_pythons_lock_is_ended_too() -> None:
    program = (
        "import ctypes, time\n"
        "from kdjax.distributed import processes, watchdog\n"
        "watchdog.GIL_GRACE_S = 1\n"
        "with processes.joined(None, step_timeout_s=1):\n"
        "    watchdog.record_progress('step 7')\n"
        "    ctypes.PyDLL(None).sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    assert 'File "<string>", line 6 in <module>' in done.stderr
