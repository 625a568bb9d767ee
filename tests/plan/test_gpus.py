"""The GPUs that programs can be compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from kdjax.plan.gpus import TARGETS, topology
from kdjax.types import UserError


def gram(x: jax.Array) -> jax.Array:
    return x @ x.T


def unavailable(*_: object, **__: object) -> None:
    raise NotImplementedError("topology not implemented for cuda")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", TARGETS)
def test_hosts_of_eight(name: str) -> None:
    devices = topology(name, 16).devices
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert {device.platform for device in devices} == {"gpu"}
    assert {device.device_kind for device in devices} == {TARGETS[name].description}
    assert {device.compute_capability for device in devices} == {f"{TARGETS[name].compute_capability}.0"}
    assert len(topology(name, 3).devices) == 3


@pytest.mark.usefixtures("compiler", "uncached")
@pytest.mark.parametrize("name", TARGETS)
def test_compiles_for_each(name: str) -> None:
    mesh = jax.sharding.Mesh(np.array(topology(name, 2).devices), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)
    compiled = jax.jit(gram).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 32 * 128 * 4, "a device's half"


def test_an_unknown_gpu() -> None:
    with pytest.raises(UserError, match="'v100' is not a GPU that kdjax knows; choose one of 'a100', 'h100'"):
        topology("v100", 8)


@pytest.mark.parametrize(("devices", "nearest"), [(0, 8), (-1, 8), (12, 16), (9, 8)])
def test_devices_that_fill_no_hosts(devices: int, nearest: int) -> None:
    with pytest.raises(UserError, match=rf"{devices} devices .* give 1 to 8, or {nearest}$"):
        topology("h100", devices)


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies, "get_topology_desc", unavailable)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[aot\]'.*JAX_PLATFORMS=cpu"):
        topology("h100", 8)
