"""Plans for the tests: small ones compiled for H100s, each once, and ones that nothing was compiled for."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from kdjax import config as configs
from kdjax.config import Config, command_line
from kdjax.config.validate import resolve
from kdjax.parallel.axes import AXES
from kdjax.plan.compile import make_plan
from kdjax.plan.gpus import TARGETS
from kdjax.plan.hlo import Work
from kdjax.plan.roofline import Plan

CONFIG = Path(__file__).parents[2] / "configs" / "gpt2b_nemotron8b.py"
SMALL = {"model__layers": 2, "batch__global_size": 16, "data__sequence_length": 512, "model__attention": "xla"}
FLAGS = ["--config", str(CONFIG), *(f"--config.{key.replace('__', '.')}={value}" for key, value in SMALL.items())]
MESH = {"pipe": 1, "data": 1, "fsdp": 1, "tensor": 8}
TENSOR_GROUPS, DATA_GROUPS_ACROSS_HOSTS = (tuple(range(8)),), tuple((i, i + 8) for i in range(8))


def config(**changes: object) -> Config:
    return resolve(configs.replace(configs.build(command_line.load(CONFIG)), **SMALL | changes))


@functools.cache
def compiled(devices: int = 8, unmerged: bool = False, **changes: Any) -> Plan:
    """Returns the plan of `config(**changes)` for H100s. `unmerged`: XLA merges no reduce-scatters.

    cuBLAS multiplies and not Triton, which compiles faster by a third; what is sent and multiplied stays the same.
    """
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
    if unmerged:
        options["xla_gpu_reduce_scatter_combine_threshold_bytes"] = 0
    return make_plan(config(**changes), "h100_sxm", devices, options=options)


def imagined(config: Config, nbytes: int = 2**30, step_s: float = 1.0, **changes: Any) -> Plan:
    """Returns a plan for H100s with this memory and step time, as if it had been compiled."""
    mesh_shape = {axis: max(1, getattr(config.mesh, axis)) for axis in AXES}
    kernels = [(1.0, Work(1, round(step_s * TARGETS["h100"].memory_bandwidth)))]
    plan = Plan(config, "h100", mesh_shape, {"parameters": nbytes}, kernels, [], "none", 1.0)
    return dataclasses.replace(plan, **changes)
