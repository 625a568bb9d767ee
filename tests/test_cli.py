"""The dispatcher, exit codes, and the progress bar."""

import subprocess
import sys
import time

import pytest

from kdjax import cli
from kdjax.cli import Progress
from kdjax.types import UserError


def exit_code(main: object) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.run(main)  # type: ignore[arg-type]
    return ended.value.code


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> int:
        raise UserError("data.train = (): name the files")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code(lambda: 0) == 0
    assert exit_code(lambda: 3) == 3
    assert exit_code(mistaken) == 2
    assert capsys.readouterr().err == "error: data.train = (): name the files\n"
    assert exit_code(interrupted) == 130


def kdjax(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from kdjax.cli import main; main()", *words],
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_console_script_lists_commands_without_loading_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    shown = kdjax("--help")
    took = time.monotonic() - began
    assert shown.returncode == 0
    for name, (module, _) in cli.COMMANDS.items():
        assert f"  {name}" in shown.stdout
        assert module.startswith(f"kdjax.{name}")
    unknown = kdjax("trian")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "there is no command 'trian'; choose one of train, plan, convert, cache, launch" in unknown.stderr
    assert took < 20, "it must not import JAX"
    code = "import sys, kdjax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_console_script_runs_a_command() -> None:
    ended = kdjax("launch", "-n", "0", "--", "kdjax.train")
    assert ended.returncode == 2
    assert "error: -n 0: must be at least 1" in ended.stderr


def test_a_line_every_ten_seconds_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("step", 10, "step", lines_to=sys.stdout) as progress:
        for _ in range(10):
            now += 4
            progress.add(1, "loss 2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/10  loss 2"
    assert lines[1] == "step 4/10  loss 2  24 s left"
    assert lines[-1] == "step 10/10  loss 2  0 s left"
    assert len(lines) == 4


def test_bytes_have_prefixes_and_quick_work_shows_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("writing model", 2_000_000, "B", delay_s=2.0)
    progress.add(500_000)
    assert capsys.readouterr().err == ""
    now = 3.0
    progress.add(500_000)
    assert capsys.readouterr().err == "writing model 1.00M/2.00MB  6 s left\n"
    quiet = Progress("writing model", 10, "B", quiet=True)
    quiet.add(5)
    quiet.say("nothing")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("step", 4, "step", start=1) as progress:
        progress.add(3, "loss 2")
        progress.say("validation")
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "loss 2" in shown
    assert "validation" in shown
