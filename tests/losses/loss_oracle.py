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
    topk_weights: np.ndarray | None = None  # of sampled targets

    @property
    def teaching(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.topk_logits, self.topk_token_ids, self.labels

    def whole(self, settings: dict[str, Any]) -> dict[str, np.ndarray | None]:
        """Returns the keywords for the arrays that go with these settings."""
        weights = self.topk_weights if settings.get("targets") == "sampled" else None
        return {"log_sum_exp_logits": self.log_sum_exp_logits, "topk_weights": weights}


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
    topk_weights = np.where(np.isfinite(topk_logits), rng.uniform(0, 2 / k, (b, t, k)), 0)
    return Inputs(
        logits,
        topk_logits.astype(np.float32),
        ids.astype(np.int32),
        labels.astype(np.int32),
        weight.astype(np.float32),
        log_sum_exp.astype(np.float32),
        topk_weights.astype(np.float32),
    )


def vanishing_tail(inputs: Inputs, gap: float) -> Inputs:
    """Returns the inputs with the entries' logits raised by `gap`, and in every second position with duplicate ids.

    The student's tail then has a mass of about exp(-gap); the teacher's has one of 0.3.
    """
    inputs.topk_token_ids[:, ::2, 2:] = inputs.topk_token_ids[:, ::2, :2]
    for at in np.ndindex(*inputs.labels.shape):
        inputs.logits[at][inputs.topk_token_ids[at]] += gap
    inputs.log_sum_exp_logits = (logsumexp(inputs.topk_logits) - np.log(0.7)).astype(np.float32)
    return inputs


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
    targets: str = "topk",
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
        there = np.isfinite(tau)
        ids, tau = ids[there], tau[there]
        softmax = np.exp(z - logsumexp(z))
        by_z = np.zeros(v)
        log_t = tau - inputs.log_sum_exp_logits[at].astype(np.float64)
        if targets == "sampled" or tail == "label":
            target, taught = np.exp(log_t), ids
            if targets == "sampled":
                assert inputs.topk_weights is not None
                target = inputs.topk_weights[at][there].astype(np.float64)
                kd[at] = target @ log_t
            else:
                target = np.append(target, max(0, 1 - target.sum()))
                taught = np.append(ids, inputs.labels[at])
            kd[at] -= target @ (z[taught] - logsumexp(z))
            by_z += target.sum() * softmax
            np.add.at(by_z, taught, -target)
        elif tail == "ghost":
            rest = np.setdiff1d(np.arange(v), ids)
            log_q = z[ids] - logsumexp(z)
            if len(rest):
                log_t, log_q = with_tail(log_t), np.append(log_q, logsumexp(z[rest]) - logsumexp(z))
            kd[at], slope = divergence(log_t, log_q, kd_loss, jsd_beta)
            np.add.at(by_z, ids, slope[: len(ids)])
            if len(rest):
                by_z[rest] += slope[-1] * np.exp(z[rest] - logsumexp(z[rest]))
            by_z -= slope.sum() * softmax
        else:
            log_q = z[ids] - logsumexp(z[ids])
            kd[at], slope = divergence(tau - logsumexp(tau), log_q, kd_loss, jsd_beta)
            np.add.at(by_z, ids, slope - np.exp(log_q) * slope.sum())
        gradient[at] = kd_loss_weight * logits_scale * by_z
        loss[at] = kd_loss_weight * kd[at]
        if sft_loss_weight:
            sft[at] = logsumexp(z) - z[inputs.labels[at]]
            loss[at] += sft_loss_weight * sft[at]
            softmax[inputs.labels[at]] -= 1
            gradient[at] += sft_loss_weight * logits_scale * softmax
    return loss, kd, sft, gradient


def with_tail(log_prob: np.ndarray) -> np.ndarray:
    """Returns the teacher's log-probabilities and that of its tail, whose mass is at least about 2^-23."""
    mass = min(logsumexp(log_prob), -(2.0**-23))
    return np.append(log_prob, np.log(-np.expm1(mass)))


def divergence(log_p: np.ndarray, log_q: np.ndarray, kind: str, beta: float) -> tuple[float, np.ndarray]:
    """Returns the divergence and its derivatives by log q, with each log q_k a free variable."""
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "fwd_kl":
        return np.sum(p * (log_p - log_q)), -p
    if kind == "bwd_kl":
        return np.sum(q * (log_q - log_p)), q * (log_q - log_p + 1)
    log_m = np.log(beta * p + (1 - beta) * q)
    value = beta * np.sum(p * (log_p - log_m)) + (1 - beta) * np.sum(q * (log_q - log_m))
    return value, (1 - beta) * q * (log_q - log_m)


def takes(implementation: str, settings: dict[str, Any]) -> bool:
    """Returns whether an implementation supports these settings."""
    everything = {"sft_loss_weight", "tail", "cross_tokenizer", "targets"} & {k for k, v in settings.items() if v}
    return implementation != "gathered" or not everything


def weighted_sums(implementation: str, inputs: Inputs, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Returns (loss, kd, sft) summed with `inputs.weight`, and the gradient of that loss by the logits."""
    weight, arguments = jnp.asarray(inputs.weight), {**settings, **inputs.whole(settings)}

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
