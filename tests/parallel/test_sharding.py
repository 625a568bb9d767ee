"""Where parameters are split, on meshes of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import MeshConfig
from kdjax.parallel import mesh as meshes
from kdjax.parallel import sharding
from kdjax.parallel.axes import LAYERS, STATE_AXES, VOCABULARY, WIDTH
from kdjax.parallel.collectives import per_device


def spec(shape: tuple[int, ...], counts: tuple[str | None, ...], over: tuple[str, ...] = ("fsdp",), **sizes: int) -> P:
    mesh = meshes.make_mesh(MeshConfig(**({"data": 1} | sizes)).sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
    return sharding.param_specs(mesh, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"w": counts}, over)["w"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 8), P(None, "fsdp")),
        ((8, 4), P("fsdp", None)),
        ((4, 6, 8), P(None, None, "fsdp")),
        ((10, 6, 4), P(None, None, "fsdp")),  # 10 is longer, but 4 does not divide it
        ((3, 5), P(None, None)),
    ],
)
def test_fsdp_splits_the_longest_axis_that_divides(shape: tuple[int, ...], expected: P) -> None:
    assert spec(shape, (None,) * len(shape), fsdp=4) == expected


def test_axes_that_count_something_are_split_for_that() -> None:
    assert spec((8, 16, 4), (LAYERS, None, WIDTH), pipe=2, tensor=2, fsdp=2) == P("pipe", "fsdp", "tensor")
    assert spec((16, 4), (VOCABULARY, None), pipe=2, tensor=2, fsdp=2) == P(("tensor", "pipe"), "fsdp")
    assert spec((16, 4), (VOCABULARY, None), tensor=2, fsdp=2) == P("tensor", "fsdp")


def test_state_is_split_over_fsdp_then_data() -> None:
    assert spec((16, 4), (None, None), STATE_AXES, fsdp=2, data=4) == P(("fsdp", "data"), None)
    assert spec((6, 4), (None, None), STATE_AXES, fsdp=2, data=4) == P("fsdp", "data")
    assert spec((4, 2), (None, None), STATE_AXES, fsdp=4, data=2) == P("fsdp", "data"), "1 is left of the 4"


def test_gathering_undoes_the_split_and_summing_keeps_each_devices_part() -> None:
    mesh = meshes.make_mesh(MeshConfig(fsdp=2, data=4).sizes)
    w = jnp.arange(48.0).reshape(8, 6)
    specs = {"w": P("fsdp", None)}
    whole = per_device(lambda params: sharding.gather_params(params, specs), mesh, (specs,), {"w": P()})({"w": w})["w"]
    np.testing.assert_array_equal(whole, w)
    state_specs = {"w": P(("fsdp", "data"), None), "b": P(None)}
    grads = {"w": w, "b": jnp.ones(3)}
    summed = per_device(
        lambda grads: sharding.sum_to_shards(grads, state_specs), mesh, ({"w": P(), "b": P()},), state_specs
    )(grads)
    np.testing.assert_array_equal(summed["w"], 8 * w)  # every one of the eight devices held the whole
    np.testing.assert_array_equal(summed["b"], jnp.full(3, 8.0))
