"""Starts several processes of a command on this machine, for example `kdjax launch -n 2 -- kdjax.train --config ...`

What follows `--` is a module and its arguments. Each process receives them with --coordinator, --processes and
--process added, and its output is shown with its index in front. GPUs are divided equally among the processes; without
GPUs, each process gets --devices-per-process fake CPU devices. Ctrl-C and SIGTERM are sent to all processes. When one
fails the others are stopped, and its exit code is returned.

  kdjax launch -n 8 -- kdjax.train --config gpt2b_nemotron8b --workdir runs/mine
  JAX_PLATFORMS=cpu kdjax launch -n 2 --devices-per-process 4 -- kdjax.train --config ...

To start processes on several machines, see scripts/slurm.sh and scripts/jobset.yaml, or use mpirun.
"""

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
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from kdjax import cli
from kdjax.types import UserError

GRACE_S = 20.0  # after one process has failed, for the others to print what they know and end by themselves
FAKE_DEVICES = "--xla_force_host_platform_device_count"


def device_variables(count: int, each: int | None, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns, for each of `count` processes, the environment variables that give it its devices.

    `each` is the number of devices of a process; None divides the GPUs equally, or gives one fake device. Raises
    UserError when the GPUs cannot be divided so.
    """
    gpus = [] if environment.get("JAX_PLATFORMS") == "cpu" else visible_gpus(environment)
    if not gpus:
        flags = re.sub(rf"{FAKE_DEVICES}=\d+", "", environment.get("XLA_FLAGS", ""))
        return [{"XLA_FLAGS": f"{flags} {FAKE_DEVICES}={each or 1}".strip()}] * count
    if each is None and len(gpus) % count:
        raise UserError(f"-n {count} does not divide the {len(gpus)} GPUs; give --devices-per-process")
    each = each or len(gpus) // count
    if count * each > len(gpus):
        raise UserError(
            f"-n {count} --devices-per-process {each} needs {count * each} GPUs, but there are {len(gpus)}; "
            "set JAX_PLATFORMS=cpu to use fake devices"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the GPUs in CUDA_VISIBLE_DEVICES, else every GPU that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, text=True, capture_output=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []


class Processes:
    """The processes of one run, from the start of the first to the end of the last."""

    def __init__(self, command: Sequence[str], variables: Sequence[Mapping[str, str]]):
        with socket.socket() as probe:  # a free port, which the coordination service binds a moment later
            probe.bind(("127.0.0.1", 0))
            flags = ["--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--processes", str(len(variables))]
        self._print_lock = threading.Lock()
        self._all = [
            subprocess.Popen(
                [sys.executable, "-m", *command, *flags, "--process", str(index)],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **devices},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that a terminal's Ctrl-C reaches them once, through `send`
            )
            for index, devices in enumerate(variables)
        ]
        self._copiers = [
            threading.Thread(target=self._copy_lines, args=(f"{index}| ", source, sink))
            for index, process in enumerate(self._all)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for copier in self._copiers:
            copier.start()

    def _copy_lines(self, prefix: str, source: IO[str], sink: IO[str]) -> None:
        with source:
            for line in source:
                with self._print_lock:
                    sink.write(prefix + line)
                    sink.flush()

    def send(self, number: int, frame: FrameType | None = None) -> None:
        """Sends a signal to every process that still runs."""
        for process in self._all:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits until all processes have ended. Returns the exit code of the first that failed, else 0."""
        code, deadline = 0, float("inf")
        while True:
            codes = [process.poll() for process in self._all]
            failed = [(index, ended) for index, ended in enumerate(codes) if ended]
            if failed and not code:
                # JAX and Gloo abort when another process is lost, so an aborted process is not the first to blame.
                first = min(failed, key=lambda end: end[1] == -signal.SIGABRT)
                code, deadline = self._shell_code(*first), time.monotonic() + GRACE_S
            if None not in codes:
                break
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for copier in self._copiers:
            copier.join()
        return code

    def _shell_code(self, index: int, code: int) -> int:
        """Returns the exit code as a shell does. Prints a line for a signal, which the process could not report."""
        if code > 0:
            return code
        with self._print_lock:
            print(
                f"launch: process {index} of {len(self._all)} was ended by {signal.Signals(-code).name}; "
                "stopping the others",
                file=sys.stderr,
                flush=True,
            )
        return 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="kdjax launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", metavar="N", dest="count", type=int, required=True, help="number of processes")
    parser.add_argument(
        "--devices-per-process",
        metavar="K",
        dest="each",
        type=int,
        help="GPUs, or fake CPU devices, per process (default: an equal share of the GPUs; without GPUs, 1)",
    )
    parser.add_argument("command", nargs="+", metavar="MODULE ...", help="after --: a module and its arguments")
    arguments = parser.parse_args(argv)
    for flag, value in (("-n", arguments.count), ("--devices-per-process", arguments.each)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    processes = Processes(arguments.command, device_variables(arguments.count, arguments.each, os.environ))
    signal.signal(signal.SIGINT, processes.send)
    signal.signal(signal.SIGTERM, processes.send)
    return processes.wait()


if __name__ == "__main__":
    cli.run(main)
