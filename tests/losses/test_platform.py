"""The platform a program is traced for, and whether its arrays lie on one device."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from kdjax.losses.platform import on_one_device, platform, varying, zeros


@pytest.mark.parametrize(("of_mesh", "expected"), [("cpu", "cpu"), ("tpu", "tpu"), ("gpu", "cuda")])
def test_the_platform_of_the_mesh(of_mesh: str, expected: str) -> None:
    """It need not be this machine's."""
    assert platform() == "cpu"
    device = AbstractDevice(device_kind="some", num_cores=1, platform=of_mesh)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == expected


@pytest.mark.parametrize(("version", "expected"), [("rocm 60000", "rocm"), ("cuda 12090", "cuda")])
def test_kinds_of_gpus(monkeypatch: pytest.MonkeyPatch, version: str, expected: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    client = types.SimpleNamespace(platform_version=version)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(client=client)])
    assert platform() == expected


def make_mesh(*sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("a", "b")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def test_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def f(x: jax.Array) -> jax.Array:
        seen.append(on_one_device())
        return x

    def sharded(**choice: Any) -> None:
        jax.eval_shape(jax.shard_map(f, mesh=make_mesh(2, 2), in_specs=P("a"), out_specs=P("a"), **choice), jnp.ones(2))

    assert not on_one_device()  # there are eight
    with jax.set_mesh(make_mesh(1)):
        assert on_one_device()
    with jax.set_mesh(make_mesh(2)):
        assert not on_one_device()
    sharded()
    sharded(axis_names={"a"})  # the compiler splits over "b"
    assert seen == [True, False]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert on_one_device()


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_varies(check_vma: bool) -> None:
    found = []

    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        like = zeros((3,), jnp.dtype("int8"), {"x": x, "y": y})
        found.append([varying(x), varying(y), varying(like), varying(zeros((), jnp.dtype("int8"), y))])
        assert (like.shape, like.dtype) == ((3,), "int8")
        return x + y

    mesh = make_mesh(2, 2)
    f_sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=check_vma)
    jax.eval_shape(f_sharded, jnp.ones(2), jnp.ones(2))
    a = {"a"} if check_vma else set()
    assert found == [[a, set(), a, set()]]
    assert varying(jnp.ones(2)) == varying(jax.ShapeDtypeStruct((2,), jnp.float32)) == set()
