"""Bytes that a device holds throughout training, known without compiling."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kdjax.config import Config
from kdjax.model import in_compute_dtype, param_axes, param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.training.step import abstract_state


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held(config: Config, mesh: Mesh) -> dict[str, int]:
    """Bytes of a device throughout a step, whatever it computes: what is known without compiling."""
    state, shapes = abstract_state(config, mesh), param_shapes(config.model)
    rounded = jax.eval_shape(functools.partial(in_compute_dtype, config.model), shapes)
    specs = meshes.param_specs(mesh, shapes, param_axes(config.model), over=())
    gathered = mesh.shape["fsdp"] > 1

    def whole(shape: Any, copy: Any, spec: Any) -> tuple[int, int]:
        size = math.prod(NamedSharding(mesh, spec).shard_shape(shape.shape))
        copied = gathered or copy.dtype != shape.dtype
        return size * jnp.dtype(jnp.float32).itemsize, size * copy.dtype.itemsize if copied else 0

    sizes = jax.tree.leaves(jax.tree.map(whole, shapes, rounded, specs), is_leaf=lambda x: isinstance(x, tuple))
    return {
        "parameters": device_bytes(state.params),
        "optimiser": device_bytes(state.opt_state),
        "gradients": sum(gradient for gradient, _ in sizes),
        "parameters, gathered and rounded": sum(copy for _, copy in sizes),
    }
