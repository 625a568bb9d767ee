"""The memory that whole loss programs allocate on an H100, compiled for it on a machine without one."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss
from kdjax.losses.fused.linear import DENSE_CHUNK_TOKENS_ELSEWHERE
from kdjax.plan.gpus import topology

N, V, D, K = 8192, 128256, 4096, 64  # Llama 3's head, bfloat16
SFT: dict[str, Any] = {"sft_loss_weight": 0.4}

pytestmark = pytest.mark.usefixtures("compiler", "uncached")


def lowered(f: Any, *shapes: tuple[tuple[int, ...], Any]) -> Any:
    """Returns f lowered for one H100, inside shard_map, as training runs it."""
    mesh = Mesh(np.array(topology("h100", 1).devices), ("data",), axis_types=(AxisType.Auto,))
    on_device = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
    return on_device.lower(*arguments)


TEACHING = [((1, N, K), jnp.float32), ((1, N, K), jnp.int32), ((1, N), jnp.int32)]


def linear(implementation: str | None, settings: dict[str, Any]) -> Any:
    """Returns the lowered value and gradients of the loss from hidden states."""

    def gradient(hidden: jax.Array, unembed: jax.Array, *rest: jax.Array) -> Any:
        def loss(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
            return linear_topk_kd_loss(hidden, unembed, *rest, implementation=implementation, **settings).loss

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembed)

    hidden, unembed, mask = ((1, N, D), jnp.bfloat16), ((V, D), jnp.bfloat16), ((1, N), jnp.float32)
    return lowered(gradient, hidden, unembed, *TEACHING, mask)


@pytest.mark.parametrize(
    ("implementation", "settings", "kernels"), [("xla", SFT, False), ("pallas", SFT, True), ("gathered", {}, False)]
)
def test_linear(implementation: str, settings: dict[str, Any], kernels: bool) -> None:
    """At most the unembedding's gradient in float32 and a chunk's logits twice in bfloat16; a kernel where expected."""
    program = linear(implementation, settings).compile()
    allowed = 4 * V * D + 2.2 * DENSE_CHUNK_TOKENS_ELSEWHERE * V * 2
    assert program.memory_analysis().temp_size_in_bytes <= allowed
    assert ("kdjax_spread" in program.as_text()) is kernels


@pytest.mark.parametrize(("settings", "chosen", "other"), [(SFT, "pallas", "xla"), ({}, "gathered", "xla")])
def test_none_chooses_the_fastest(settings: dict[str, Any], chosen: str, other: str) -> None:
    def program(implementation: str | None) -> str:
        # checkify numbers its checks anew in each trace, in constants that nothing reads.
        return re.sub(r"dense<\d+> : tensor<i32>", "", linear(implementation, settings).as_text())

    assert program(None) == program(chosen)
    assert program(None) != program(other)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_logits(implementation: str) -> None:
    """Almost nothing beside the bfloat16 logits and their gradient."""

    def gradient(logits: jax.Array, *teaching: jax.Array) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            return topk_kd_loss(logits, *teaching, implementation=implementation, **SFT)[0].sum()

        return jax.grad(loss)(logits)

    program = lowered(gradient, ((1, N, V), jnp.bfloat16), *TEACHING).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 0.02 * 2 * N * V
