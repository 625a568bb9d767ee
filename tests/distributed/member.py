"""A process of a run without a model: `python -m kdjax.launch -n 2 -- member ...`, with this directory on the path.

It joins the others, runs the Python code that a `--fault INDEX CODE` has for its index, and waits for all of them.
"""

import argparse
import ctypes
import os
import sys
import time

import jax

from kdjax import cli
from kdjax.distributed import cluster, consensus, failures, processes, watchdog
from kdjax.types import UserError

__all__ = ["UserError", "ctypes", "os", "sys", "time"]  # for the faults
POLL_S = 0.1
ACKNOWLEDGE_S = 2.0
GIL_GRACE_S = 0.8


def main() -> int:
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    parser.add_argument("--fault", nargs=2, metavar=("INDEX", "CODE"), action="append", default=[])
    arguments = parser.parse_args()
    watchdog.POLL_S, watchdog.GIL_GRACE_S = POLL_S, GIL_GRACE_S
    failures.POLL_S, failures.ACKNOWLEDGE_S = POLL_S, ACKNOWLEDGE_S
    timeouts = arguments.heartbeat, arguments.join_timeout, arguments.step_timeout
    with processes.joined(cluster.detect_cluster(arguments), *timeouts):
        watchdog.record_progress("the start")
        for index, code in arguments.fault:
            if int(index) == jax.process_index():
                run_fault(code)
        consensus.from_process_zero(True)
        print("all there")
    return 0


def run_fault(code: str) -> None:
    exec(code, globals())


if __name__ == "__main__":
    cli.run(main)
