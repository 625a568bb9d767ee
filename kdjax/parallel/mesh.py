"""The device mesh: every axis name, every sharding, and the shims over JAX's moving parts."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import BatchConfig, MeshConfig
from kdjax.types import UserError

AXES = ("pipe", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the global batch is split over these
STATE_AXES = ("fsdp", "data")  # gradients and optimiser state, major to minor; parameters over the first only
VOCABULARY_AXES = ("tensor", "pipe")  # the rows of embedding and head: every device that shares a microbatch

# What an axis of a parameter counts, and the mesh axes over which it is split for that.
LAYERS, WIDTH, VOCABULARY = "layers", "width", "vocabulary"
SPLITS = {LAYERS: ("pipe",), WIDTH: ("tensor",), VOCABULARY: VOCABULARY_AXES}

REPLICATED = P()
ROWS = P(BATCH_AXES)  # arrays whose leading axis is the batch


class Shards(NamedTuple):
    """Over how many devices a microbatch's work is split."""

    width: int = 1  # each layer: heads and the MLP's width
    vocabulary: int = 1  # embedding, head and loss


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, one `-1` filled in. Raises UserError when the sizes do not multiply to their count.

    Devices stay in JAX's order, host by host, and "tensor" is the innermost axis, then "fsdp": so the collectives of
    every layer stay within a host where their sizes allow it, and "data" and "pipe" cross hosts.
    """
    devices = jax.devices() if devices is None else devices
    asked = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in asked if size != -1)
    sizes = [len(devices) // given if size == -1 else size for size in asked]
    if math.prod(sizes) != len(devices):
        told = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, asked, strict=True))
        raise UserError(f"{told} does not fit {len(devices)} devices; these do: {_near(asked, len(devices))}")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _near(asked: Sequence[int], count: int) -> str:
    """The three meshes of so many devices that are closest to what was asked for, in factors."""

    def splits(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for size in (n for n in range(1, count + 1) if count % n == 0):
            yield from ((size, *rest) for rest in splits(count // size, axes - 1))

    def distance(sizes: Sequence[int]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(sizes, asked, strict=True) if b > 0)

    best = sorted(splits(count, len(AXES)), key=distance)[:3]
    return "; ".join(" ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True) if n > 1) for sizes in best)


def replicas(mesh: Mesh) -> int:
    """How many ways the global batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shards(mesh: Mesh) -> Shards:
    """Over how many devices each layer and the vocabulary are split."""
    return Shards(mesh.shape["tensor"], math.prod(mesh.shape[axis] for axis in VOCABULARY_AXES))


def spans_hosts(mesh: Mesh, axis: str) -> bool:
    """Whether communication along the axis leaves a host: what JAX calls a slice, where it tells one from a process."""
    lines = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return any(len({getattr(d, "slice_index", d.process_index) for d in line}) > 1 for line in lines)


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


def param_specs(mesh: Mesh, shapes: Any, counts: Any, over: Sequence[str] = ("fsdp",)) -> Any:
    """How each parameter is split: by what its axes count (`SPLITS`), and over `over` to save memory.

    `counts` has a tuple for each parameter: what each axis counts, or None. Each of `over` splits the axis that is
    longest on a device and divides, of those that count nothing; a parameter without one lies whole along it. The
    optimiser's state is split over `STATE_AXES` (ZeRO-1, arXiv:1910.02054).
    """

    def spec(leaf: jax.ShapeDtypeStruct, counted: tuple[str | None, ...]) -> P:
        axes = [[axis for axis in SPLITS.get(name or "", ()) if mesh.shape[axis] > 1] for name in counted]
        free = [i for i, names in enumerate(axes) if not names]
        for axis in over:
            size = {i: leaf.shape[i] // math.prod(mesh.shape[name] for name in axes[i]) for i in free}
            divide = [i for i in free if size[i] % mesh.shape[axis] == 0]
            if mesh.shape[axis] > 1 and divide:
                axes[max(divide, key=lambda i: size[i])].append(axis)
        return P(*(tuple(names) if len(names) > 1 else names[0] if names else None for names in axes))

    return jax.tree.map(spec, shapes, counts)


def stage_specs(specs: dict[str, Any]) -> dict[str, Any]:
    """The specs of parameters whose "layers" [L, ...] are viewed by stages: [v, P, L/(vP), ...]."""

    def view(spec: P) -> P:
        return P(None, "pipe", None if spec[0] == "pipe" else spec[0], *spec[1:])

    return specs | {"layers": jax.tree.map(view, specs["layers"], is_leaf=_is_spec)}


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The specs on this mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def gather_params(params: Any, specs: Any) -> Any:
    """Whole parameters from each device's shards: one all-gather a leaf; only inside `per_device`."""

    def gather(spec: P, shard: jax.Array) -> jax.Array:
        place = _place(spec, "fsdp")
        return shard if place is None else jax.lax.all_gather(shard, "fsdp", axis=place, tiled=True)

    return jax.tree.map(gather, specs, params, is_leaf=_is_spec)


def sum_to_shards(grads: Any, specs: Any) -> Any:
    """Gradients summed over the axes that split the batch, each device keeping its shards; only inside `per_device`."""

    def reduce(spec: P, grad: jax.Array) -> jax.Array:
        whole = []
        for axis in STATE_AXES:
            place = _place(spec, axis)
            if place is None:
                whole.append(axis)
            else:
                grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=place, tiled=True)
        return jax.lax.psum(grad, tuple(whole)) if whole else grad

    return jax.tree.map(reduce, specs, grads, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _place(spec: P, axis: str) -> int | None:
    """Which array axis is split over this mesh axis."""
    return next((i for i, names in enumerate(spec) if names == axis or axis in (names or ())), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copied(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """One value, read by all devices along the axes: its cotangent is the sum of theirs."""
    return x


_copied.defvjp(lambda x, axes: (x, None), lambda axes, _, ct: (jax.lax.psum(ct, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """The sum along the axes, one value for all: its cotangent is each summand's."""
    return jax.lax.psum(x, axes)


_summed.defvjp(lambda x, axes: (_summed(x, axes), None), lambda axes, _, ct: (ct,))


# Without the varying-axes check `jax.lax.psum` is its own transpose, which is right for neither of these two. All
# below is for use inside `per_device` only.


def to_shards(x: jax.Array) -> jax.Array:
    """What every shard of a layer reads."""
    return _copied(x, "tensor")


def sum_of_shards(x: jax.Array) -> jax.Array:
    """The sum of what the shards of a layer made of their parts."""
    return _summed(x, "tensor")


def sum_of_vocabulary(x: jax.Array) -> jax.Array:
    """The sum of what the shards of the vocabulary made of their rows."""
    return _summed(x, VOCABULARY_AXES)


def vocabulary_index() -> jax.Array:
    """Which shard of the vocabulary this device holds."""
    return jax.lax.axis_index(VOCABULARY_AXES)


def stage_index() -> jax.Array:
    """Which stage of the pipeline this device belongs to."""
    return jax.lax.axis_index("pipe")


def to_stages(x: jax.Array) -> jax.Array:
    """What every stage may read, though one alone does."""
    return _copied(x, "pipe")


def of_last_stage(y: jax.Array) -> jax.Array:
    """The last stage's value, on all of them."""
    return _summed(jnp.where(stage_index() == jax.lax.axis_size("pipe") - 1, y, 0), "pipe")


def to_next_stage(y: jax.Array, wraps: bool) -> jax.Array:
    """The previous stage's value; the first stage gets the last one's, or zeros.

    Sent along an open chain where that will do: XLA hides those sends behind compute, and not a ring's.
    """
    return jax.lax.ppermute(y, "pipe", _links(wraps))


def to_previous_stage(ct: jax.Array, wraps: bool) -> jax.Array:
    """The next stage's value; the last stage gets the first one's, or zeros."""
    return jax.lax.ppermute(ct, "pipe", [(to, of) for of, to in _links(wraps)])


def _links(wraps: bool) -> list[tuple[int, int]]:
    stages = jax.lax.axis_size("pipe")
    return [(s, (s + 1) % stages) for s in range(stages if wraps else stages - 1)]
