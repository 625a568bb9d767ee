"""Several processes as one run: how they find each other, agree, and end together when one fails.

JAX's coordination service, which lives in process 0, notices processes that die: without a sign of life for the
heartbeat's time they are named and the others aborted. Python's exceptions, and that nothing moves, are told through
the service's key-value store, which every process looks into once in a while. A run of one process meets nobody and
pays for nothing.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # the public jax.distributed hands out neither address nor key-value store
from jax.experimental import multihost_utils

from kdjax.distributed import rendezvous
from kdjax.distributed.rendezvous import named
from kdjax.distributed.watchdog import Hung, Watchdog
from kdjax.types import UserError

log = logging.getLogger("kdjax")

HEARTBEAT_S = 100  # JAX's default
JOIN_S = 300  # JAX's default
STEP_S = 1800  # the first step is compiled in it, and between two there may be a checkpoint to write
HUNG = 124  # the exit code of timeout(1)
LOOK_EVERY_S = 0.5  # for failures of others
ANSWER_S = 5.0  # ten looks; who has not answered by then is dead or hangs
FINISH_S = 3600  # between the first process and the last to come to the end: room for a checkpoint
FAILED, ANSWERED, TOLD, LEFT, STOP, SAID = (
    f"kdjax/{name}/" for name in ("failed", "answered", "told", "left", "stop", "said")
)
# The variables in which launchers tell the number of processes and each its own; Open MPI first, as it may run inside
# Slurm, where its processes see Slurm's variables too. Kubernetes' indexed jobs tell the latter only.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("", "JOB_COMPLETION_INDEX"),
)
DETECTED = ("OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST")  # from which JAX learns where process 0 is


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process belongs. Without an address JAX finds it all: it knows Slurm and Open MPI 4."""

    coordinator: str | None  # HOST:PORT of process 0
    processes: int
    process: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that place a process among several."""
    group = parser.add_argument_group(
        "several processes",
        "Under Slurm (srun) and Open MPI 4 processes find each other by themselves, one GPU each. Elsewhere give "
        "these flags to every process. `python -m kdjax.launch` starts several on one machine.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached; any free port will do")
    group.add_argument("--processes", metavar="N", type=int, help="how many there are (default: as the launcher says)")
    group.add_argument(
        "--process",
        metavar="I",
        type=int,
        help="this one's number, from 0 (default: as the launcher says)",
    )
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        default=HEARTBEAT_S,
        help="without a sign of life for so long a process counts as dead and the run ends (default: %(default)s)",
    )
    group.add_argument(
        "--join-timeout",
        metavar="SECONDS",
        type=float,
        default=JOIN_S,
        help="who has not come by then is named, and the run ends (default: %(default)s)",
    )
    group.add_argument(
        "--step-timeout",
        metavar="SECONDS",
        type=float,
        help="when no step, validation batch or checkpoint has ended for so long, say where each process is and end "
        f"the run with {HUNG}; 0: never (default: {STEP_S} with several processes, else never)",
    )


def find_place(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place by its flags, else by its launcher's variables; None for a process on its own.

    Raises UserError for flags that name no place.
    """
    coordinator, processes, process = arguments.coordinator, arguments.processes, arguments.process
    names = next((names for names in LAUNCHERS if names[1] in environment), ("", ""))
    count, number = (int(environment[name]) if name in environment else None for name in names)
    if coordinator is None:
        for flag, value in (("--processes", processes), ("--process", process)):
            if value is not None:
                raise UserError(f"{flag} {value}: where is process 0? give --coordinator HOST:PORT too")
        if count is None or number is None or count == 1:
            return None
        if not any(name in environment for name in DETECTED):
            if names[0] == "SLURM_NTASKS":  # the batch script itself, which runs once
                return None
            raise UserError(
                f"Open MPI started {count} processes and does not say where number 0 is, as its versions before 5 do; "
                "give all of them --coordinator HOST:PORT"
            )
        return Place(None, count, number)
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator}: give HOST:PORT, such as node1:1234")
    processes, process = count if processes is None else processes, number if process is None else process
    if processes is None or process is None:
        missing = "--processes N" if processes is None else "--process I"
        raise UserError(f"--coordinator {coordinator}: give {missing} too; no launcher says it here")
    if not 0 <= process < processes:
        raise UserError(f"--process {process}: of --processes {processes} the numbers go from 0 to {processes - 1}")
    return Place(coordinator, processes, process) if processes > 1 else None


@contextlib.contextmanager
def together(
    place: Place | None,
    heartbeat_s: int = HEARTBEAT_S,
    join_s: float = JOIN_S,
    step_s: float | None = None,
) -> Iterator[None]:
    """Meets the other processes, and leaves with them. To be entered before anything touches a device.

    Inside, only process 0 is heard: the others' standard output is dropped, and of their log what they alone know is
    kept. An exception that gets out ends all processes, with its text and where it happened told once; it does not
    come out of here then. The same ends them when nothing has `moved` on one of them for `step_s`.
    """
    if place is None:
        with _watched(step_s or 0, _end_alone):
            yield
        return
    _connect(place, heartbeat_s, join_s)
    watch = _Watch(_client(), place)
    if place.process != 0:
        _quieten(place.process)
    try:
        with _watched(STEP_S if step_s is None else step_s, watch.fail):
            yield
    except BaseException as error:
        watch.fail(error)
    watch.finish()
    jax.distributed.shutdown()


_watchdog: Watchdog | None = None  # of this process, while it is to be watched


def moved(what: str) -> None:
    """This process has done something that a run which hangs would not do."""
    if _watchdog is not None:
        _watchdog.moved(what)


@contextlib.contextmanager
def _watched(step_s: float, end: Callable[[Hung], None]) -> Iterator[None]:
    global _watchdog
    if step_s <= 0:
        yield
        return
    _watchdog = Watchdog(step_s, end)
    try:
        yield
    finally:
        _watchdog.stop()
        _watchdog = None


def _end_alone(hung: Hung) -> None:
    _leave(HUNG, f"error: {hung}")


def _connect(place: Place, heartbeat_s: int, join_s: float) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; SharedStop covers it
    address, local_devices = place.coordinator, None
    if address is None:
        unset = (os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None)
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*unset, JOIN_S)
        address, local_devices = found[0], found[3]
        assert address is not None, "find_place saw the variables that JAX reads it from"
    rendezvous.meet(address, place.processes, place.process, join_s)
    try:
        jax.distributed.initialize(
            address,
            place.processes,
            place.process,
            local_devices,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.process} of {place.processes} cannot meet the others at {address}: {error}"
        ) from error


def _client() -> Any:
    """The key-value store of the run, None for a process on its own."""
    return distributed.global_state.client


def _quieten(process: int) -> None:
    """Drops this process's standard output, XLA's too, and of its log keeps what no other knows: bad records."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda line: line.name == "kdjax.data.store" and line.levelno >= logging.WARNING)
        handler.setFormatter(logging.Formatter(f"%(levelname)s: process {process}: %(message)s"))


class _Watch:
    """Looks for failures of any process while the main thread works, and ends this one when there is one."""

    def __init__(self, client: Any, place: Place):
        self._client, self._place = client, place
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._look, name="kdjax-watch", daemon=True)
        self._thread.start()

    def fail(self, error: BaseException) -> None:
        """Tells all of `error` and ends this process with them."""
        if isinstance(error, UserError):
            code, text = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, "stopped at once"
        elif isinstance(error, Hung):
            code, text = HUNG, str(error)
        else:
            code, text = 1, "".join(traceback.format_exception(error)).rstrip()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(code, text)
            self._thread.join()  # which ends this process
        _leave(code, f"error on process {self._place.process} of {self._place.processes}: {text}")

    def finish(self) -> None:
        """Waits for all to come here; until then a failure of any still ends this one."""
        try:
            self._client.wait_at_barrier("kdjax/finish", FINISH_S * 1000)
        except jax.errors.JaxRuntimeError as error:
            self.fail(error)
        self._finished.set()
        self._thread.join()

    def _look(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no service any more: JAX itself ends this process
            while not self._finished.wait(LOOK_EVERY_S):
                if self._client.key_value_dir_get(FAILED):
                    self._end()

    def _end(self) -> None:
        """Process 0 hears all, speaks, and leaves last, because the service is in it."""
        client, number, count = self._client, self._place.process, self._place.processes
        failures, watchdog = self._failures(), _watchdog
        if any(code == HUNG for code, _ in failures.values()) and number not in failures and watchdog is not None:
            # The one that waits too long first need not be the one that the others wait for.
            self._tell(HUNG, watchdog.report())
        client.key_value_set(f"{ANSWERED}{number}", "")
        _until(lambda: len(client.key_value_dir_get(ANSWERED)) == count, ANSWER_S)
        time.sleep(LOOK_EVERY_S)  # what fails on one often fails on all
        failures = self._failures()
        answered = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(ANSWERED)}
        code = failures[min(failures)][0]
        if number != 0:
            is_told = _until(lambda: bool(client.key_value_dir_get(TOLD)), 2 * ANSWER_S)
            client.key_value_set(f"{LEFT}{number}", "")
            # Where process 0 hangs, the first that does not speaks for it.
            _leave(code, "" if is_told or number != min(answered - {0}) else _told(failures, answered, count))
        sys.stdout.flush()
        print(_told(failures, answered, count), file=sys.stderr, flush=True)
        client.key_value_set(f"{TOLD}0", "")
        _until(lambda: len(client.key_value_dir_get(LEFT)) >= len(answered) - 1, ANSWER_S)
        _leave(code, "")

    def _tell(self, code: int, text: str) -> None:
        failure = json.dumps([code, text])
        self._client.key_value_set(f"{FAILED}{self._place.process}", failure, allow_overwrite=True)

    def _failures(self) -> dict[int, tuple[int, str]]:
        """Exit code and text of each process that has failed."""
        told = self._client.key_value_dir_get(FAILED)
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in told}


def _told(failures: Mapping[int, tuple[int, str]], answered: set[int], count: int) -> str:
    """Each failure once, with the processes it happened on, and who gave no answer."""
    lines = []
    for text in dict.fromkeys(text for _, text in failures.values()):
        having = [number for number, (_, other) in sorted(failures.items()) if other == text]
        lines.append(f"error: {text}" if len(having) == count else f"error on {named(having, count)}: {text}")
    if silent := sorted(set(range(count)) - answered):
        lines.append(f"error: no answer from {named(silent, count)}: killed, or hanging; it may have failed first")
    return "\n".join(lines)


def _until(holds: Callable[[], bool], patience_s: float) -> bool:
    """Whether `holds` within that time."""
    end = time.monotonic() + patience_s
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(LOOK_EVERY_S / 5)
    return held


def _leave(code: int, text: str) -> None:
    """Without the interpreter's clean-up, in which JAX would wait for processes that are no more."""
    if text:
        print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def from_first(value: bool) -> bool:
    """Process 0's value, on all. Every process calls this; none goes on before process 0 has."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def all_say(what: str, patience_s: float = 60) -> bool:
    """Whether every process says `what` within that time; to be said once."""
    client = _client()
    if client is None:
        return True
    client.key_value_set(f"{SAID}{what}/{jax.process_index()}", "")
    return _until(lambda: len(client.key_value_dir_get(f"{SAID}{what}/")) == jax.process_count(), patience_s)


def require_same(values: Mapping[str, str]) -> None:
    """Every process calls this with what must not differ between them. Raises UserError naming who differs in what."""
    if jax.process_count() == 1:
        return
    mine = [hashlib.blake2b(value.encode(), digest_size=16).digest() for value in values.values()]
    digests_PxNx16 = multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint8).reshape(-1, 16))
    for name, digest_Px16 in zip(values, np.moveaxis(digests_PxNx16, 1, 0), strict=True):
        others = np.flatnonzero((digest_Px16 != digest_Px16[0]).any(axis=-1)).tolist()
        if others:
            raise UserError(
                f"{named(others, jax.process_count())} differ from process 0 in {name}; give all the same command "
                "line, and let all read the same files"
            )


class SharedStop:
    """An event that may be set on any process, as all processes see it: after the same step."""

    def __init__(self, event: threading.Event):
        self._event, self._is_told = event, False

    def after(self, step: int) -> bool:
        """Whether to stop after `step`. Called once a step, when the metrics of the step before it are there.

        Those took part of every process in that step. So who is here at s + 2 knows that the others have left here at
        s, and finds the stop after s + 2 that one of them may have announced then.
        """
        client, is_set = _client(), self._event.is_set()
        if client is None:
            return is_set
        if is_set and not self._is_told:
            client.key_value_set(f"{STOP}{jax.process_index()}", str(step + 2))
            self._is_told = True
        return any(step >= int(announced) for _, announced in client.key_value_dir_get(STOP))
