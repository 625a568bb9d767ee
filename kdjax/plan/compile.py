"""Compiles a run's training step for a GPU that is not here, and reads a `Plan` from the program."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import cli
from kdjax.config import Config
from kdjax.distributed import xla_flags
from kdjax.parallel import mesh as meshes
from kdjax.plan import roofline
from kdjax.plan.gpus import topology
from kdjax.plan.hlo import collectives, kernels
from kdjax.plan.roofline import Plan
from kdjax.training import memory
from kdjax.training.step import abstract_state, make_train_step
from kdjax.types import Batch


def make_plan(
    config: Config,
    target: str,
    devices: int,
    top_k: int = 64,
    flags: str | None = None,
    options: Mapping[str, bool | int | str] | None = None,
) -> Plan:
    """Compiles the training step of `config` (resolved) for the target. Raises UserError where that cannot be.

    `flags` names a set of `kdjax.distributed.xla_flags`; None: the one that training chooses on GPUs. As there,
    what XLA_FLAGS says goes before it. `options` are more of XLA's options, as `jax.stages.Lowered.compile` takes them.
    """
    kind = target.removesuffix("_sxm")
    mesh = meshes.make_mesh(config.mesh, topology(kind, devices).devices)
    meshes.check_split(mesh, config.batch)
    shape = dict(mesh.shape)
    flags = flags or xla_flags.suited(shape["pipe"])
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh, config.data.top_k or top_k)
    began = time.monotonic()
    step: Any = make_train_step(config, mesh)
    given = os.environ.get("XLA_FLAGS", "")
    chosen = {name: value for name, value in xla_flags.compiler_options(flags).items() if f"--{name}=" not in given}
    program = step.lower(state, batch).compile(chosen | dict(options or {}))
    text, on_chip = program.as_text(), roofline.scores(config, shape)
    taken = roofline.due(roofline.schedule(config, shape))
    return Plan(
        config=config,
        target=kind,
        shape=shape,
        memory=_memory(memory.held(config, mesh), program.memory_analysis()),
        kernels=kernels(text, taken, on_chip),
        collectives=collectives(text, devices, taken, on_chip),
        flags=flags,
        compile_s=time.monotonic() - began,
    )


def _memory(held: dict[str, int], analysis: Any) -> dict[str, int]:
    """Bytes by what they are for; the sum is what XLA allocates."""
    state = held["parameters"] + held["optimiser"]
    parts = {**held, "batch": analysis.argument_size_in_bytes - state}
    parts["activations, temporaries"] = analysis.temp_size_in_bytes - (sum(held.values()) - state)
    parts["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return parts


def abstract_batch(config: Config, mesh: jax.sharding.Mesh, top_k: int) -> Batch:
    """A global batch's shapes."""
    rows = jax.sharding.NamedSharding(mesh, meshes.ROWS)

    def shape(dtype: Any, *rest: int) -> Any:
        size = (config.batch.global_size, config.data.sequence_length, *rest)
        return jax.ShapeDtypeStruct(size, dtype, sharding=rows)

    return Batch(
        tokens=shape(jnp.int32),
        labels=shape(jnp.int32),
        loss_mask=shape(jnp.float32),
        topk_logits=shape(jnp.float32, top_k),
        topk_token_ids=shape(jnp.int32, top_k),
        log_sum_exp_logits=shape(jnp.float32),
        positions=shape(jnp.int32) if config.data.pack else None,
        segment_ids=shape(jnp.int32) if config.data.pack else None,
    )


def compile_only() -> None:
    """Keeps JAX from looking for GPUs; before anything else is asked of it."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's compiler otherwise says, often, that it found no GPU
    cli.stay_on_host()
    # Programs for a target cannot be read back from the cache, and JAX warns of each.
    jax.config.update("jax_enable_compilation_cache", False)
