"""Which process this is, of how many, and where process 0 is: from the command line, else from the launcher."""

import argparse
import dataclasses
import os
from collections.abc import Mapping

from kdjax.types import UserError

HEARTBEAT_S = 100  # JAX's default
JOIN_S = 300  # JAX's default
STEP_S = 1800  # room for compiling the first step, and for writing a checkpoint between two steps
HANG_EXIT_CODE = 124  # that of timeout(1)

# Variables in which launchers give the number of processes and each process its index. Open MPI comes first, since it
# may run inside Slurm, where its processes see Slurm's variables too. Kubernetes' indexed jobs give the index only.
LAUNCHER_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("", "JOB_COMPLETION_INDEX"),
)
COORDINATOR_VARIABLES = ("OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST")  # from which JAX finds the coordinator


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, and this one's index among them."""

    coordinator: str | None  # HOST:PORT of process 0; None: JAX detects it, under Slurm and Open MPI 4
    processes: int
    process: int  # from 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run of several processes."""
    group = parser.add_argument_group(
        "several processes",
        "Slurm (srun) and Open MPI 4 are detected; each process then uses one GPU. Elsewhere, give these flags to "
        "every process. `kdjax launch` starts several processes on one machine.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; any free port will do")
    group.add_argument("--processes", metavar="N", type=int, help="number of processes (default: from the launcher)")
    group.add_argument("--process", metavar="I", type=int, help="index of this process, from 0 (default: likewise)")
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        default=HEARTBEAT_S,
        help="a process without a heartbeat for this long is considered dead, and the run ends (default: %(default)s)",
    )
    group.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=float,
        default=JOIN_S,
        help="time to wait for all processes; missing ones are listed, and the run ends (default: %(default)s)",
    )
    group.add_argument(
        "--step-timeout",
        metavar="SECONDS",
        type=float,
        help="when no step, validation batch or checkpoint completes for this long, print where each process is and "
        f"exit with {HANG_EXIT_CODE}; 0: never (default: {STEP_S} with several processes, else never)",
    )


def detect_cluster(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Returns the cluster given by the flags, else by the launcher's variables; None for a single process.

    Raises UserError for flags that are incomplete or contradict each other.
    """
    coordinator, processes, process = arguments.coordinator, arguments.processes, arguments.process
    names = next((names for names in LAUNCHER_VARIABLES if names[1] in environment), ("", ""))
    count, index = (int(environment[name]) if name in environment else None for name in names)
    if coordinator is None:
        for flag, value in (("--processes", processes), ("--process", process)):
            if value is not None:
                raise UserError(f"{flag} {value} also needs --coordinator HOST:PORT, the address of process 0")
        if count is None or index is None or count == 1:
            return None
        if not any(name in environment for name in COORDINATOR_VARIABLES):
            if names[0] == "SLURM_NTASKS":  # the batch script itself, which runs once
                return None
            raise UserError(
                f"Open MPI started {count} processes but does not say where process 0 is, as only versions before 5 "
                "do; pass --coordinator HOST:PORT to all processes"
            )
        return Cluster(None, count, index)
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator}: give HOST:PORT, such as node1:1234")
    processes, process = count if processes is None else processes, index if process is None else process
    if processes is None or process is None:
        missing = "--processes N" if processes is None else "--process I"
        raise UserError(f"--coordinator {coordinator} also needs {missing}, which no launcher sets here")
    if not 0 <= process < processes:
        raise UserError(f"--process {process}: with --processes {processes} it must be from 0 to {processes - 1}")
    return Cluster(coordinator, processes, process) if processes > 1 else None
