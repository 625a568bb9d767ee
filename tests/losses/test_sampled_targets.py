"""Sampled targets estimate the forward KL over the whole vocabulary without bias, in value and gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from loss_oracle import jit

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss

V, T, SETS, N, TOP = 50, 3, 4000, 8, 4  # N draws in each of SETS sets, at T positions; TOP exact entries of a hybrid
SCALE = 0.8  # of the student's logits


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [T, V] of a student and of a teacher whose four likeliest ids hold less than half of its mass."""
    rng = np.random.default_rng(41)
    return rng.normal(size=(T, V)).astype(np.float32) * 2, rng.normal(size=(T, V))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def full_kl(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns KL(teacher | student) over V [T] and its derivative by the student's logits [T, V]."""
    z = SCALE * student.astype(np.float64)
    p, t = softmax(z), softmax(teacher)
    return (t * (np.log(t) - np.log(p))).sum(-1), SCALE * (p - t)


def drawn(teacher: np.ndarray, top: int, *, merged: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and weights [SETS, T, K] of `top` exact entries and of N draws from the rest of the softmax.

    Merged, a draw that repeats an earlier one is absent and its weight is added to that one's.
    """
    rng = np.random.default_rng(42)
    t = softmax(teacher)
    exact = np.argsort(-t, axis=-1)[:, :top]
    t_rest = t.copy()
    np.put_along_axis(t_rest, exact, 0, axis=-1)
    rest = t_rest.sum(-1)  # the mass that is left to the draws
    draws = np.stack([rng.choice(V, (SETS, N), p=t_rest[i] / rest[i]) for i in range(T)], axis=1)
    weights = np.broadcast_to(rest[:, None] / N, draws.shape).copy()
    if merged:
        same = draws[..., :, None] == draws[..., None, :]
        first = ~(same & np.tri(N, k=-1, dtype=bool)).any(-1)
        weights = np.where(first, (same * weights[..., None, :]).sum(-1), 0)
        draws = np.where(first, draws, -1)
    here = np.broadcast_to(np.take_along_axis(t, exact, -1), (SETS, T, top))
    ids = np.concatenate([np.broadcast_to(exact, (SETS, T, top)), draws], -1)
    return ids.astype(np.int32), np.concatenate([here, weights], -1).astype(np.float32)


def estimates(
    student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, weights: np.ndarray, shards: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kd [SETS, T] and its gradient [SETS, T, V] of each set of draws, on so many shards of the vocabulary."""
    shape = ids.shape[:2]
    values = np.take_along_axis(np.broadcast_to(teacher, (*shape, V)), np.maximum(ids, 0), -1)
    arguments: dict[str, Any] = {
        "topk_logits": np.where(ids < 0, -np.inf, values).astype(np.float32),
        "topk_token_ids": ids,
        "labels": np.zeros(shape, np.int32),
        "log_sum_exp_logits": np.broadcast_to(np.log(np.exp(teacher).sum(-1)), shape).astype(np.float32),
        "topk_weights": weights,
        "targets": "sampled",
        "logits_scale": SCALE,
        "implementation": "xla",
    }

    def total(logits: jax.Array, **choice: Any) -> tuple[jax.Array, jax.Array]:
        loss, kd, _ = topk_kd_loss(logits, **arguments, **choice)
        return loss.sum(), kd

    logits = np.broadcast_to(student, (*shape, V))
    if shards == 1:
        (_, kd), gradient = jit(jax.value_and_grad(total, has_aux=True))(logits)
        return np.asarray(kd), np.asarray(gradient)
    mesh = Mesh(np.array(jax.devices()[:shards]), ("tensor",), axis_types=(AxisType.Auto,))
    columns = P(None, None, "tensor")
    on_shards = functools.partial(total, axis_name="tensor", vocab_size=V)
    sharded = jax.shard_map(on_shards, mesh=mesh, in_specs=columns, out_specs=(P(), P()))
    padded = np.pad(logits, [(0, 0), (0, 0), (0, -V % shards)])
    (_, kd), gradient = jit(jax.value_and_grad(sharded, has_aux=True))(padded)
    return np.asarray(kd), np.asarray(gradient)[..., :V]


def deviation(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns how many of its standard errors the mean over the sets lies from the truth."""
    draws = draws.astype(np.float64)
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert error.max() < 0.05 * np.abs(truth).max()  # small enough to notice a bias
    return np.abs(draws.mean(axis=0) - truth) / (error + 1e-5)  # what is drawn exactly is rounded


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize(("top", "merged"), [(0, False), (0, True), (TOP, False), (TOP, True)])
def test_unbiased(top: int, merged: bool, shards: int) -> None:
    student, teacher = problem()
    kd, gradient = estimates(student, teacher, *drawn(teacher, top, merged=merged), shards)
    truths = full_kl(student, teacher)
    assert deviation(kd, truths[0]).max() < 5
    assert deviation(gradient, truths[1]).max() < 5


def test_without_the_draws_it_is_biased() -> None:
    """The test above would notice a tail that is left out, and draws that are weighted as if from the whole softmax."""
    student, teacher = problem()
    ids, weights = drawn(teacher, TOP)
    for wrong in (np.where(np.arange(TOP + N) < TOP, weights, 0), np.where(np.arange(TOP + N) < TOP, weights, 1 / N)):
        kd, gradient = estimates(student, teacher, ids, wrong.astype(np.float32), 1)
        truths = full_kl(student, teacher)
        assert deviation(kd, truths[0]).min() > 20
        assert deviation(gradient, truths[1]).max() > 20


def test_exact_heads_have_less_variance() -> None:
    """With as many draws, the more entries are exact, the less the gradient varies; with all of them it is exact."""
    student, teacher = problem()
    spreads = [estimates(student, teacher, *drawn(teacher, top), 1)[1].var(axis=0).sum() for top in (0, TOP, 4 * TOP)]
    assert spreads[0] > 2 * spreads[1] > 4 * spreads[2]
    t = softmax(teacher)
    ids = np.broadcast_to(np.arange(V, dtype=np.int32), (1, T, V))
    kd, gradient = estimates(student, teacher, ids, t[None].astype(np.float32), 1)
    for ours, truth in zip((kd, gradient), full_kl(student, teacher), strict=True):
        np.testing.assert_allclose(ours[0], truth, rtol=1e-5, atol=1e-6)


def test_from_hidden_states() -> None:
    """The fused loss takes the weights along with the chunks of positions."""
    student, teacher = problem()
    ids, weights = (x[:5] for x in drawn(teacher, TOP))
    kd, gradient = estimates(student, teacher, ids, weights, 1)
    values = np.take_along_axis(np.broadcast_to(teacher, (5, T, V)), ids, -1).astype(np.float32)
    log_sum = np.broadcast_to(np.log(np.exp(teacher).sum(-1)), (5, T)).astype(np.float32)

    def total(hidden: jax.Array) -> jax.Array:
        whole = {"log_sum_exp_logits": log_sum, "topk_weights": jnp.asarray(weights), "targets": "sampled"}
        rows = values, ids, np.zeros((5, T), np.int32), np.ones((5, T), np.float32)
        return linear_topk_kd_loss(hidden, jnp.eye(V), *rows, **whole, logits_scale=SCALE, chunk_tokens=4).loss

    loss, slope = jit(jax.value_and_grad(total))(np.broadcast_to(student, (5, T, V)))
    np.testing.assert_allclose(loss, kd.sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-6)
