"""One device's program, and what it exchanges with the other devices. All but `per_device` work only inside of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax.parallel.axes import BATCH_AXES, PIPE, TENSOR, VOCABULARY_AXES


def per_device(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `f` as a function that runs once on each device, on that device's shards, with all axes manual.

    JAX's check of varying axes is off: the losses' custom derivatives are written for local shards, and with it off the
    caller can sum gradients over devices once, after its loop.
    """
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def after(earlier: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the ids, which the device has only when it has the floats `earlier`.

    Two parts of a program that communicate and do not depend on each other may run in either order. XLA's CPU runtime
    then has devices wait for each other in different parts, for ever, and drops optimisation barriers beforehand.
    """
    return ids + (earlier.reshape(-1)[0] > jnp.inf).astype(ids.dtype)  # + 0, which XLA cannot know


def sum_over_batch_axes(tree: Any) -> Any:
    """Sums over the axes that split the batch (an all-reduce)."""
    return jax.lax.psum(tree, BATCH_AXES)


# With the check off, JAX transposes `jax.lax.psum` to itself, which is wrong for both of the next two functions.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copy(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Returns x, which all devices along the axes read; backward, sums their cotangents."""
    return x


_copy.defvjp(lambda x, axes: (x, None), lambda axes, _, ct: (jax.lax.psum(ct, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Returns the sum along the axes, the same on all devices; backward, hands the cotangent to each summand."""
    return jax.lax.psum(x, axes)


_sum.defvjp(lambda x, axes: (_sum(x, axes), None), lambda axes, _, ct: (ct,))


def copy_to_tensor(x: jax.Array) -> jax.Array:
    """Hands x to every tensor shard of a layer (Megatron's f): the identity forward, a sum backward."""
    return _copy(x, TENSOR)


def sum_over_tensor(x: jax.Array) -> jax.Array:
    """Sums what the tensor shards of a layer computed (Megatron's g): a sum forward, the identity backward."""
    return _sum(x, TENSOR)


def sum_over_vocabulary(x: jax.Array) -> jax.Array:
    """Sums what the vocabulary's shards computed: a sum forward, the identity backward."""
    return _sum(x, VOCABULARY_AXES)


def vocabulary_index() -> jax.Array:
    """Returns which shard of the vocabulary this device holds."""
    return jax.lax.axis_index(VOCABULARY_AXES)


def stage_index() -> jax.Array:
    """Returns which stage of the pipeline this device belongs to."""
    return jax.lax.axis_index(PIPE)


def copy_to_stages(x: jax.Array) -> jax.Array:
    """Hands x to every stage; backward, sums the cotangents, of which all but one are zero."""
    return _copy(x, PIPE)


def from_last_stage(y: jax.Array) -> jax.Array:
    """Returns the last stage's y on all stages."""
    return _sum(jnp.where(stage_index() == jax.lax.axis_size(PIPE) - 1, y, 0), PIPE)


def send_forward(y: jax.Array, ring: bool) -> jax.Array:
    """Sends y to the next stage and returns the previous stage's; the first stage gets the last one's, or zeros.

    Without `ring` the last stage sends nothing: XLA hides the sends of an open chain behind compute, but not a ring's.
    """
    return jax.lax.ppermute(y, PIPE, _links(ring))


def send_backward(ct: jax.Array, ring: bool) -> jax.Array:
    """Sends ct to the previous stage and returns the next stage's; the last stage gets the first one's, or zeros."""
    return jax.lax.ppermute(ct, PIPE, [(target, source) for source, target in _links(ring)])


def _links(ring: bool) -> list[tuple[int, int]]:
    stages = jax.lax.axis_size(PIPE)
    return [(s, (s + 1) % stages) for s in range(stages if ring else stages - 1)]
