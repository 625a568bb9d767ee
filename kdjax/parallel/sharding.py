"""Where each parameter is split, and the collectives that gather parameters and scatter gradients."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.parallel.axes import FSDP, PIPE, SPLITS, STATE_AXES


def param_specs(mesh: Mesh, shapes: Any, counts: Any, over: Sequence[str] = (FSDP,)) -> Any:
    """Returns how each parameter is split: by what its axes count (`SPLITS`), and over `over` to save memory.

    `counts` has a tuple for each parameter, which names what each array axis counts, or None. Each mesh axis in `over`
    splits one more array axis: of those that count nothing and divide evenly, the one that is longest on a device. A
    parameter without such an array axis is not split over it. The optimiser's state is split over `STATE_AXES` (ZeRO-1,
    arXiv:1910.02054).
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
    """Returns the specs of parameters whose "layers" [L, ...] are reshaped by stage to [v, P, L/(vP), ...]."""

    def reshaped(spec: P) -> P:
        return P(None, PIPE, None if spec[0] == PIPE else spec[0], *spec[1:])

    return specs | {"layers": jax.tree.map(reshaped, specs["layers"], is_leaf=_is_spec)}


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns the shardings that the specs describe on this mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def gather_params(params: Any, specs: Any) -> Any:
    """Gathers parameters from their FSDP shards, one all-gather a parameter. Only inside `per_device`."""

    def gather(spec: P, shard: jax.Array) -> jax.Array:
        place = _array_axis(spec, FSDP)
        return shard if place is None else jax.lax.all_gather(shard, FSDP, axis=place, tiled=True)

    return jax.tree.map(gather, specs, params, is_leaf=_is_spec)


def sum_to_shards(grads: Any, specs: Any) -> Any:
    """Sums gradients over the batch axes and leaves each device with its shards. Only inside `per_device`."""

    def reduce(spec: P, grad: jax.Array) -> jax.Array:
        unsplit = []
        for axis in STATE_AXES:
            place = _array_axis(spec, axis)
            if place is None:
                unsplit.append(axis)
            else:
                grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=place, tiled=True)
        return jax.lax.psum(grad, tuple(unsplit)) if unsplit else grad

    return jax.tree.map(reduce, specs, grads, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _array_axis(spec: P, axis: str) -> int | None:
    """Returns the array axis that is split over this mesh axis, or None."""
    return next((i for i, names in enumerate(spec) if names == axis or axis in (names or ())), None)
