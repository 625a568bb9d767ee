"""Start several processes of a run on this machine: `python -m kdjax.launch -n 2 -- kdjax.train --config ...`

What follows `--` is a module and its arguments; each process gets them with --coordinator, --processes and --process
added, and its output a number in front. With GPUs each process gets an equal share of them; without, every process
has --devices-per-process fake CPU devices. Ctrl-C and SIGTERM go to all. When one fails the others are ended, and the
exit code is its code.

  python -m kdjax.launch -n 8 -- kdjax.train --config configs/gpt2b_nemotron8b.py --workdir runs/mine
  JAX_PLATFORMS=cpu python -m kdjax.launch -n 2 --devices-per-process 4 -- kdjax.train --config ...

On several machines use what starts processes there: scripts/slurm.sh, scripts/jobset.yaml, mpirun.
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

GRACE_S = 20.0  # for the others to say what they know and end by themselves, once one has ended badly
FAKE_DEVICES = "--xla_force_host_platform_device_count"


def share_devices(count: int, each: int | None, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """For each process the variables that give it its devices. Raises UserError when they cannot be shared so."""
    gpus = [] if environment.get("JAX_PLATFORMS") == "cpu" else visible_gpus(environment)
    if not gpus:
        flags = re.sub(rf"{FAKE_DEVICES}=\d+", "", environment.get("XLA_FLAGS", ""))
        return [{"XLA_FLAGS": f"{flags} {FAKE_DEVICES}={each or 1}".strip()}] * count
    if each is None and len(gpus) % count:
        raise UserError(f"-n {count}: {len(gpus)} GPUs cannot be shared evenly; give --devices-per-process")
    each = each or len(gpus) // count
    if count * each > len(gpus):
        raise UserError(
            f"-n {count} --devices-per-process {each}: that takes {count * each} GPUs, and there are {len(gpus)}; "
            "JAX_PLATFORMS=cpu makes fake devices"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else every GPU that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(query, text=True, capture_output=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []


class Processes:
    """The processes of one run, from their start to the last one's end."""

    def __init__(self, command: Sequence[str], shares: Sequence[Mapping[str, str]]):
        with socket.socket() as free:  # a port that is free now; the service binds it a moment later
            free.bind(("127.0.0.1", 0))
            place = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", str(len(shares))]
        self._lock = threading.Lock()
        self._all = [
            subprocess.Popen(
                [sys.executable, "-m", *command, *place, "--process", str(number)],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **share},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C reaches them through here only, once
            )
            for number, share in enumerate(shares)
        ]
        self._pumps = [
            threading.Thread(target=self._pump, args=(f"{number}| ", source, sink))
            for number, process in enumerate(self._all)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for pump in self._pumps:
            pump.start()

    def _pump(self, prefix: str, source: IO[str], sink: IO[str]) -> None:
        with source:
            for line in source:
                with self._lock:
                    sink.write(prefix + line)
                    sink.flush()

    def send(self, number: int, frame: FrameType | None = None) -> None:
        """A signal to all that still run."""
        for process in self._all:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Until all have ended; the code of the first that ended badly, else 0."""
        code, deadline = 0, float("inf")
        while True:
            codes = [process.poll() for process in self._all]
            bad = [(number, ended) for number, ended in enumerate(codes) if ended]
            if bad and not code:
                first = min(bad, key=lambda end: end[1] == -signal.SIGABRT)  # JAX and Gloo abort when another is lost
                code, deadline = self._first_end(*first), time.monotonic() + GRACE_S
            if None not in codes:
                break
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for pump in self._pumps:
            pump.join()
        return code

    def _first_end(self, number: int, code: int) -> int:
        """Its exit code as a shell has it, after a word on a death that could not speak for itself."""
        if code > 0:
            return code
        with self._lock:
            print(
                f"launch: process {number} of {len(self._all)} was ended by {signal.Signals(-code).name}; "
                "ending the others",
                file=sys.stderr,
                flush=True,
            )
        return 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", metavar="N", dest="count", type=int, required=True, help="number of processes")
    parser.add_argument(
        "--devices-per-process",
        metavar="K",
        dest="each",
        type=int,
        help="GPUs, or fake CPU devices, of each (default: an equal share of the GPUs; without GPUs, 1)",
    )
    parser.add_argument("command", nargs="+", metavar="MODULE ...", help="after --: a module and its arguments")
    arguments = parser.parse_args(argv)
    for flag, value in (("-n", arguments.count), ("--devices-per-process", arguments.each)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a number of at least 1")
    processes = Processes(arguments.command, share_devices(arguments.count, arguments.each, os.environ))
    signal.signal(signal.SIGINT, processes.send)
    signal.signal(signal.SIGTERM, processes.send)
    return processes.wait()


if __name__ == "__main__":
    cli.run(main)
