"""Runs of several processes, started as a user does, for the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import toy_problem as toy

from kdjax.training import metrics

ROOT = Path(__file__).parent.parent.parent
HEARTBEAT_S = 8
END_S = 60  # a run that takes longer to end hangs


def write_config(directory: Path, **data: Any) -> Path:
    """Writes the configuration file of a run on the toy problem's records that only a signal or a failure ends."""
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
    """Two processes of a module, started with `python -m kdjax.launch`."""

    def __init__(self, *command: str, devices: int = 1, heartbeat_s: int = HEARTBEAT_S):
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        launch = ["-m", "kdjax.launch", "-n", "2", "--devices-per-process", str(devices), "--"]
        self.launcher = subprocess.Popen(
            [sys.executable, *launch, *command, f"--heartbeat={heartbeat_s}"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def wait_for_steps(self, workdir: Path, count: int) -> None:
        """Returns when metrics.jsonl has that many training steps."""
        while len(metrics.read(workdir, "train")) < count:
            assert self.launcher.poll() is None, self.launcher.communicate()[0]
            time.sleep(0.02)

    def signal(self, process: int, number: signal.Signals) -> None:
        """Sends a signal to one process behind the launcher's back."""
        launcher = self.launcher.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        os.kill(int(children[process]), number)

    def end(self) -> tuple[int, str]:
        """Returns the exit code and the output of a run that is about to end."""
        try:
            output = self.launcher.communicate(timeout=END_S)[0]
        except subprocess.TimeoutExpired:
            self.launcher.terminate()
            raise AssertionError(self.launcher.communicate()[0]) from None
        return self.launcher.returncode, output


def train(file: Path, workdir: Path, *flags: str) -> Launched:
    """Starts a training run with four fake devices per process."""
    return Launched("kdjax.train", "--config", str(file), "--workdir", str(workdir), *flags, devices=4)


def members(*faults: tuple[int, str], flags: tuple[str, ...] = ()) -> Launched:
    """Starts two processes of member.py, with code to run on some of them."""
    options = [word for index, code in faults for word in ("--fault", str(index), code)]
    return Launched("member", *options, *flags, heartbeat_s=4)
