"""What the processes of a run agree on: values, equal inputs, problems that all have, and when to stop."""

import hashlib
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax.distributed import jax_private
from kdjax.distributed.failures import wait_until
from kdjax.distributed.rendezvous import describe_processes
from kdjax.types import UserError

STOP, AGREED = "kdjax/stop/", "kdjax/agreed/"  # keys of the key-value store


def is_process_zero() -> bool:
    """Returns whether this is process 0, which writes files and prints for all processes."""
    return jax.process_index() == 0


def from_process_zero(value: bool) -> bool:
    """Returns process 0's value. Every process must call this, and waits until process 0 has."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def wait_for_all(what: str) -> None:
    """Waits until every process has come here; each call needs a name of its own."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(statement: str, timeout_s: float = 60) -> bool:
    """Returns whether every process makes the same statement within that time. Make each statement only once."""
    client = jax_private.key_value_store()
    if client is None:
        return True
    client.key_value_set(f"{AGREED}{statement}/{jax.process_index()}", "")
    return wait_until(lambda: len(client.key_value_dir_get(f"{AGREED}{statement}/")) == jax.process_count(), timeout_s)


def check_same(values: Mapping[str, str]) -> None:
    """Raises UserError, naming the processes and the value, where a value differs from process 0's.

    Every process must call this with the same names. A single process passes.
    """
    if jax.process_count() == 1:
        return
    mine = [hashlib.blake2b(value.encode(), digest_size=16).digest() for value in values.values()]
    digests_PxNx16 = multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint8).reshape(-1, 16))
    for name, digest_Px16 in zip(values, np.moveaxis(digests_PxNx16, 1, 0), strict=True):
        others = np.flatnonzero((digest_Px16 != digest_Px16[0]).any(axis=-1)).tolist()
        if others:
            who = f"{describe_processes(others, jax.process_count())} {'differs' if len(others) == 1 else 'differ'}"
            raise UserError(
                f"{who} from process 0 in {name}; start all processes with the same command line, and let all of them "
                "read the same files"
            )


class SharedStop:
    """A request to stop that may be made on any process, and that all processes follow after the same step."""

    def __init__(self, event: threading.Event):
        self._event, self._is_announced = event, False

    def is_due(self, step: int) -> bool:
        """Returns whether to stop after `step`. Call it once a step, after fetching the previous step's metrics.

        A request on process p during step s is announced for s + 2. When a process calls this for s + 2 it has the
        metrics of step s + 1, which every process took part in, so p called this for step s before: the announcement is
        visible.
        """
        client, is_set = jax_private.key_value_store(), self._event.is_set()
        if client is None:
            return is_set
        if is_set and not self._is_announced:
            client.key_value_set(f"{STOP}{jax.process_index()}", str(step + 2))
            self._is_announced = True
        return any(step >= int(announced) for _, announced in client.key_value_dir_get(STOP))
