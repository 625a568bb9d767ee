"""`kdjax launch`, what scripts/ starts, and that several processes are one run."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from launching import HEARTBEAT_S, ROOT, train, write_config
from toy_problem import StopAfter

import kdjax.train
from kdjax import config as configs
from kdjax import launch
from kdjax.config import command_line
from kdjax.distributed import cluster, xla_flags
from kdjax.training import metrics
from kdjax.types import UserError


def train_alone_until(file: Path, workdir: Path, step: int) -> None:
    """Begins or resumes the same run in this process, which has eight devices, and stops it after that step."""
    done = len(metrics.read(workdir, "train"))
    outcome = kdjax.train.run(configs.build(command_line.load(file)), workdir, StopAfter(step - done - 1))
    assert (outcome.ended, int(outcome.state.step)) == ("interrupted", step)


def losses(workdir: Path) -> list[tuple[int, str, float, float, float]]:
    """Returns, of each line, what neither time nor the order of summation changes: step, tokens, losses."""
    names = ("step", "split", "tokens", "loss", "sft_loss")
    return [tuple(line[name] for name in names) for line in metrics.read(workdir)]


def assert_same_losses(found: Path, expected: Path, steps: int, rtol: float) -> None:
    pairs = zip(losses(found)[: steps + 1], losses(expected)[: steps + 1], strict=True)
    for (step, split, tokens, *ours), (other_step, other_split, other_tokens, *theirs) in pairs:
        assert (step, split, tokens) == (other_step, other_split, other_tokens)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=f"step {step}")


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """Two processes, then one that resumes their run, then two again: the losses of a run never interrupted.

    The first two are stopped by SIGTERM to process 1, and save together. The last two hold one pipeline stage each, and
    are ended by SIGKILL to process 1: process 0 follows within twice the heartbeat and names the lost process.
    """
    file, workdir = write_config(tmp_path), tmp_path / "run"
    run = train(file, workdir)
    run.wait_for_steps(workdir, 4)
    run.signal(1, signal.SIGTERM)
    code, output = run.end()
    first = len(metrics.read(workdir, "train"))
    assert code == 130, output
    assert f"0| interrupted after step {first}/" in output
    assert "8 x cpu (data 8) in 2 processes" in output
    assert not re.search(r"^1\| (configuration|INFO|train|step|interrupted)", output, flags=re.MULTILINE)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(first)]

    train_alone_until(file, workdir, first + 3)

    run = train(file, workdir, "--config.mesh.pipe=2", "--config.mesh.tensor=2")
    run.wait_for_steps(workdir, first + 6)
    run.signal(1, signal.SIGKILL)
    killed = time.monotonic()
    code, output = run.end()
    assert time.monotonic() - killed < 2 * HEARTBEAT_S, output
    assert code == 137, output
    assert f"resumed at step {first + 3}" in output
    assert "8 x cpu (pipe 2 x data 2 x tensor 2) in 2 processes" in output
    assert "launch: process 1 of 2 was ended by SIGKILL; stopping the others" in output
    assert re.search(r"^0\| .*(no answer from process 1 of 2|tasks are unhealthy|gloo::EnforceNotMet)", output, re.M)

    train_alone_until(file, tmp_path / "whole", first + 6)
    assert_same_losses(workdir, tmp_path / "whole", first, rtol=1e-6)
    assert_same_losses(workdir, tmp_path / "whole", first + 6, rtol=1e-5)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nseq 0 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return program


def test_gpus_are_divided(nvidia_smi: Path) -> None:
    def divided(*arguments: Any) -> list[str]:
        return [variables["CUDA_VISIBLE_DEVICES"] for variables in launch.device_variables(*arguments)]

    assert divided(2, None, {}) == ["0,1,2,3", "4,5,6,7"]
    assert divided(3, 2, {}) == ["0,1", "2,3", "4,5"]
    assert divided(2, 4, {}) == ["0,1,2,3", "4,5,6,7"]
    assert divided(2, None, {"CUDA_VISIBLE_DEVICES": "3,5"}) == ["3", "5"]
    with pytest.raises(UserError, match=r"-n 3 does not divide the 8 GPUs; give --devices-per-process"):
        divided(3, None, {})
    with pytest.raises(UserError, match=r"-n 2 --devices-per-process 5 needs 10 GPUs, but there are 8"):
        divided(2, 5, {})


def test_fake_devices_replace_those_set_before(nvidia_smi: Path) -> None:
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8"
    variables = launch.device_variables(2, 4, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert [process["XLA_FLAGS"].split() for process in variables] == [
        ["--xla_a=1", "--xla_force_host_platform_device_count=4"]
    ] * 2


def test_without_gpus_each_process_gets_one_fake_device(nvidia_smi: Path) -> None:
    one_each = [{"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}] * 3
    assert launch.device_variables(3, None, {"CUDA_VISIBLE_DEVICES": ""}) == one_each
    nvidia_smi.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert launch.device_variables(3, None, {}) == one_each


def test_the_launcher_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="-n 0: must be at least 1"):
        launch.main(["-n", "0", "--", "kdjax.train"])
    with pytest.raises(UserError, match="--devices-per-process 0: must be at least 1"):
        launch.main(["-n", "1", "--devices-per-process", "0", "--", "kdjax.train"])
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    assert "kdjax launch -n 2 --devices-per-process 4 -- kdjax.train" in capsys.readouterr().out


def known_flags() -> set[str]:
    """Returns the flags that kdjax.train takes."""
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    xla_flags.add_flag(parser)
    return {flag for action in parser._actions for flag in action.option_strings} | {"--config", "--workdir"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("code", [0, 2, 130])
def test_the_slurm_script_starts_training_and_requeues_an_interrupted_run(code: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name, ends_with in (("srun", code), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\nexit {ends_with}\n')
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = str(ROOT / "scripts" / "slurm.sh")
    done = subprocess.run([script, "--config", "a.py", "--workdir", "r"], env=environment, check=False)
    assert done.returncode == code
    started, *after = log.read_text().splitlines()
    assert " -u -m kdjax.train " in started
    assert started.endswith(" --config a.py --workdir r")
    assert set(re.findall(r"--[\w-]+", started.partition("kdjax.train")[2])) <= known_flags()
    assert after == (["scontrol requeue 7"] if code == 130 else [])


def test_the_jobset_gives_flags_that_exist_and_numbers_that_agree() -> None:
    jobset = yaml.safe_load((ROOT / "scripts" / "jobset.yaml").read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    flags = dict(argument.split("=") for argument in container["args"])
    assert container["command"][-2:] == ["-m", "kdjax.train"]
    assert flags.keys() <= known_flags()
    assert flags["--config"] in command_line.recipes()
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(flags["--processes"])
    name = jobset["metadata"]["name"]
    assert flags["--coordinator"].startswith(f"{name}-{workers['name']}-0-0.{name}:")
    assert flags["--coordinator"].endswith(f":{container['ports'][0]['containerPort']}")
