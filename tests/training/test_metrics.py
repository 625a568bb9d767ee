"""Metrics: the lines written, the lines dropped when a run resumes, skipped steps."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from kdjax.cli import Progress
from kdjax.training import metrics
from kdjax.types import SumCount, UserError


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


def test_resuming_keeps_what_the_first_steps_wrote(tmp_path: Path) -> None:
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


class Scalar(float):
    """A device scalar, as `Recorder` fetches it."""

    def item(self) -> float:
        return float(self)


def step_metrics(loss: float, skipped: int = 0, tokens: int = 5) -> dict[str, Scalar]:
    values = {"loss": loss, "grad_norm": loss, "tokens": tokens, "skipped": skipped}
    return {name: Scalar(value) for name, value in values.items()}


@pytest.fixture
def recorder() -> metrics.Recorder:
    return metrics.Recorder(metrics.NoLog(), Progress("step", 100, "step", quiet=True), 1, max_skipped_steps=3)


def test_three_bad_steps_in_a_row_end_the_run(recorder: metrics.Recorder) -> None:
    for step in range(3):
        recorder.add(step, step_metrics(math.nan, skipped=1))
    with pytest.raises(UserError, match=r"for 3 steps in a row, up to step 2; .*max_skipped_steps"):
        recorder.flush()


def test_a_good_step_resets_the_count_of_bad_ones(recorder: metrics.Recorder) -> None:
    for step, is_bad in enumerate([True, True, False, True, True]):
        recorder.add(step, step_metrics(math.nan if is_bad else 1.0, skipped=int(is_bad)))
    recorder.flush()


def test_a_step_without_tokens_does_not_count_as_bad(
    recorder: metrics.Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(5):
        recorder.add(step, step_metrics(0.0, skipped=1, tokens=0))
    recorder.flush()
    assert "step 4 skipped: its batch holds no unmasked token" in caplog.text


def test_lines_every_few_steps_and_for_each_skipped_one(tmp_path: Path) -> None:
    log = metrics.MetricLog(tmp_path, 0)
    recorder = metrics.Recorder(log, Progress("step", 100, "step", quiet=True), 3, max_skipped_steps=9)
    for step in range(8):
        recorder.add(step, step_metrics(1.0, skipped=int(step == 4)))
    recorder.flush()
    log.close()
    lines = metrics.read(tmp_path, "train")
    assert [line["step"] for line in lines] == [0, 3, 4, 6]
    for line in lines:
        assert line["step_time_s"] > 0
        assert line["tokens_per_s"] == pytest.approx(5 / line["step_time_s"])
    assert metrics.read(tmp_path, "val") == []


def test_glance_shows_four_digits_of_the_main_metrics() -> None:
    assert metrics.glance({"tokens": 3, "lr": 0.1, "loss": 1.23456}) == "loss 1.235  lr 0.1"
