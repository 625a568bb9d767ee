"""Everything that kdjax takes from JAX's private modules, with the reason.

Public JAX lacks each of these: `jax.distributed` does not return the coordinator that it reads from a launcher's
variables, nor its key-value store, and nothing tells whether XLA has read its flags or whether there is a GPU without
starting a backend. Tested with jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import os
from collections.abc import Sequence
from typing import Any

from jax._src import clusters, distributed
from jax._src.hardware_utils import has_visible_nvidia_gpu as has_visible_nvidia_gpu
from jax._src.xla_bridge import backends_are_initialized as backends_are_initialized


def detect_coordinator(timeout_s: int) -> tuple[str | None, Sequence[int] | None]:
    """Returns the coordinator's HOST:PORT and this process's local devices, from Slurm's or Open MPI's variables."""
    unset = (os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout_s)
    return found[0], found[3]


def key_value_store() -> Any:
    """Returns the client of JAX's coordination service: a key-value store and barriers. None for a single process."""
    return distributed.global_state.client
