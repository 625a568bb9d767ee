"""Distils a student from a teacher's cached logits, or with --config.teacher.checkpoint from a teacher on its mesh.

RUN receives config.json, metrics.jsonl, tensorboard/ and checkpoints/. Run the same command again to resume an
interrupted run from its last checkpoint, at the same position in the data.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import jax

from kdjax import cli
from kdjax import config as configs
from kdjax.checkpoint import RunCheckpoints, adopt_architecture, lay_out, load_params, load_teacher, read_teacher
from kdjax.config import Config, DataConfig, command_line
from kdjax.config.validate import resolve, validate
from kdjax.data.dataset import Dataset, open_dataset
from kdjax.data.loader import eval_batches, train_batches
from kdjax.distributed import cluster, consensus, processes, watchdog, xla_flags
from kdjax.losses import Objective
from kdjax.model import Params
from kdjax.parallel import mesh as meshes
from kdjax.training import metrics, run_directory, summary
from kdjax.training.head import Sums
from kdjax.training.layout import Layout
from kdjax.training.state import TrainState
from kdjax.training.step import make_eval_step, make_train_step
from kdjax.types import Batch

log = logging.getLogger("kdjax")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    state: TrainState
    validation: dict[str, float] | None  # metrics of the last validation
    ended: str  # "complete" | "stopped early" | "interrupted"


def run(
    config: Config,
    workdir: Path,
    stop: threading.Event | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Outcome:
    """Trains to the last step, or until `stop` is set, then saves and returns. `devices` defaults to all devices.

    Raises UserError for anything in the configuration, the records or the run directory that cannot work; before the
    first step where that is possible.
    """
    config = resolve(adopt_architecture(config))
    validate(config)
    teacher = read_teacher(config)
    with run_directory.claimed(workdir, config) if consensus.is_process_zero() else contextlib.nullcontext():
        return _run(config, teacher, workdir, stop or threading.Event(), devices)


def _run(
    config: Config,
    teacher: Config | None,
    workdir: Path,
    stop: threading.Event,
    devices: Sequence[jax.Device] | None,
) -> Outcome:
    """Trains in a run directory that is this process's, or process 0's."""
    mesh = meshes.make_mesh(config.mesh.sizes, devices)
    summary.check_devices(config, mesh)
    layout = lay_out(config, teacher, mesh)
    train_set = _open(config, config.data, config.data.train)
    any_chunks = dataclasses.replace(config.data, n_chunks=None, n_examples_per_chunk=None)
    val_set = _open(config, any_chunks, config.data.val) if config.data.val else None
    consensus.check_same(
        {
            "the configuration": configs.to_json(config),
            "the training records": train_set.fingerprint,
            "the validation records": val_set.fingerprint if val_set else "",
        }
    )
    summary.print_summary(layout, train_set, val_set)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(RunCheckpoints(workdir, config)))
        state = _first_state(layout, checkpoints, train_set.fingerprint)
        start = int(state.step)
        log_to = _open_log(config, workdir, start)
        stack.enter_context(contextlib.closing(log_to))
        progress = stack.enter_context(
            cli.Progress("step", config.train.steps, "step", start=start, lines_to=sys.stdout)
        )
        trainer = Trainer(layout, load_teacher(layout), train_set, val_set, checkpoints, log_to, progress)
        return trainer.run(state, consensus.SharedStop(stop))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The training loop with everything it uses."""

    layout: Layout
    teacher: Params | None  # its parameters, if it runs on the mesh
    train_set: Dataset
    val_set: Dataset | None
    checkpoints: RunCheckpoints
    log_to: metrics.MetricLog | metrics.NoLog
    progress: cli.Progress

    @property
    def config(self) -> Config:
        return self.layout.config

    @property
    def beside(self) -> tuple[Params, ...]:
        """What the steps take beside state and batch."""
        return () if self.teacher is None else (self.teacher,)

    def run(self, state: TrainState, stop: consensus.SharedStop) -> Outcome:
        """Trains from the state's step to the last. Fetches a step's metrics while the next step runs."""
        train, start, ended, validation = self.config.train, int(state.step), "complete", None
        train_step = make_train_step(self.layout)
        recorder = metrics.Recorder(self.log_to, self.progress, train.log_every, train.max_skipped_steps)
        if start == 0:
            validation = self.validate(0, state.params)
        elif self.has_stalled():
            return Outcome(state, None, "stopped early")
        recorder.pause()
        watchdog.record_progress("the start")
        for step, batch in enumerate(self.batches(start), start):
            state, step_metrics = train_step(state, batch, *self.beside)
            recorder.add(step, step_metrics)
            watchdog.record_progress(f"the dispatch of step {step}")
            done, last = step + 1, step + 1 == train.steps
            validates = last or done % train.val_every == 0
            if validates:
                recorder.flush()
                validation = self.validate(done, state.params)
                ended = "stopped early" if self.has_stalled() else ended
            if stop.is_due(step) and not last:
                ended = "interrupted"
            saves = last or done % train.save_every == 0 or ended != "complete"
            if saves:
                recorder.flush()
                meta = {"data": self.train_set.fingerprint}
                self.checkpoints.save(state, meta, validation if validates else None)
            if validates or saves:
                recorder.pause()
                watchdog.record_progress(f"the end of step {step}")
            if ended != "complete":
                break
        recorder.flush()
        self.checkpoints.wait()
        return Outcome(state, validation, ended)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yields the global batches of the steps from `start` on, placed on the devices."""
        size, steps = self.config.batch.global_size, self.config.train.steps
        rows = meshes.process_rows(self.layout.mesh, size)
        on_host = train_batches(
            self.train_set, self.config.data, global_size=size, start_step=start, stop_step=steps, rows=rows
        )
        return (meshes.put_rows(self.layout.mesh, batch) for batch in on_host)

    def validate(self, step: int, params: Params) -> dict[str, float] | None:
        """Returns the metrics over the validation set after `step` updates, logged and shown; None without a set."""
        if self.val_set is None:
            return None
        size = self.config.batch.global_size
        rows = meshes.process_rows(self.layout.mesh, size)
        total: Sums | None = None
        for batch in eval_batches(
            self.val_set,
            self.config.data,
            global_size=size,
            max_batches=self.config.train.val_batches,
            rows=rows,
        ):
            sums = self._eval_step(params, meshes.put_rows(self.layout.mesh, batch), *self.beside)
            total = sums if total is None else {name: total[name] + sums[name] for name in sums}
            watchdog.record_progress(f"a batch of the validation after {step} steps")
        assert total is not None  # a data set holds at least one record
        means = {name: float(pair.mean) for name, pair in total.items()} | {"tokens": float(total["loss"].count)}
        self.log_to.write(step, "val", means)
        self.progress.say(f"step {step:<6} validation  {metrics.glance(means)}")
        return means

    @functools.cached_property
    def _eval_step(self) -> Callable[..., Sums]:
        return make_eval_step(self.layout)

    def has_stalled(self) -> bool:
        """Returns whether none of the last `early_stop_patience` validations improved on the best before them."""
        patience = self.config.train.early_stop_patience
        if patience is None:
            return False
        history = [metrics.as_rank(line[self.config.checkpoint.best_metric]) for line in self.log_to.lines("val")]
        has_stalled = len(history) > patience and min(history[-patience:]) >= min(history[:-patience])
        return consensus.from_process_zero(has_stalled)


def _open(config: Config, data: DataConfig, paths: tuple[str, ...]) -> Dataset:
    model = config.model
    return open_dataset(
        paths,
        data,
        vocab_size=model.vocab_rows if config.loss.include_vocab_padding else model.vocab_size,
        tokenizer_sha256=model.tokenizer_sha256,
        target_logits_scale=config.loss.target_logits_scale,
        need_log_sum_exp=Objective.from_settings(config.loss).needs_teacher_log_sum,
        ignore_teacher_ids=config.loss.cross_tokenizer is not None,
        targets=config.loss.targets if config.teacher.checkpoint is None else None,
    )


def _open_log(config: Config, workdir: Path, step: int) -> metrics.MetricLog | metrics.NoLog:
    """Returns the log of process 0, and for the other processes one that writes nothing."""
    if not consensus.is_process_zero():
        return metrics.NoLog()
    return metrics.MetricLog(workdir, step, config.train.wandb_project, configs.flatten(config))


def _first_state(layout: Layout, checkpoints: RunCheckpoints, data: str) -> TrainState:
    """Returns the run's newest checkpoint, else the parameters of model.init_from, else freshly drawn ones."""
    params, config = None, layout.config
    model = config.model
    if model.init_from is not None and checkpoints.latest_step() is None:
        params = load_params(model.init_from, model, layout.params, model.keep_layers)
    state = layout.init_state(params)
    restored = checkpoints.restore(state)
    if restored is None:
        return state
    state, meta = restored
    run_directory.check_data(meta["data"], data, config)
    print(f"resumed at step {int(state.step)}", flush=True)
    return state


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Ctrl-C or SIGTERM to any process finishes the step, saves, and exits with 130."""
    parser = argparse.ArgumentParser(prog="kdjax train", description=__doc__)
    parser.add_argument("--workdir", metavar="RUN", type=Path, required=True, help="directory of the run")
    xla_flags.add_flag(parser)
    cluster.add_flags(parser)
    arguments, configuration = command_line.parse(parser, argv)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    timeouts = arguments.heartbeat, arguments.join_timeout, arguments.step_timeout
    with processes.joined(cluster.detect_cluster(arguments), *timeouts):
        config = configuration()
        xla_flags.apply(arguments.xla, config.mesh.pipe)
        outcome = run(config, arguments.workdir, stop)
        step, steps = int(outcome.state.step), config.train.steps
        print(f"{outcome.ended} after step {step}/{steps}; metrics and checkpoints are in {arguments.workdir}")
        if outcome.ended == "interrupted":
            print("run the same command to resume")
    return 130 if outcome.ended == "interrupted" else 0


if __name__ == "__main__":
    cli.run(main)
