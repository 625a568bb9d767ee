"""`kdjax plan`."""

from typing import Any

import pytest
from example_plans import FLAGS, imagined

import kdjax.plan.__main__ as command
from kdjax.config import Config
from kdjax.plan.roofline import Plan
from kdjax.types import UserError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every `make_plan`, which returns a plan without compiling."""
    calls: list[tuple[Any, ...]] = []

    def make_plan(config: Config, *arguments: Any) -> Plan:
        calls.append((config, *arguments))
        return imagined(config)

    monkeypatch.setattr(command, "compile_only", lambda: None)  # which concerns a process of its own
    monkeypatch.setattr(command, "make_plan", make_plan)
    return calls


@pytest.mark.usefixtures("compiler")
def test_the_flags_of_the_best_plan_choose_it(made: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FLAGS, "--devices", "2", "--target", "h100_sxm", "--top-k", "8", "--xla", "none"]
    assert command.main([*words, "--search", "--budget", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3" in out
    assert len(made) == 3
    assert all(call[1:] == ("h100_sxm", 2, 8, "none") for call in made)
    best = next(line for line in out.splitlines() if line.startswith("best: "))
    assert command.main([*words, *best.removeprefix("best: ").split()]) == 0
    assert made[3][0] == made[0][0], "all take as long, so the first is the best"


def test_attention_that_cannot_be_compiled_is_refused(made: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match=r"model.attention = 'cudnn' cannot be compiled without a GPU"):
        command.main([*FLAGS[:-1], "--config.model.attention=cudnn"])
    assert made == []


def test_help_explains_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    assert "compute + exposed communication, as scheduled" in out
    assert "{roofline}" not in out
