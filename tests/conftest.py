"""Eight fake CPU devices on any machine, quick compilation, and a compilation cache that all workers share."""

import importlib.metadata
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Without LLVM's optimisations programs compile several times faster; what XLA plans (buffers, collectives) is the same.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib") < "0.11":  # which has no other way to write loops
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # compiles in half the time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with slow tests first, the longest before all, so that no worker ends on a long one alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path not in slow))


@pytest.fixture(autouse=True)
def _forget_streams() -> Iterator[None]:
    """Removes the log handlers that `kdjax.cli.run` installs: they write to a stream that pytest closes."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture
def compiler() -> None:
    """Skips the test where programs cannot be compiled for GPUs that are not there (extra "aot")."""
    from kdjax.plan.gpus import topology
    from kdjax.types import UserError

    try:
        topology("h100", 1)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def uncached() -> Iterator[None]:
    """Turns the compilation cache off: JAX would write programs for absent GPUs to it, then fail to read them."""
    import jax

    threshold = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, threshold)
    jax.config.update(threshold, math.inf)
    yield
    jax.config.update(threshold, before)
