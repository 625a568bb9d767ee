"""What is known of a program while it is traced: its platform, and the mesh axes along which a value varies."""

from typing import Any

import jax
import jax.numpy as jnp


def platform() -> str:
    """One of "cpu", "cuda", "rocm", "tpu": that of the mesh in context, perhaps of another machine, else JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = getattr(device, "platform", None) or jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def on_one_device() -> bool:
    """Whether every array being traced lies on one device: inside `shard_map` over all axes, or where there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.are_all_axes_manual or mesh.size == 1


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes along which an array or shape varies, as far as `shard_map` checks it; else none."""
    kind = getattr(x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, *like: Any) -> jax.Array:
    """Zeros that vary over the mesh axes over which anything in `like` varies, as a loop's carry has to."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(like)))
    return jax.lax.pcast(jnp.zeros(shape, dtype), tuple(sorted(axes)), to="varying")
