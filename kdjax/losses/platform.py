"""Facts about a program that are known while it is traced: its platform, and the mesh axes its values vary over."""

from typing import Any

import jax
import jax.numpy as jnp


def platform() -> str:
    """Returns "cpu", "cuda", "rocm" or "tpu": the platform of the mesh in context, else JAX's default.

    The mesh may be that of another machine, which the program is compiled for.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = getattr(device, "platform", None) or jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def on_one_device() -> bool:
    """Returns whether each traced array lies on one device: inside `shard_map` over all axes, or as the only device."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.are_all_axes_manual or mesh.size == 1


def varying(x: Any) -> frozenset[str]:
    """Returns the manual mesh axes over which an array or shape varies; none if `shard_map` does not check them."""
    kind = getattr(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: Any) -> jax.Array:
    """Returns zeros that vary over every mesh axis that anything in `like` varies over, as the carry of a loop must."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(like)))
    return jax.lax.pcast(jnp.zeros(shape, dtype), tuple(sorted(axes)), to="varying")
