"""Bytes that a device holds throughout training, known without compiling."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kdjax.model import in_compute_dtype, param_shapes
from kdjax.parallel.axes import FSDP
from kdjax.training.layout import Layout


def held_bytes(layout: Layout) -> dict[str, int]:
    """Returns the bytes that each device holds for the whole of a step, by what they are for."""
    model = layout.config.model
    state, shapes = layout.abstract_state(), param_shapes(model)
    rounded = jax.eval_shape(functools.partial(in_compute_dtype, model), shapes)
    gathers = layout.mesh.shape[FSDP] > 1

    def gradient_and_copy(shape: Any, copy: Any, spec: Any) -> tuple[int, int]:
        size = math.prod(NamedSharding(layout.mesh, spec).shard_shape(shape.shape))
        is_copied = gathers or copy.dtype != shape.dtype
        return size * jnp.dtype(jnp.float32).itemsize, size * copy.dtype.itemsize if is_copied else 0

    sizes = jax.tree.map(gradient_and_copy, shapes, rounded, layout.gathered_specs)
    pairs = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
    held = {
        "parameters": device_bytes(state.params),
        "optimiser": device_bytes(state.opt_state),
        "gradients": sum(gradient for gradient, _ in pairs),
        "parameters, gathered and rounded": sum(copy for _, copy in pairs),
    }
    return held if layout.teacher is None else held | {"teacher": device_bytes(layout.teacher.abstract_params())}


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
