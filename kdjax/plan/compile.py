"""Compiles a run's training step for a GPU that need not be present, and reads a `Plan` from the program."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from kdjax import cli
from kdjax.checkpoint import lay_out, read_teacher
from kdjax.config import Config
from kdjax.distributed import xla_flags
from kdjax.parallel import mesh as meshes
from kdjax.parallel.axes import PIPE, TENSOR
from kdjax.plan.gpus import topology
from kdjax.plan.hlo import collectives, kernels
from kdjax.plan.roofline import Plan, branch_share, score_elements
from kdjax.training.layout import pipeline_schedule
from kdjax.training.memory import held_bytes
from kdjax.training.step import make_train_step


def make_plan(
    config: Config,
    target: str,
    devices: int,
    top_k: int = 64,
    flags: str | None = None,
    options: Mapping[str, bool | int | str] | None = None,
) -> Plan:
    """Compiles the training step of a resolved configuration for a target, and returns its plan.

    `target` is a key of `TARGETS`, with or without "_sxm"; `top_k` the teacher entries where data.top_k is not set.
    `flags` is a set of `kdjax.distributed.xla_flags`, by default the one that training uses on GPUs; as there, flags in
    XLA_FLAGS take precedence. `options` are further compiler options, as for `jax.stages.Lowered.compile`.

    Raises UserError where the configuration does not fit the devices, or the compiler is not installed.
    """
    kind = target.removesuffix("_sxm")
    mesh = meshes.make_mesh(config.mesh.sizes, topology(kind, devices).devices)
    meshes.check_batch(mesh, config.batch.global_size, config.batch.microbatch_size)
    flags = flags or xla_flags.default_set(mesh.shape[PIPE])
    teacher = read_teacher(config)
    layout = lay_out(config, teacher, mesh)
    arguments: list[Any] = [layout.abstract_state(), layout.abstract_batch(config.data.top_k or top_k)]
    if layout.teacher is not None:
        arguments.append(layout.teacher.abstract_params())
    began = time.monotonic()
    step: Any = make_train_step(layout)
    given = os.environ.get("XLA_FLAGS", "")
    chosen = {name: value for name, value in xla_flags.compiler_options(flags).items() if f"--{name}=" not in given}
    program = step.lower(*arguments).compile(chosen | dict(options or {}))
    text, on_chip = program.as_text(), score_elements(config, mesh.shape[TENSOR])
    if teacher is not None:  # of which both models' scores are multiples
        on_chip = math.gcd(on_chip, score_elements(teacher, mesh.shape[TENSOR]))
    share = branch_share(pipeline_schedule(config, mesh.shape))
    return Plan(
        config=config,
        target=kind,
        mesh_shape=dict(mesh.shape),
        memory=_memory(held_bytes(layout), program.memory_analysis()),
        kernels=kernels(text, share, on_chip),
        collectives=collectives(text, devices, share, on_chip),
        flags=flags,
        compile_s=time.monotonic() - began,
        teacher=teacher,
    )


def _memory(held: dict[str, int], analysis: Any) -> dict[str, int]:
    """Returns the bytes by what they are for; their sum is what XLA allocates."""
    state = held["parameters"] + held["optimiser"] + held.get("teacher", 0)
    parts = {**held, "batch": analysis.argument_size_in_bytes - state}
    parts["activations, temporaries"] = analysis.temp_size_in_bytes - (sum(held.values()) - state)
    parts["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return parts


def compile_only() -> None:
    """Keeps JAX from looking for GPUs. Call it before using JAX."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else XLA's compiler logs, often, that it found no GPU
    cli.stay_on_host()
    # JAX cannot read programs for such a target back from its cache, and would warn about each.
    jax.config.update("jax_enable_compilation_cache", False)
