"""The device mesh: building it, and placing batches on it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.parallel.axes import AXES, BATCH_AXES, TENSOR, VOCABULARY_AXES
from kdjax.types import UserError

REPLICATED = P()
ROWS = P(BATCH_AXES)  # arrays whose leading axis is the batch


class Shards(NamedTuple):
    """How many devices share a microbatch's work."""

    width: int = 1  # devices that split each layer: its heads and its MLP
    vocabulary: int = 1  # devices that split embedding, head and loss


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with these axis sizes over all devices; one size may be -1, for all devices that are left.

    Devices keep JAX's order, host by host. "tensor" is the innermost axis, then "fsdp", so that the collectives of
    every layer stay within a host where their sizes allow it, and "data" and "pipe" cross hosts.

    Raises UserError when the sizes do not multiply to the number of devices, with the nearest sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    asked = [sizes[axis] for axis in AXES]
    given = math.prod(size for size in asked if size != -1)
    filled = [len(devices) // given if size == -1 else size for size in asked]
    if math.prod(filled) != len(devices):
        listed = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, asked, strict=True))
        raise UserError(f"{listed} does not fit {len(devices)} devices; these do: {_nearest(asked, len(devices))}")
    return Mesh(np.asarray(devices).reshape(filled), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _nearest(asked: Sequence[int], count: int) -> str:
    """Returns the three meshes of `count` devices that differ least from what was asked for, in factors."""

    def factorings(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for size in (n for n in range(1, count + 1) if count % n == 0):
            yield from ((size, *rest) for rest in factorings(count // size, axes - 1))

    def distance(sizes: Sequence[int]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(sizes, asked, strict=True) if b > 0)

    best = sorted(factorings(count, len(AXES)), key=distance)[:3]
    return "; ".join(" ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True) if n > 1) for sizes in best)


def replicas(mesh: Mesh) -> int:
    """Returns the number of parts that the global batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shards(mesh: Mesh) -> Shards:
    """Returns how many devices split each layer and the vocabulary."""
    return Shards(mesh.shape[TENSOR], math.prod(mesh.shape[axis] for axis in VOCABULARY_AXES))


def spans_hosts(mesh: Mesh, axis: str) -> bool:
    """Returns whether communication along the axis leaves a host: JAX's "slice" where it knows one, else a process."""
    lines = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return any(len({getattr(d, "slice_index", d.process_index) for d in line}) > 1 for line in lines)


def check_batch(mesh: Mesh, global_size: int, microbatch_size: int) -> None:
    """Raises UserError unless the global batch splits evenly into microbatches on the mesh's replicas."""
    each = microbatch_size * replicas(mesh)
    if global_size % each:
        below, above = global_size // each * each, -(-global_size // each) * each
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch.global_size = {global_size} is not a multiple of microbatch_size {microbatch_size} x "
            f"{replicas(mesh)} replicas; set it to {near}, or change batch.microbatch_size"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds in full."""
    return NamedSharding(mesh, REPLICATED)


def process_rows(mesh: Mesh, global_size: int) -> slice:
    """Returns the contiguous rows of the global batch that this process feeds to its devices."""
    spans = NamedSharding(mesh, ROWS).addressable_devices_indices_map((global_size,)).values()
    bounds = {index[0].indices(global_size)[:2] for index in spans if index is not None}
    rows = slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))
    # A process's devices follow each other in jax.devices(), and the mesh keeps their order.
    assert sum(stop - start for start, stop in bounds) == rows.stop - rows.start, sorted(bounds)
    return rows


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Turns host arrays that hold this process's rows into global arrays, split over the batch axes."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
