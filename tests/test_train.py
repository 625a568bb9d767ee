"""Whole runs: their files, their end, and taking them up again."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import compiled_steps
import jax
import numpy as np
import pytest
import toy_problem as toy
from toy_problem import StopAfter

from kdjax import config as configs
from kdjax import train
from kdjax.checkpoint import load_model
from kdjax.config import Config
from kdjax.train import Outcome
from kdjax.training import metrics
from kdjax.training.layout import Layout
from kdjax.types import UserError

ROOT = Path(__file__).parent.parent
TIMES = ("step_time_s", "tokens_per_s")


def run(config: Config, workdir: Path, stop: threading.Event | None = None) -> Outcome:
    return train.run(config, workdir, stop, devices=jax.devices()[: config.mesh.data])


def told(workdir: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl but what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(workdir)]


@pytest.fixture(autouse=True, scope="module")
def _compile_each_step_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_train_step", compiled_steps.train_step)
        patch.setattr(train, "make_eval_step", compiled_steps.eval_step)
        patch.setattr(Layout, "init_state", compiled_steps.init_state)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One uninterrupted run of eight steps, and where it lies."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(toy.config(directory), directory / "run")


def test_what_a_run_leaves_behind(whole: tuple[Path, Outcome]) -> None:
    directory, outcome = whole
    workdir = directory / "run"
    assert outcome.ended == "complete"
    saved = configs.from_json((workdir / "config.json").read_text())
    assert saved.model.n_groups == 2  # resolved
    lines = metrics.read(workdir)
    assert [(line["step"], line["split"]) for line in lines] == (
        [(0, "val")]
        + [(s, "train") for s in range(4)]
        + [(4, "val")]
        + [(s, "train") for s in range(4, 8)]
        + [(8, "val")]
    )
    for line in lines:
        assert {
            "loss",
            "kd_loss",
            "sft_loss",
            "teacher_entropy",
            "teacher_topk_mass",
            "top1_agreement",
            "tokens",
        } <= line.keys()
        assert line["split"] == "val" or {"grad_norm", "lr", "tokens_per_s", "step_time_s"} <= line.keys()
    assert list((workdir / "tensorboard").glob("events*"))
    assert lines[-1]["sft_loss"] < 0.9 * lines[0]["sft_loss"]
    assert lines[-1]["kd_loss"] < 0.9 * lines[0]["kd_loss"]
    assert outcome.validation is not None
    assert outcome.validation["loss"] == lines[-1]["loss"]


def test_a_trained_run_can_be_loaded(whole: tuple[Path, Outcome]) -> None:
    directory, outcome = whole
    under_way = directory / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
    under_way.mkdir()  # as while the run that writes it goes on
    tokens = np.arange(10)[None]
    for path in (directory / "run", directory / "run" / "checkpoints" / "8"):
        model = load_model(path)
        np.testing.assert_array_equal(model.embed[...], outcome.state.params["embed"])
        assert model(tokens).shape == (1, 10, toy.VOCAB)
    under_way.rmdir()


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_stopped_and_taken_up_equals_uninterrupted(step: int, whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Bit for bit: parameters, optimiser, metrics, order of the data."""
    directory, expected = whole
    config, workdir = toy.config(directory), tmp_path / "run"
    stopped = run(config, workdir, StopAfter(step - 1))
    assert (stopped.ended, int(stopped.state.step)) == ("interrupted", step)
    finished = run(config, workdir)
    assert finished.ended == "complete"
    jax.tree.map(np.testing.assert_array_equal, finished.state, expected.state)
    assert told(workdir) == told(directory / "run")


def test_lines_past_the_checkpoint_are_made_again(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    """As after a kill: the log ran ahead of the last checkpoint, and its last line was cut."""
    directory, _ = whole
    config, workdir = toy.config(directory), tmp_path / "run"
    run(config, workdir, StopAfter(3))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "train", "loss": 99.0}\n{"step": 5, "spl')
    run(config, workdir)
    assert told(workdir) == told(directory / "run")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole: tuple[Path, Outcome], tmp_path: Path, caplog) -> None:
    directory, expected = whole
    config = configs.replace(toy.config(directory), train__save_every=4)
    workdir = tmp_path / "run"
    run(config, workdir, StopAfter(5))  # saved at 4 and at 6
    for file in (workdir / "checkpoints" / "6" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    finished = run(config, workdir)
    assert "CANNOT BE READ" in caplog.text
    assert "checkpoints/6" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, finished.state, expected.state)


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    """And changes nothing there; once the first has ended, or was killed, the directory is free."""
    config, workdir = toy.config(tmp_path), tmp_path / "run"
    run(config, workdir, StopAfter(2))
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    lock = f"import fcntl; file = open({str(workdir / 'lock')!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold = f"{lock}; print(flush=True); import time"
    with subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(99)"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process is training there"):
            run(config, workdir)
        assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
        holder.kill()
    assert run(config, workdir).ended == "complete"


def test_a_step_that_was_damaged_is_saved_again(whole: tuple[Path, Outcome], tmp_path: Path, caplog) -> None:
    """The run reaches the damaged step's number, saves it, and ends as a run that was never damaged."""
    directory, expected = whole
    config, workdir = toy.config(directory), tmp_path / "run"
    run(config, workdir, StopAfter(5))  # saved at 4 and at 6
    broken = workdir / "checkpoints" / "6"
    for name in ("params", "opt_state"):
        for file in (broken / name).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    stopped = run(config, workdir, StopAfter(1))
    assert (stopped.ended, int(stopped.state.step)) == ("interrupted", 6)
    assert (workdir / "damaged" / "6-0" / "params").is_dir()
    for file in (broken / "opt_state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    finished = run(config, workdir)
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"6-0", "6-1"}
    jax.tree.map(np.testing.assert_array_equal, finished.state, expected.state)
    assert told(workdir) == told(directory / "run")


@pytest.mark.slow
def test_another_device_count_and_microbatch_go_on_from_the_same_checkpoint(
    whole: tuple[Path, Outcome], tmp_path: Path
) -> None:
    directory, expected = whole
    config, workdir = toy.config(directory), tmp_path / "run"
    run(config, workdir, StopAfter(3))
    finished = run(configs.replace(config, mesh__data=4, batch__microbatch_size=1), workdir)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
        finished.state.params,
        expected.state.params,
    )


def test_a_directory_of_another_run_is_refused_with_the_difference(whole: tuple[Path, Outcome]) -> None:
    directory, _ = whole
    config = configs.replace(toy.config(directory), optim__lr=5e-3, loss__sft_loss_weight=0.1)
    with pytest.raises(UserError) as error:
        run(config, directory / "run")
    assert "optim.lr: 0.03 in the run, 0.005 now" in str(error.value)
    assert "loss.sft_loss_weight: 0.4 in the run, 0.1 now" in str(error.value)
    assert "another --workdir" in str(error.value)


def test_a_run_that_failed_at_its_start_does_not_claim_the_directory(tmp_path: Path) -> None:
    config = toy.config(tmp_path, train__steps=3)
    with pytest.raises(UserError, match=r"absent.jsonl"):
        run(configs.replace(config, data__train=(str(tmp_path / "absent.jsonl"),)), tmp_path / "run")
    assert run(config, tmp_path / "run").ended == "complete"


def test_changed_records_are_refused_unless_allowed(tmp_path: Path) -> None:
    config, workdir = toy.config(tmp_path), tmp_path / "run"
    run(config, workdir, StopAfter(1))
    toy.write(tmp_path / "train.jsonl", 22, first=500)
    with pytest.raises(UserError, match=r"training records changed .* resume.allow_data_change=True"):
        run(config, workdir)
    assert run(configs.replace(config, resume__allow_data_change=True), workdir).ended == "complete"


def test_changed_data_knobs_are_refused_unless_allowed(tmp_path: Path) -> None:
    config, workdir = toy.config(tmp_path), tmp_path / "run"
    run(config, workdir, StopAfter(1))
    other = configs.replace(config, data__seed=7)
    with pytest.raises(UserError, match=r"data.seed: 1234 in the run, 7 now(.|\n)*resume.allow_data_change=True"):
        run(other, workdir)
    assert run(configs.replace(other, resume__allow_data_change=True), workdir).ended == "complete"


def test_early_stop_and_best_checkpoint(tmp_path: Path) -> None:
    """A learning rate far too high: nothing improves, the run ends early and the first checkpoint stays the best."""
    config = configs.replace(
        toy.config(tmp_path),
        optim__lr=0.3,
        optim__schedule="constant",
        optim__warmup_steps=0,
        train__steps=20,
        train__val_every=1,
        train__save_every=1,
        train__early_stop_patience=3,
        checkpoint__keep_last=1,
    )
    outcome = run(config, tmp_path / "run")
    assert outcome.ended == "stopped early"
    history = [line["loss"] for line in metrics.read(tmp_path / "run", "val")]
    best = int(np.argmin(history))
    assert int(outcome.state.step) == best + 3
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({int(outcome.state.step), best} - {0})
    again = run(config, tmp_path / "run")
    assert (again.ended, int(again.state.step)) == ("stopped early", int(outcome.state.step))


def test_best_metric_and_keep_last(tmp_path: Path) -> None:
    config = configs.replace(
        toy.config(tmp_path), train__val_every=2, train__save_every=2, checkpoint__keep_last=2, checkpoint__keep_best=0
    )
    run(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["6", "8"]


def test_non_finite_steps_are_left_out_and_end_the_run(tmp_path: Path) -> None:
    config = configs.replace(
        toy.config(tmp_path),
        optim__lr=1e38,
        optim__schedule="constant",
        optim__warmup_steps=0,
        optim__clip_norm=None,
        train__steps=20,
        train__val_every=20,
        train__save_every=20,
        train__max_skipped_steps=3,
    )
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row, up to step \d+; try a lower optim.lr"):
        run(config, tmp_path / "run")
    lines = metrics.read(tmp_path / "run", "train")
    assert [line["skipped"] for line in lines[-3:]] == [1, 1, 1]


def test_without_validation(tmp_path: Path) -> None:
    outcome = run(configs.replace(toy.config(tmp_path), data__val=()), tmp_path / "run")
    assert outcome.validation is None
    assert metrics.read(tmp_path / "run", "val") == []
    assert load_model(tmp_path / "run")(np.zeros((1, 3), np.int32)).shape == (1, 3, toy.VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"train__seed": 1},
        {"data__seed": 1},
        {"data__shuffle": False},
        {"data__top_k": 3},
        {"data__pack": True},
        {"data__over_long": "truncate", "data__sequence_length": 9},
        {"batch__global_size": 4},
        {"optim__warmup_steps": 0},
        {"optim__constant_steps": 2},
        {"optim__schedule": "constant"},
        {"optim__schedule": "wsd"},
        {"optim__decay_rule": "nemo", "optim__weight_decay": 0.5},
        {"model__init_std": 0.1},
    ],
    ids=str,
)
def test_every_training_knob_changes_the_run(
    change: dict[str, Any], whole: tuple[Path, Outcome], tmp_path: Path
) -> None:
    directory, expected = whole
    found = run(configs.replace(toy.config(directory), **change), tmp_path / "run")
    assert found.validation is not None
    assert expected.validation is not None
    assert found.validation["loss"] != expected.validation["loss"]


def test_logging_knobs(tmp_path: Path) -> None:
    config = configs.replace(toy.config(tmp_path), train__log_every=3, train__val_batches=1)
    run(config, tmp_path / "run")
    assert [line["step"] for line in metrics.read(tmp_path / "run", "train")] == [0, 3, 6]
    tokens = sum(sum(toy.record(1000 + i)["loss_mask"]) for i in range(8))
    assert metrics.read(tmp_path / "run", "val")[0]["tokens"] == tokens


def test_one_entry_renormalised_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configs.replace(toy.config(tmp_path, train__steps=3), data__top_k=1)
    run(config, tmp_path / "renormalized")
    assert "the KD loss is always 0" in caplog.text
    assert {line["kd_loss"] for line in metrics.read(tmp_path / "renormalized")} == {0.0}
    caplog.clear()
    run(configs.replace(config, loss__tail="ghost"), tmp_path / "ghost")
    assert "always 0" not in caplog.text


def test_cudnn_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.attention = 'cudnn' needs an NVIDIA GPU, and this device is cpu"):
        run(toy.config(tmp_path, model__attention="cudnn"), tmp_path / "run")


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for the package that records what it is handed."""
    (tmp_path / "wandb.py").write_text(
        "logged, started = [], []\n"
        "class Run:\n"
        "    def log(self, values, step): logged.append((step, values))\n"
        "    def finish(self): logged.append('finished')\n"
        "def init(**kwargs):\n"
        "    started.append(kwargs)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def test_weights_and_biases(wandb: ModuleType, tmp_path: Path) -> None:
    run(toy.config(tmp_path, train__wandb_project="distil", train__steps=3), tmp_path / "run")
    assert wandb.started[0]["project"] == "distil"
    assert wandb.started[0]["config"]["train.steps"] == 3
    assert wandb.logged[0][0] == 0
    assert "val/kd_loss" in wandb.logged[0][1]
    assert {"train/loss", "train/lr"} <= wandb.logged[1][1].keys()
    assert wandb.logged[-1] == "finished"


@pytest.mark.parametrize("tail", ["ghost", "label"])
def test_records_without_a_logsumexp_that_the_loss_needs(tmp_path: Path, tail: str) -> None:
    config = configs.replace(toy.config(tmp_path), loss__tail=tail)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for line in lines:
        del line["log_sum_exp_logits"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"train.jsonl.*log_sum_exp_logits"):
        run(config, tmp_path / "run")


def test_sampled_targets_need_a_cache_that_has_them(tmp_path: Path) -> None:
    config = configs.replace(toy.config(tmp_path), loss__targets="sampled")
    with pytest.raises(UserError, match=r"train.jsonl.*top-k, and loss.targets is 'sampled'; set loss.targets=topk"):
        run(config, tmp_path / "run")


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir .*file/run: cannot be written"):
        run(toy.config(tmp_path), tmp_path / "file" / "run")


def test_too_large_a_model_is_refused_with_its_size(tmp_path: Path) -> None:
    config = configs.replace(toy.config(tmp_path), model__d_model=2**15, model__d_ff=2**17, model__layers=64)
    with pytest.raises(UserError, match=r"optimiser state take \d+.\d GiB \(1,\d+,\d+,\d+,\d+ parameters\)"):
        run(config, tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The real command line: SIGINT in mid-run, exit code 130, a checkpoint; then again, to the end."""
    toy.config(tmp_path)
    file = tmp_path / "config.py"
    settings = {
        "model": {"layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "vocab_size": toy.VOCAB, "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "sequence_length": toy.LENGTH, "scratch_dir": str(tmp_path)},
        "batch": {"global_size": 8},
        "train": {"steps": 4000},
    }
    file.write_text(f"def get_config():\n    return {settings!r}\n")
    command = [sys.executable, "-m", "kdjax.train", f"--config={file}", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while len(metrics.read(tmp_path / "run", "train")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "interrupted after step" in output
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    done = max(steps)
    assert metrics.read(tmp_path / "run", "train")[-1]["step"] == done - 1
    again = subprocess.run(
        [*command, "--config.train.steps=3999"], cwd=ROOT, env=os.environ, text=True, capture_output=True, check=False
    )
    assert again.returncode == 2
    assert "train.steps: 4000 in the run, 3999 now" in again.stderr
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while len(metrics.read(tmp_path / "run", "train")) < done + 4:  # rewritten, so empty for a moment
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert f"resumed at step {done}" in output
    assert process.returncode == 130
