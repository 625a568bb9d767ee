"""Joins the processes of a run, and ends them together. A single process joins nothing and pays for nothing."""

import contextlib
import logging
import os
from collections.abc import Iterator

import jax

from kdjax.distributed import jax_private, rendezvous, watchdog
from kdjax.distributed.cluster import HANG_EXIT_CODE, HEARTBEAT_S, JOIN_S, STEP_S, Cluster
from kdjax.distributed.failures import FailureMonitor, exit_now
from kdjax.types import UserError


@contextlib.contextmanager
def joined(
    cluster: Cluster | None,
    heartbeat_s: int = HEARTBEAT_S,
    join_timeout_s: float = JOIN_S,
    step_timeout_s: float | None = None,
) -> Iterator[None]:
    """Joins the other processes, and leaves together with them. Enter it before anything touches a device.

    Inside, only process 0 prints: the standard output of the others is dropped, and of their logs only the warnings
    that no other process can give are kept. An exception that leaves the block ends all processes instead of
    propagating; it is printed once, with the processes it occurred on. So does `step_timeout_s` without a
    `watchdog.record_progress` on one of them.
    """
    if cluster is None:
        with watchdog.watching(step_timeout_s or 0, lambda hang: exit_now(HANG_EXIT_CODE, f"error: {hang}")):
            yield
        return
    _connect(cluster, heartbeat_s, join_timeout_s)
    monitor = FailureMonitor(jax_private.key_value_store(), cluster)
    if cluster.process != 0:
        _silence(cluster.process)
    try:
        with watchdog.watching(STEP_S if step_timeout_s is None else step_timeout_s, monitor.fail):
            yield
    except BaseException as error:
        monitor.fail(error)
    monitor.finish()
    jax.distributed.shutdown()


def _connect(cluster: Cluster, heartbeat_s: int, join_timeout_s: float) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which SharedStop handles
    address, local_devices = cluster.coordinator, None
    if address is None:
        address, local_devices = jax_private.detect_coordinator(JOIN_S)
        assert address is not None, "detect_cluster saw the variables that JAX reads it from"
    rendezvous.wait_for_all(address, cluster.processes, cluster.process, join_timeout_s)
    try:
        jax.distributed.initialize(
            address,
            cluster.processes,
            cluster.process,
            local_devices,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {cluster.process} of {cluster.processes} cannot join the others at {address}: {error}"
        ) from error


def _silence(process: int) -> None:
    """Drops this process's standard output, XLA's included, and all of its log but warnings about bad records."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda line: line.name == "kdjax.data.store" and line.levelno >= logging.WARNING)
        handler.setFormatter(logging.Formatter(f"%(levelname)s: process {process}: %(message)s"))
