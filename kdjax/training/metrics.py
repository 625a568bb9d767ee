"""Where metrics go: a line of JSON, TensorBoard, W&B when asked, and the terminal."""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import tensorboardX
import tqdm

from kdjax.types import UserError

log = logging.getLogger("kdjax")


class MetricLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. Lines past `step` are dropped: they will be made again."""

    def __init__(
        self,
        workdir: Path,
        step: int,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._workdir, path = workdir, workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if _made_by(json.loads(line), step)]
        path.write_text("".join(kept))
        self._file: TextIO = path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step)
        self._wandb = None
        if wandb_project is not None:
            import wandb

            self._wandb = wandb.init(project=wandb_project, dir=str(workdir), config=dict(config or {}), resume="allow")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line and one point a metric. Values that are not finite are written as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def lines(self, split: str) -> list[dict[str, Any]]:
        """What was written for a split so far, by earlier stretches of the run too."""
        return read(self._workdir, split)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoLog:
    """Of a process that leaves writing to another: what both would write is the same."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        pass

    def lines(self, split: str) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


def read(workdir: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, oldest first; one split or all."""
    lines = [json.loads(line) for line in _lines(workdir / "metrics.jsonl")]
    return [line for line in lines if split in (None, line["split"])]


def _lines(path: Path) -> list[str]:
    """Whole lines only: a killed run may have cut the last one."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _made_by(line: Mapping[str, Any], step: int) -> bool:
    """Whether the first `step` updates wrote this line. Update n writes train line n; val lines count updates made."""
    return line["step"] < step or (line["split"] == "val" and line["step"] == step and step > 0)


class Recorder:
    """Takes the device metrics of each step and writes those of the step before, so that the device never waits.

    A step's time runs from one fetch to the next; `pause` leaves out what is not training.
    """

    def __init__(self, log_to: MetricLog | NoLog, progress: "Progress", log_every: int, max_skipped_steps: int):
        self._log, self._progress = log_to, progress
        self._log_every, self._max_skipped = log_every, max_skipped_steps
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._in_a_row, self._since = 0, time.monotonic()

    def add(self, step: int, device_metrics: Mapping[str, Any]) -> None:
        """Update number `step` was dispatched; its metrics are fetched with the next call."""
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
        self._progress.update(step + 1, values)
        self._count_skipped(step, values)

    def pause(self) -> None:
        """Starts the next step's clock here."""
        self._since = time.monotonic()

    def _count_skipped(self, step: int, values: Mapping[str, float]) -> None:
        if not values["skipped"]:
            self._in_a_row = 0
        elif values["tokens"] == 0:
            log.warning("step %d left out: its batch holds no unmasked token", step)
        else:
            self._in_a_row += 1
            log.warning("step %d left out: loss %s, gradient norm %s", step, values["loss"], values["grad_norm"])
            if self._in_a_row >= self._max_skipped:
                raise UserError(
                    f"loss or gradient was not finite for {self._in_a_row} steps in a row, up to step {step}; a lower "
                    "optim.lr, model.dtype = 'float32' or a look at those records may help "
                    "(train.max_skipped_steps sets the limit)"
                )


class Progress:
    """A bar with the time left on a terminal; elsewhere a plain line every few seconds."""

    EVERY_S = 10.0

    def __init__(self, total: int, start: int):
        self._total, self._said = total, -math.inf
        self._first: tuple[int, float] | None = None  # step and time of the first update, whose step also compiled
        self._bar = (
            tqdm.tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """`step` updates are done."""
        now = time.monotonic()
        first, began = self._first = self._first or (step, now)
        if self._bar is not None:
            self._bar.set_postfix_str(told(values), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._said > self.EVERY_S or step == self._total:
            self._said = now
            left = f"  {(now - began) / (step - first) * (self._total - step):.0f} s left" if step > first else ""
            self.say(f"step {step}/{self._total}  {told(values)}{left}")

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def told(values: Mapping[str, float]) -> str:
    """The metrics worth a person's glance."""
    names = ("loss", "kd_loss", "sft_loss", "top1_agreement", "lr", "tokens_per_s")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
