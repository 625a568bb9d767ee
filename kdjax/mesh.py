"""The device mesh: every axis name, every sharding, and the shims over JAX's moving parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import BatchConfig, MeshConfig
from kdjax.types import UserError

AXES = ("pipe", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the global batch is split over these

VOCABULARY_AXES = ("tensor",)  # the head's rows are split over these

WHOLE = -1  # in place of the axis along which a parameter is split over "tensor": along none
REPLICATED = P()
ROWS = P(BATCH_AXES)  # arrays whose leading axis is the batch


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, `-1` filled in. Raises UserError when the sizes do not multiply to their count."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if -1 in sizes or int(np.prod(sizes)) != len(devices):
        asked = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        fitting = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise UserError(
            f"{asked} does not fit {len(devices)} devices; mesh.data=-1 uses them all, if the other sizes multiply to"
            f" one of {fitting}"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicas(mesh: Mesh) -> int:
    """How many ways the global batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def shards(mesh: Mesh) -> int:
    """How many devices each layer and the vocabulary are split over."""
    return mesh.shape["tensor"]


def check_split(mesh: Mesh, batch: BatchConfig) -> None:
    """Raises UserError unless the global batch splits evenly into microbatches on the mesh's replicas."""
    each = batch.microbatch_size * replicas(mesh)
    if batch.global_size % each:
        below, above = batch.global_size // each * each, -(-batch.global_size // each) * each
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch.global_size = {batch.global_size} is no multiple of microbatch_size {batch.microbatch_size} x "
            f"{replicas(mesh)} devices; {near} would be, or another batch.microbatch_size"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, REPLICATED)


def process_rows(mesh: Mesh, global_size: int) -> slice:
    """The contiguous rows of the global batch that this process feeds to its devices."""
    spans = NamedSharding(mesh, ROWS).addressable_devices_indices_map((global_size,)).values()
    bounds = {index[0].indices(global_size)[:2] for index in spans if index is not None}
    rows = slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))
    # A process's devices follow each other in jax.devices(), and the mesh keeps their order.
    assert sum(stop - start for start, stop in bounds) == rows.stop - rows.start, sorted(bounds)
    return rows


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays holding this process's rows, as global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def per_device(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` run once a device on its own shards, all axes manual.

    Without the varying-axes check: the losses' custom derivatives are written for local shards, and differentiating
    inside then leaves the one gradient sum over devices to the caller, after its loop.
    """
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over_batch_axes(tree: Any) -> Any:
    """All-reduce over the axes that split the batch; only inside `per_device`."""
    return jax.lax.psum(tree, BATCH_AXES)


def param_specs(mesh: Mesh, shapes: Any, tensor_axes: Any) -> Any:
    """How each parameter is split, and with it what the optimiser keeps of it.

    Over "tensor" along the axis that `tensor_axes` has for it, if it has one; over "fsdp" along the longest other axis
    that divides. What has none lies whole on every device.
    """

    def spec(leaf: jax.ShapeDtypeStruct, tensor_axis: int) -> P:
        axes: list[str | None] = [None] * len(leaf.shape)
        if mesh.shape["tensor"] > 1 and tensor_axis != WHOLE:
            axes[tensor_axis] = "tensor"
        divide = [i for i, size in enumerate(leaf.shape) if axes[i] is None and size % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] > 1 and divide:
            axes[max(divide, key=lambda i: leaf.shape[i])] = "fsdp"
        return P(*axes)

    return jax.tree.map(spec, shapes, tensor_axes)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The specs on this mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def gather_params(params: Any, specs: Any) -> Any:
    """Whole parameters from each device's shards: one all-gather a leaf; only inside `per_device`."""

    def gather(spec: P, shard: jax.Array) -> jax.Array:
        axis = _split_axis(spec)
        return shard if axis is None else jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)

    return jax.tree.map(gather, specs, params, is_leaf=_is_spec)


def sum_to_shards(grads: Any, specs: Any) -> Any:
    """Gradients summed over the axes that split the batch, each device keeping its shards; only inside `per_device`."""

    def reduce(spec: P, grad: jax.Array) -> jax.Array:
        axis = _split_axis(spec)
        if axis is None:
            return sum_over_batch_axes(grad)
        shard = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(shard, "data")

    return jax.tree.map(reduce, specs, grads, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _split_axis(spec: P) -> int | None:
    return next((axis for axis, name in enumerate(spec) if name == "fsdp"), None)


@jax.custom_vjp
def to_shards(x: jax.Array) -> jax.Array:
    """What every shard of a layer reads: its cotangent is the sum over "tensor" of theirs; only inside `per_device`."""
    return x


to_shards.defvjp(lambda x: (x, None), lambda _, ct: (jax.lax.psum(ct, "tensor"),))


@jax.custom_vjp
def sum_of_shards(x: jax.Array) -> jax.Array:
    """The sum over "tensor" of what the shards of a layer made of their parts; only inside `per_device`."""
    return jax.lax.psum(x, "tensor")


sum_of_shards.defvjp(lambda x: (sum_of_shards(x), None), lambda _, ct: (ct,))


def shard_index() -> jax.Array:
    """Which shard of a layer this device holds; only inside `per_device`."""
    return jax.lax.axis_index("tensor")
