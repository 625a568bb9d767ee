"""The loss on logits, block by block of rows as on a CPU."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracle import jit, make_inputs

from kdjax.losses import token_losses, topk_kd_loss

N, V = 14, 61
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "float32"),
    ({"kd_loss": "bwd_kl", "tail": "ghost", "sft_loss_weight": 0.4}, "bfloat16"),
    ({"kd_loss": "jsd", "cross_tokenizer": "rank_match", "sft_loss_weight": 0.4}, "float16"),
]


def run(settings: dict[str, Any], dtype: str, block_bytes: int) -> tuple[int, Any]:
    """Returns the number of loops in the program, and the three losses and the gradient of a mix of them."""
    inputs = make_inputs(4, (2, 7, V, 5), absent=True)
    weights = np.random.default_rng(5).normal(size=(3, 2, 7)).astype(np.float32)

    def total(logits: jax.Array) -> tuple[jax.Array, Any]:
        lse = inputs.log_sum_exp_logits
        losses = topk_kd_loss(logits, *inputs.teaching, log_sum_exp_logits=lse, implementation="xla", **settings)
        return sum((weight * x).sum() for weight, x in zip(weights, losses, strict=True)), losses

    with mock.patch.object(token_losses, "CPU_BLOCK_BYTES", block_bytes):
        traced = jit(jax.value_and_grad(total, has_aux=True)).trace(jnp.asarray(inputs.logits, dtype))
        return str(traced.jaxpr).count(" scan["), traced.lower().compile()(jnp.asarray(inputs.logits, dtype))


@pytest.mark.parametrize(("settings", "dtype"), SETTINGS, ids=[dtype for _, dtype in SETTINGS])
def test_blocks_give_the_same(settings: dict[str, Any], dtype: str) -> None:
    """Blocks of 1, 4 and 13 of the 14 rows, in a loop forward and one backward."""
    loops, expected = run(settings, dtype, 4 * V * N)
    assert loops == 0
    for rows in (1, 4, 13):
        loops, ours = run(settings, dtype, 4 * V * rows + 3)
        assert loops == 2
        assert ours[1].dtype == dtype
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-6, atol=1e-6)
