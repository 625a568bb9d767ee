"""Several processes through the real command lines: the same run, the same stop, the same end."""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_problem as toy
import yaml
from toy_problem import StopAfter

from kdjax import config as configs
from kdjax import launch, train
from kdjax.config import command_line
from kdjax.data.files.scratch import alone
from kdjax.distributed import processes, xla_flags
from kdjax.distributed.processes import Place
from kdjax.training import metrics
from kdjax.types import UserError

ROOT = Path(__file__).parent.parent.parent
HEARTBEAT_S = 8


def write_config(directory: Path, **data: Any) -> Path:
    """A configuration file of a run that only a signal ends, on the toy problem's records."""
    toy.config(directory)
    settings = {
        "model": {
            "layers": 2,
            "d_model": 16,
            "n_heads": 2,
            "d_ff": 24,
            "vocab_size": toy.VOCAB,
            "padded_vocab_size": 64,
            "dtype": "float32",
        },
        "data": {
            "train": str(directory / "train.jsonl"),
            "val": str(directory / "val.jsonl"),
            "sequence_length": toy.LENGTH,
            "scratch_dir": str(directory / "scratch"),
            **data,
        },
        "batch": {"global_size": 16, "microbatch_size": 2},
        "loss": {"sft_loss_weight": 0.4},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
        "train": {"steps": 10**6, "val_every": 10**6, "save_every": 10**6},
    }
    file = directory / "config.py"
    file.write_text(f"def get_config():\n    return {settings!r}\n")
    return file


class Launched:
    """A run of two processes with four fake devices each, started with `python -m kdjax.launch`."""

    def __init__(self, file: Path, workdir: Path, *flags: str):
        self.workdir = workdir
        command = f"-m kdjax.launch -n 2 --devices-per-process 4 -- kdjax.train --heartbeat {HEARTBEAT_S}".split()
        self.launcher = subprocess.Popen(
            [sys.executable, *command, "--config", str(file), "--workdir", str(workdir), *flags],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait_for_steps(self, count: int) -> None:
        """Until metrics.jsonl shows so many steps."""
        while len(metrics.read(self.workdir, "train")) < count:
            assert self.launcher.poll() is None, self.launcher.communicate()[0]
            time.sleep(0.02)

    def signal(self, process: int, number: signal.Signals) -> None:
        """A signal to one process behind the launcher's back."""
        launcher = self.launcher.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        os.kill(int(children[process]), number)

    def end(self) -> tuple[int, str]:
        """The exit code and the output of a run that is about to end."""
        try:
            output = self.launcher.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            self.launcher.terminate()
            raise AssertionError(self.launcher.communicate()[0]) from None
        return self.launcher.returncode, output


def alone_until(file: Path, workdir: Path, step: int) -> None:
    """The same run, begun or taken up in this process, which has eight devices."""
    done = len(metrics.read(workdir, "train"))
    outcome = train.run(configs.build(command_line.load(file)), workdir, StopAfter(step - done - 1))
    assert (outcome.ended, int(outcome.state.step)) == ("interrupted", step)


def losses(workdir: Path) -> list[tuple[int, str, float, float, float]]:
    """Of each line what the clock and the order of summation do not touch: which step, which tokens, which losses."""
    names = ("step", "split", "tokens", "loss", "sft_loss")
    return [tuple(line[name] for name in names) for line in metrics.read(workdir)]


def assert_same_losses(found: Path, expected: Path, steps: int, rtol: float) -> None:
    pairs = zip(losses(found)[: steps + 1], losses(expected)[: steps + 1], strict=True)
    for (step, split, tokens, *ours), (other_step, other_split, other_tokens, *theirs) in pairs:
        assert (step, split, tokens) == (other_step, other_split, other_tokens)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=f"step {step}")


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """Two processes, then one that takes their run up, then two again: the losses of a run never interrupted.

    The first two are stopped by SIGTERM to the second, and save together. The last two hold a pipeline's stages, one
    each, and are ended by SIGKILL to the second: the first follows within twice the heartbeat and says whom it lost.
    """
    file, workdir = write_config(tmp_path), tmp_path / "run"
    run = Launched(file, workdir)
    run.wait_for_steps(12)
    run.signal(1, signal.SIGTERM)
    code, output = run.end()
    first = len(metrics.read(workdir, "train"))
    assert code == 130, output
    assert f"0| interrupted after step {first}/" in output
    assert "8 x cpu (data 8) in 2 processes" in output
    assert not re.search(r"^1\| (configuration|INFO|train|step|interrupted)", output, flags=re.MULTILINE)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(first)]

    alone_until(file, workdir, first + 5)

    run = Launched(file, workdir, "--config.mesh.pipe=2", "--config.mesh.tensor=2")
    run.wait_for_steps(first + 10)
    run.signal(1, signal.SIGKILL)
    killed = time.monotonic()
    code, output = run.end()
    assert time.monotonic() - killed < 2 * HEARTBEAT_S, output
    assert code == 137, output
    assert f"taken up after step {first + 5}" in output
    assert "8 x cpu (pipe 2 x data 2 x tensor 2) in 2 processes" in output
    assert "launch: process 1 of 2 was ended by SIGKILL; ending the others" in output
    assert re.search(r"^0\| .*(no answer from process 1 of 2|tasks are unhealthy|gloo::EnforceNotMet)", output, re.M)

    alone_until(file, tmp_path / "whole", first + 10)
    assert_same_losses(workdir, tmp_path / "whole", 10, rtol=1e-6)
    assert_same_losses(workdir, tmp_path / "whole", first + 10, rtol=1e-5)


@pytest.mark.parametrize("launcher", ["slurm", "open mpi"])
def test_a_launchers_processes_meet_and_tell_a_shared_mistake_once(launcher: str, tmp_path: Path) -> None:
    """As `srun -n 2` and `mpirun -n 2` start them: without a flag. The port follows from the job's number."""
    job = next(job for job in range(os.getpid(), os.getpid() + 99) if is_free(61440 + job % 4096))
    command = [sys.executable, "-m", "kdjax.train", "--config=absent.py", "--workdir", str(tmp_path / "run")]
    running = []
    for number in ("0", "1"):
        told = {
            "slurm": {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": number,
                "SLURM_LOCALID": number,
            },
            "open mpi": {
                "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": number,
                "OMPI_COMM_WORLD_LOCAL_RANK": number,
            },
        }[launcher]
        running.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | told, text=True, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], errors
    assert "\nerror: --config absent.py: there is no such file" in "\n" + errors[0]
    assert "\nerror" not in "\n" + errors[1]  # JAX may log one of its own


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def place(environment: dict[str, str], *flags: str) -> Place | None:
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    return processes.find_place(parser.parse_args(flags), environment)


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "a"}
OMPI_4 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}
OMPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, [], None),
        ({}, ["--coordinator=a:1", "--processes=4", "--process=3"], Place("a:1", 4, 3)),
        ({}, ["--coordinator=a:1", "--processes=1", "--process=0"], None),
        (SLURM, [], Place(None, 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [], None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, [], None),  # in the batch script itself
        (OMPI_4, [], Place(None, 4, 2)),
        (SLURM | {"SLURM_PROCID": "0"} | OMPI_4, [], Place(None, 4, 2)),  # mpirun in a Slurm job
        (OMPI_5, ["--coordinator=a:1"], Place("a:1", 4, 2)),
        (KUBERNETES, [], None),  # an indexed job may as well be a sweep
        (KUBERNETES, ["--coordinator=a:1", "--processes=2"], Place("a:1", 2, 1)),
    ],
)
def test_where_a_process_belongs(environment: dict[str, str], flags: list[str], expected: Place | None) -> None:
    assert place(environment, *flags) == expected


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({}, ["--processes=2"], "--processes 2: where is process 0"),
        ({}, ["--process=0"], "--process 0: where is process 0"),
        ({}, ["--coordinator=a:1"], "give --processes N too"),
        ({}, ["--coordinator=a:1", "--processes=2"], "give --process I too"),
        ({}, ["--coordinator=a", "--processes=2", "--process=0"], "--coordinator a: give HOST:PORT"),
        ({}, ["--coordinator=a:70000", "--processes=2", "--process=0"], "a:70000: give HOST:PORT"),
        ({}, ["--coordinator=a:1", "--processes=2", "--process=2"], "numbers go from 0 to 1"),
        (OMPI_5, [], "Open MPI started 4 processes and does not say where number 0 is"),
    ],
)
def test_flags_that_name_no_place(environment: dict[str, str], flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        place(environment, *flags)


def test_a_stop_is_seen_by_all_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever process is asked, and whichever of the two is ahead, by the step at most that metrics leave them."""
    store: dict[str, str] = {}

    class Client:
        def key_value_set(self, key: str, value: str) -> None:
            store[key] = value

        def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
            return [(key, value) for key, value in store.items() if key.startswith(prefix)]

    monkeypatch.setattr(processes, "_client", Client)
    for lead in (-1, 0, 1):
        store.clear()
        asked = threading.Event()
        asked.set()
        ours, theirs = processes.SharedStop(asked), processes.SharedStop(threading.Event())
        stopped: dict[str, int] = {}
        for moment in range(5, 12):  # `ours` is asked at its step 5
            for name, stop, step in (("theirs", theirs, moment + lead), ("ours", ours, moment)):
                if name not in stopped and stop.after(step):
                    stopped[name] = step
        assert stopped == {"ours": 7, "theirs": 7}, lead


def test_one_process_at_a_time_indexes_a_file(tmp_path: Path) -> None:
    inside, most = 0, 0

    def index() -> None:
        nonlocal inside, most
        with alone(tmp_path, tmp_path / "records.jsonl"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=index) for _ in range(4)]
    for thread in threads:
        thread.start()
    with alone(tmp_path, tmp_path / "other.jsonl"):  # another file is no reason to wait
        for thread in threads:
            thread.join(timeout=10)
    assert most == 1


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nseq 0 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_gpus_are_shared(nvidia_smi: None) -> None:
    def shares(*arguments: Any) -> list[str]:
        return [share["CUDA_VISIBLE_DEVICES"] for share in launch.share_devices(*arguments)]

    assert shares(2, None, {}) == ["0,1,2,3", "4,5,6,7"]
    assert shares(3, 2, {}) == ["0,1", "2,3", "4,5"]
    assert shares(2, None, {"CUDA_VISIBLE_DEVICES": "3,5"}) == ["3", "5"]
    with pytest.raises(UserError, match=r"-n 3: 8 GPUs cannot be shared evenly"):
        shares(3, None, {})
    with pytest.raises(UserError, match=r"-n 2 --devices-per-process 5: that takes 10 GPUs, and there are 8"):
        shares(2, 5, {})


def test_fake_devices_take_the_place_of_those_set_before(nvidia_smi: None) -> None:
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8"
    shares = launch.share_devices(2, 4, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert [share["XLA_FLAGS"].split() for share in shares] == [
        ["--xla_a=1", "--xla_force_host_platform_device_count=4"]
    ] * 2


def test_the_launcher_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="-n 0: give a number of at least 1"):
        launch.main(["-n", "0", "--", "kdjax.train"])
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    assert "python -m kdjax.launch -n 2 --devices-per-process 4 -- kdjax.train" in capsys.readouterr().out


def known_flags() -> set[str]:
    """What kdjax.train takes."""
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    xla_flags.add_flag(parser)
    return {flag for action in parser._actions for flag in action.option_strings} | {"--config", "--workdir"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("code", [0, 2, 130])
def test_the_slurm_script_starts_training_and_requeues_what_was_interrupted(code: int, tmp_path: Path) -> None:
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
    assert (ROOT / flags["--config"]).exists()
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(flags["--processes"])
    name = jobset["metadata"]["name"]
    assert flags["--coordinator"].startswith(f"{name}-{workers['name']}-0-0.{name}:")
    assert flags["--coordinator"].endswith(f":{container['ports'][0]['containerPort']}")
