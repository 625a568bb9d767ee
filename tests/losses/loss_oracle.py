"""The oracle of the losses in float64 NumPy, with derivatives by formula, and the inputs to test with.

Written from the formulas of the papers and of NeMo-Aligner; shares no code with the package.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss

# "linear" and "gathered" are the fused loss, with the identity as unembedding; the others take logits.
IMPLEMENTATIONS = ("reference", "xla", "linear", "gathered", "pallas_interpret")
# Allowed on top of the error of rounding the truth to the dtype; the tolerances of Cut Cross-Entropy.
TOLERANCE = {"float32": 5e-4, "float16": 1e-3, "bfloat16": 1e-2}


def jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `jax.jit` of f with a third of the compile time: the same XLA passes, and quick code after them."""
    return jax.jit(f, compiler_options=quick_compilation())


@functools.cache
def quick_compilation() -> dict[str, Any]:
    """Returns the options for it: LLVM optimises less, and XLA's older emitters, if it still has them, emit less."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    older_emitters = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=older_emitters).lower().compile()
    except jax.errors.JaxRuntimeError:
        return options
    return options | older_emitters


@dataclasses.dataclass
class Inputs:
    """One problem as NumPy arrays; `weight` is the loss mask."""

    logits: np.ndarray
    topk_logits: np.ndarray
    topk_token_ids: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    log_sum_exp_logits: np.ndarray

    @property
    def teaching(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.topk_logits, self.topk_token_ids, self.labels


def make_inputs(
    seed: int,
    shape: tuple[int, int, int, int],
    dtype: Any = "float32",
    *,
    duplicates: bool = False,
    absent: bool = False,
    offset: float = 0.0,
) -> Inputs:
    """Returns random inputs of shape (B, T, V, K), with half of the labels in the top-k and a third of weights 0."""
    rng = np.random.default_rng(seed)
    b, t, v, k = shape
    logits = (rng.normal(size=(b, t, v)) * 3 + offset).astype(dtype)
    ids = np.stack([rng.choice(v, k, replace=duplicates) for _ in range(b * t)]).reshape(b, t, k)
    topk_logits = -np.sort(-rng.normal(size=(b, t, k)) * 3) - 2 * offset
    log_sum_exp = logsumexp(topk_logits) + (0 if k == v else rng.uniform(0.01, 1.0, (b, t)))
    if absent and k > 1:
        gone = rng.random((b, t, k)) < 0.4
        gone[..., 0] = False
        topk_logits, ids = np.where(gone, -np.inf, topk_logits), np.where(gone, -1, ids)
    labels = np.where(rng.random((b, t)) < 0.5, ids[..., 0], rng.integers(0, v, (b, t)))
    weight = np.where(rng.random((b, t)) < 1 / 3, 0, rng.uniform(0.5, 1.5, (b, t)))
    weight[0, 0] = 1.25
    return Inputs(
        logits,
        topk_logits.astype(np.float32),
        ids.astype(np.int32),
        labels.astype(np.int32),
        weight.astype(np.float32),
        log_sum_exp.astype(np.float32),
    )


def logsumexp(x: np.ndarray) -> np.ndarray:
    m = x.max(-1, keepdims=True)
    return (m + np.log(np.exp(x - m).sum(-1, keepdims=True)))[..., 0]


def oracle(
    inputs: Inputs,
    *,
    kd_loss: str = "fwd_kl",
    kd_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    logits_scale: float = 1.0,
    target_logits_scale: float = 1.0,
    cross_tokenizer: Any = None,
    tail: str = "renormalize",
    jsd_beta: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns loss, kd, sft [B, T] and the gradient [B, T, V] of sum(loss) by the logits, position by position."""
    b, t, v = inputs.logits.shape
    loss, kd, sft = np.zeros((3, b, t))
    gradient = np.zeros((b, t, v))
    for at in np.ndindex(b, t):
        z = logits_scale * inputs.logits[at].astype(np.float64)
        tau = target_logits_scale * inputs.topk_logits[at].astype(np.float64)
        ids = inputs.topk_token_ids[at]
        if cross_tokenizer:
            tau, ids = -np.sort(-tau), np.argsort(-z, kind="stable")[: len(ids)]
        ids, tau = ids[np.isfinite(tau)], tau[np.isfinite(tau)]
        softmax = np.exp(z - logsumexp(z))
        if tail == "ghost":
            log_p = with_tail(tau - inputs.log_sum_exp_logits[at].astype(np.float64))
            log_q = with_tail(z[ids] - logsumexp(z))
        else:
            log_p, log_q = tau - logsumexp(tau), z[ids] - logsumexp(z[ids])
        kd[at], slope = divergence(log_p, log_q, kd_loss, jsd_beta)
        by_z = np.zeros(v)
        if tail == "ghost":
            clamped = logsumexp(z[ids]) - logsumexp(z) > -(2.0**-23)
            odds = 0 if clamped else np.exp(log_q[:-1] - log_q[-1])
            slope = slope[:-1] - slope[-1] * odds
            by_z -= slope.sum() * softmax
        else:
            slope = slope - np.exp(log_q) * slope.sum()
        np.add.at(by_z, ids, slope)
        gradient[at] = kd_loss_weight * logits_scale * by_z
        loss[at] = kd_loss_weight * kd[at]
        if sft_loss_weight:
            sft[at] = logsumexp(z) - z[inputs.labels[at]]
            loss[at] += sft_loss_weight * sft[at]
            softmax[inputs.labels[at]] -= 1
            gradient[at] += sft_loss_weight * logits_scale * softmax
    return loss, kd, sft, gradient


def with_tail(log_prob: np.ndarray) -> np.ndarray:
    mass = min(logsumexp(log_prob), -(2.0**-23))
    return np.append(log_prob, np.log(-np.expm1(mass)))


def divergence(log_p: np.ndarray, log_q: np.ndarray, kind: str, beta: float) -> tuple[float, np.ndarray]:
    """Returns the divergence and its derivatives by log q, with each log q_k a free variable."""
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "fwd_kl":
        return np.sum(p * (log_p - log_q)), -p
    if kind == "bwd_kl":
        return np.sum(q * (log_q - log_p)), q * (log_q - log_p + 1)
    m = beta * p + (1 - beta) * q
    value = beta * np.sum(p * np.log(p / m)) + (1 - beta) * np.sum(q * np.log(q / m))
    return value, (1 - beta) * q * np.log(q / m)


def takes(implementation: str, settings: dict[str, Any]) -> bool:
    """Returns whether an implementation supports these settings."""
    everything = settings.get("sft_loss_weight") or settings.get("tail") == "ghost" or settings.get("cross_tokenizer")
    return implementation != "gathered" or not everything


def weighted_sums(implementation: str, inputs: Inputs, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Returns (loss, kd, sft) summed with `inputs.weight`, and the gradient of that loss by the logits."""
    weight, arguments = jnp.asarray(inputs.weight), {**settings}
    if settings.get("tail") == "ghost":
        arguments["log_sum_exp_logits"] = inputs.log_sum_exp_logits

    def total(logits: jax.Array) -> tuple[jax.Array, Any]:
        if implementation in ("linear", "gathered"):  # multiplying by the identity keeps the logits exact
            eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
            name = "xla" if implementation == "linear" else "gathered"
            sums = linear_topk_kd_loss(
                logits, eye, *inputs.teaching, weight, chunk_tokens=4, implementation=name, **arguments
            )
            return sums.loss, sums[:3]
        losses = topk_kd_loss(logits, *inputs.teaching, implementation=implementation, **arguments)
        sums = [jnp.where(weight == 0, 0, weight * x).sum() for x in losses]
        return sums[0], sums

    (_, sums), gradient = jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(inputs.logits))
    return sums, gradient


def assert_close(ours: Any, truth: np.ndarray, dtype: str, scale: float = 1.0) -> None:
    """Asserts that |ours - truth| exceeds the rounding error of the truth by at most the dtype's tolerance * scale."""
    ours, name = np.asarray(ours), dtype
    rounded = truth.astype(ml_dtypes.bfloat16 if name == "bfloat16" else name).astype(np.float64)
    excess = np.abs(ours.astype(np.float64) - truth) - np.abs(rounded - truth)
    np.testing.assert_array_less(excess, TOLERANCE[name] * scale)


def arguments_of(n: int, v: int, d: int, k: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of hidden, unembed, topk_logits, topk_token_ids, labels, loss_mask."""
    shapes = [(1, n, d), (v, d), (1, n, k), (1, n, k), (1, n), (1, n)]
    kinds = [jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32]
    return [jax.ShapeDtypeStruct(*both) for both in zip(shapes, kinds, strict=True)]
