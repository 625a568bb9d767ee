"""The mesh: sizes filled in or refused, rows of the global batch to processes and devices."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from kdjax.config import MeshConfig
from kdjax.parallel import axes, collectives
from kdjax.parallel import mesh as meshes
from kdjax.types import UserError


def test_minus_one_takes_what_is_left() -> None:
    assert dict(meshes.make_mesh(MeshConfig().sizes).shape) == {"pipe": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert dict(meshes.make_mesh(MeshConfig(tensor=2).sizes).shape)["data"] == 4
    assert meshes.replicas(meshes.make_mesh(MeshConfig(fsdp=2).sizes)) == 8


@pytest.mark.parametrize(
    ("config", "near"),
    [
        (MeshConfig(data=3), "these do: data=4 tensor=2; data=4 fsdp=2; data=8"),
        (MeshConfig(tensor=3), "these do: .*tensor=4"),
        (MeshConfig(data=16), "these do: data=8"),
        (MeshConfig(pipe=3, data=2), "these do: pipe=4 data=2;"),
        (MeshConfig(pipe=2, data=2, fsdp=-1, tensor=3), "these do: .*pipe=2 data=2 .*tensor=2"),
    ],
)
def test_sizes_that_do_not_fit_are_told_those_that_do(config: MeshConfig, near: str) -> None:
    with pytest.raises(UserError, match=rf"mesh.data=.* does not fit 8 devices; {near}"):
        meshes.make_mesh(config.sizes)


def test_layers_stay_within_a_host() -> None:
    """Devices in their order, the tensor axis innermost, stages farthest apart."""
    mesh = meshes.make_mesh(MeshConfig(pipe=2, data=-1, tensor=2).sizes)
    assert mesh.device_ids[0, :, 0].tolist() == [[0, 1], [2, 3]]
    assert mesh.device_ids[:, 0, 0, 0].tolist() == [0, 4]
    hosts = np.vectorize(lambda number: SimpleNamespace(process_index=number // 4), otypes=[object])
    two_hosts: Any = SimpleNamespace(devices=hosts(mesh.device_ids), shape=mesh.shape)
    assert [axis for axis in axes.AXES if meshes.spans_hosts(two_hosts, axis)] == ["pipe"]


def test_rows_are_contiguous_a_device() -> None:
    mesh = meshes.make_mesh(MeshConfig().sizes)
    assert meshes.process_rows(mesh, 16) == slice(0, 16)
    rows = meshes.put_rows(mesh, {"x": np.arange(16)})["x"]
    for shard in rows.addressable_shards:
        first = 2 * list(mesh.devices.flat).index(shard.device)
        np.testing.assert_array_equal(shard.data, [first, first + 1])


def test_sums_run_over_all_rows() -> None:
    mesh = meshes.make_mesh(MeshConfig().sizes)
    total = collectives.per_device(
        lambda x: collectives.sum_over_batch_axes(x.sum()), mesh, meshes.ROWS, meshes.REPLICATED
    )
    assert jax.jit(total)(meshes.put_rows(mesh, np.arange(16))) == 120
