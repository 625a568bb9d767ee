"""The path through K rows of the unembedding: its results, memory and operations."""

import functools
import itertools
import re
from typing import Any

import jax
import numpy as np
import pytest
from loss_oracle import arguments_of, jit, make_inputs

from kdjax.losses import LossSums, linear_topk_kd_loss
from kdjax.losses.fused import gathered
from kdjax.plan.flops import matmul_flops

SHAPE = B, T, V, K = (2, 7, 61, 5)
D = 3
N_LARGE, V_LARGE, D_LARGE, K_LARGE = 1024, 32768, 512, 64


def problem() -> tuple[Any, ...]:
    """Returns hidden, unembed, the teacher's arrays with absent and duplicate entries, unread labels, and the mask."""
    rng = np.random.default_rng(5)
    inputs = make_inputs(6, SHAPE, duplicates=True, absent=True)
    hidden, unembed = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    return (
        hidden.astype(np.float32),
        unembed.astype(np.float32),
        inputs.topk_logits,
        inputs.topk_token_ids,
        np.full((B, T), -100, np.int32),
        inputs.weight,
    )


def run(arguments: tuple[Any, ...], **choice: Any) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    def total(hidden: jax.Array, unembed: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = linear_topk_kd_loss(hidden, unembed, *arguments[2:], **choice)
        return sums.loss, sums

    (_, sums), gradients = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*arguments[:2])
    return sums, gradients


@pytest.mark.parametrize(("kd_loss", "chunks"), [("fwd_kl", (1, 3, 100)), ("bwd_kl", (3,)), ("jsd", (3,))])
def test_equals_the_dense_path(monkeypatch: pytest.MonkeyPatch, kd_loss: str, chunks: tuple[int, ...]) -> None:
    """With the gradients of the rows added in place, as on a CPU, and sorted first, as elsewhere."""
    settings = {"kd_loss": kd_loss, "logits_scale": 0.7, "kd_loss_weight": 0.5}
    expected, slopes = run(problem(), implementation="reference", **settings)
    for platform, chunk_tokens in itertools.product(("cpu", "cuda"), chunks):
        monkeypatch.setattr(gathered, "platform", lambda platform=platform: platform)
        sums, gradients = run(problem(), implementation="gathered", chunk_tokens=chunk_tokens, **settings)
        np.testing.assert_allclose(sums[:4], expected[:4], rtol=1e-5, atol=1e-6)
        assert sums.top1_agreement is None
        assert sums.student_topk_mass is None
        for ours, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=1e-5)


def test_masked_positions_may_hold_anything() -> None:
    hidden, unembed, topk_logits, ids, labels, weight = problem()
    expected = run((hidden, unembed, topk_logits, ids, labels, weight), implementation="gathered")
    masked = weight == 0
    hidden[masked], topk_logits[masked], ids[masked] = np.nan, np.nan, -3
    ours = run((hidden, unembed, topk_logits, ids, labels, weight), implementation="gathered")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_id_out_of_range_is_loud() -> None:
    arguments = problem()
    arguments[2][1, 3], arguments[3][1, 3, 0], arguments[5][1, 3] = 0, V, 1
    sums, _ = run(arguments, implementation="gathered")
    np.testing.assert_array_equal(np.isnan(sums[:4]), [True, True, False, False])


def test_sorted_sums_of_many_equal_rows() -> None:
    """4096 entries share three rows, so that each row is a long sum; entries of column 3, not a row, are dropped."""
    rng = np.random.default_rng(8)
    columns = rng.integers(0, 4, (256, 16)).astype(np.int32)
    topk_ct, hidden = rng.normal(size=(256, 16)).astype(np.float32), rng.normal(size=(256, 5)).astype(np.float32)
    start = rng.normal(size=(3, 5)).astype(np.float32)
    expected = start.astype(np.float64)
    for row in range(3):
        weights = np.where(columns == row, topk_ct, 0).astype(np.float64).sum(axis=1)
        expected[row] += weights @ hidden.astype(np.float64)
    for add in (gathered.add_in_place, gathered.add_sorted):
        ours = jax.jit(add)(start, columns, topk_ct, hidden)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-3)  # 1300 terms of size 1 in float32
        np.testing.assert_array_equal(jax.jit(add)(start, columns, topk_ct, hidden), ours)


def compiled(**choice: Any) -> Any:
    def loss(*arguments: Any) -> jax.Array:
        return linear_topk_kd_loss(*arguments, **choice).loss

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradient).lower(*arguments_of(N_LARGE, V_LARGE, D_LARGE, K_LARGE)).compile()


def test_nothing_has_a_token_and_a_vocabulary_axis() -> None:
    """In the optimised program only the unembedding and its gradient, [V, D], have an axis V: no [tokens, V] exists."""

    def with_vocabulary(program: str) -> set[str]:
        shapes = set(re.findall(r"\w+\[[\d,]+\]", program))
        return {s for s in shapes if str(V_LARGE) in re.findall(r"\d+", s.partition("[")[2])}

    allowed = {f"f32[{V_LARGE},{D_LARGE}]"}
    assert with_vocabulary(compiled(implementation="gathered").as_text()) == allowed
    assert with_vocabulary(compiled(implementation="xla").as_text()) > allowed


def test_memory() -> None:
    """At most 0.15 of the temporaries of the chunked dense path, and a twentieth of those for holding all logits."""
    ours, dense, whole = (
        compiled(implementation=name).memory_analysis().temp_size_in_bytes for name in ("gathered", "xla", "reference")
    )
    np.testing.assert_array_less([ours / dense, ours / whole], [0.15, 0.05])


def test_operations() -> None:
    """6 K D operations per token instead of the dense path's 6 V D."""
    shapes = arguments_of(N_LARGE, V_LARGE, D_LARGE, K_LARGE)

    def flops(implementation: str) -> int:
        loss = functools.partial(linear_topk_kd_loss, implementation=implementation)
        gradient = jax.grad(lambda *a: loss(*a).loss, argnums=(0, 1))
        return matmul_flops(gradient, *shapes)

    # Two matmuls by the K rows; the gradient of the rows is K D multiplications and additions without a matmul.
    np.testing.assert_allclose(flops("gathered"), 4 * N_LARGE * K_LARGE * D_LARGE, rtol=0.02)
    np.testing.assert_array_less(1.5 * flops("gathered") / flops("xla"), 0.01)
