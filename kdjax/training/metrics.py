"""Metrics: RUN/metrics.jsonl, TensorBoard, Weights & Biases when asked for, and the terminal."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import tensorboardX

from kdjax.cli import Progress
from kdjax.types import UserError

log = logging.getLogger("kdjax")


class MetricLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. Drops lines past `step`: the run writes them again."""

    def __init__(
        self,
        workdir: Path,
        step: int,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir, path = workdir, workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if _is_before(json.loads(line), step)]
        path.write_text("".join(kept))
        self._file: TextIO = path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step)
        self._wandb = None
        if wandb_project is not None:
            import wandb

            self._wandb = wandb.init(project=wandb_project, dir=str(workdir), config=dict(config or {}), resume="allow")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line, and one point for each metric. Values that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def lines(self, split: str) -> list[dict[str, Any]]:
        """Returns the lines of a split so far, including those from before the run was resumed."""
        return read(self._workdir, split)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLog:
    """Writes nothing: the log of processes other than 0, which would all write the same."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        pass

    def lines(self, split: str) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


def read(workdir: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Returns the lines of RUN/metrics.jsonl, oldest first, of one split or of all."""
    lines = [json.loads(line) for line in _lines(workdir / "metrics.jsonl")]
    return [line for line in lines if split in (None, line["split"])]


def _lines(path: Path) -> list[str]:
    """Returns the complete lines; a killed run may have cut the last one short."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _is_before(line: Mapping[str, Any], step: int) -> bool:
    """Returns whether the first `step` updates wrote this line.

    Update n writes train line n, while a val line's step counts the updates made before it.
    """
    return line["step"] < step or (line["split"] == "val" and line["step"] == step and step > 0)


class Recorder:
    """Receives each step's metrics from the device and writes those of the step before, so the device never waits.

    A step's time runs from one fetch to the next; `pause` excludes what is not training.
    """

    def __init__(self, log_to: MetricLog | NoLog, progress: Progress, log_every: int, max_skipped_steps: int):
        self._log, self._progress = log_to, progress
        self._log_every, self._max_skipped = log_every, max_skipped_steps
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._skipped_in_a_row, self._since = 0, time.monotonic()

    def add(self, step: int, device_metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of update number `step`, which was just dispatched; the next call fetches them."""
        self.flush()
        self._pending = step, device_metrics

    def flush(self) -> None:
        """Waits for the last step added and writes it. Raises UserError after too many non-finite steps in a row."""
        if self._pending is None:
            return
        (step, device_metrics), self._pending = self._pending, None
        values = {name: value.item() for name, value in device_metrics.items()}
        now = time.monotonic()
        values["step_time_s"], self._since = now - self._since, now
        values["tokens_per_s"] = values["tokens"] / values["step_time_s"]
        if step % self._log_every == 0 or values["skipped"]:
            self._log.write(step, "train", values)
        self._progress.add(1, glance(values))
        self._count_skipped(step, values)

    def pause(self) -> None:
        """Restarts the clock of the next step."""
        self._since = time.monotonic()

    def _count_skipped(self, step: int, values: Mapping[str, float]) -> None:
        if not values["skipped"]:
            self._skipped_in_a_row = 0
        elif values["tokens"] == 0:
            log.warning("step %d skipped: its batch holds no unmasked token", step)
        else:
            self._skipped_in_a_row += 1
            log.warning("step %d skipped: loss %s, gradient norm %s", step, values["loss"], values["grad_norm"])
            if self._skipped_in_a_row >= self._max_skipped:
                raise UserError(
                    f"loss or gradient was not finite for {self._skipped_in_a_row} steps in a row, up to step {step}; "
                    "try a lower optim.lr or model.dtype = 'float32', and check those records "
                    "(train.max_skipped_steps sets the limit)"
                )


def as_rank(value: float | None) -> float:
    """Returns a validation metric to compare by: one that is not finite, null in metrics.jsonl, is worse than any."""
    return value if value is not None and math.isfinite(value) else math.inf


def glance(values: Mapping[str, float]) -> str:
    """Formats the few metrics that are shown on the terminal."""
    names = ("loss", "kd_loss", "sft_loss", "top1_agreement", "lr", "tokens_per_s")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
