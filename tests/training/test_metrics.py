"""What is written, what is dropped on taking up a run, and what a person sees."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from kdjax.training import metrics
from kdjax.types import SumCount


def test_not_finite_is_null(tmp_path: Path) -> None:
    log = metrics.MetricLog(tmp_path, 0)
    log.write(3, "train", {"loss": math.nan, "lr": 0.5})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 3,
        "split": "train",
        "loss": None,
        "lr": 0.5,
    }


def test_taking_up_keeps_what_the_first_steps_wrote(tmp_path: Path) -> None:
    log = metrics.MetricLog(tmp_path, 0)
    for step in range(4):
        log.write(step, "val", {"loss": 0.0})
        log.write(step, "train", {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sp')
    metrics.MetricLog(tmp_path, 2).close()
    kept = [(line["step"], line["split"]) for line in metrics.read(tmp_path)]
    assert kept == [(0, "val"), (0, "train"), (1, "val"), (1, "train"), (2, "val")]
    metrics.MetricLog(tmp_path, 0).close()
    assert metrics.read(tmp_path) == []


def test_means_are_divided_once() -> None:
    total = SumCount(jnp.float32(3), jnp.float32(1)) + SumCount(jnp.float32(1), jnp.float32(3))
    assert total.mean == 1
    assert SumCount(jnp.float32(0), jnp.float32(0)).mean == 0


def test_plain_lines_when_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = metrics.Progress(10, 0)
    for step in range(1, 11):
        progress.update(step, {"loss": 2.0, "lr": 0.1})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/10  loss 2  lr 0.1")
    assert lines[-1].startswith("step 10/10")
    assert lines[-1].endswith("0 s left")
    assert len(lines) == 2  # a line every ten seconds, and the last
