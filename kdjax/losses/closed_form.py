"""The losses of a position as functions of the few numbers that they depend on, and their derivatives by these numbers.

A position's loss depends on the student through K + 2 numbers: the logits at the teacher's ids, the logit of the label,
and the logsumexp. An implementation passes over the vocabulary to pick them (`Picked`), computes the losses and their
derivatives by the picked numbers here, and spreads these derivatives over the vocabulary again.

Everything here is elementwise or a reduction over K, so that a GPU kernel can run it on its own row. The derivatives
are closed formulas: with f_k the share of bucket k in the divergence and d_k = df_k / d log q_k,

    fwd_kl  f = p (log p - log q)                        d = -p
    bwd_kl  f = q (log q - log p)                        d = q (log q - log p + 1)
    jsd     f = b p (log p - log m) + (1 - b) q (log q - log m)    d = (1 - b) q (log q - log m)

Renormalised, log q_k = scale z_k - logsumexp_K(scale z), so that dkd/dz_k = scale (d_k - q_k sum_j d_j). With a ghost
tail, log q_k = scale z_k - lse and q_tail = 1 - sum_k q_k, so that each d_k also gets -d_tail q_k / q_tail, unless
the tail is clamped and thus constant (`reference.MAX_LOG_MASS`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.reference import ABSENT, MAX_LOG_MASS

Losses = tuple[Float[Array, "*P"], Float[Array, "*P"], Float[Array, "*P"]]  # loss, kd, sft


class Picked(NamedTuple):
    """What the objective needs of student logits z [V], in the computation dtype.

    `row_max` is a constant to derivatives: losses depend on differences of logits only, and differences from the row's
    maximum keep their digits when all logits are near 1000. `row_max` and `log_sum` are None if no pass over the
    vocabulary was made.
    """

    topk: Float[Array, "*P K"]  # z at the teacher's ids; NaN at absent entries and at ids outside [0, V)
    label: Float[Array, "*P"]  # z at the label; NaN at labels outside [0, V)
    row_max: Float[Array, "*P"] | None = None
    log_sum: Float[Array, "*P"] | None = None  # log sum_v exp(logits_scale (z_v - row_max))


class PickedCotangents(NamedTuple):
    """Cotangents of the logits of `Picked` and of its log-sum (None if no loss depends on that)."""

    topk: Float[Array, "*P K"]
    label: Float[Array, "*P"]
    log_sum: Float[Array, "*P"] | None


def evaluate(
    objective: Objective, picked: Picked, supervision: Supervision, kd: Float[Array, "*P"] | None = None
) -> Losses:
    """Returns (loss, kd, sft) of each position in nats; `kd` is the kd term if it is known already.

    A term of weight 0 stays out of the loss, whatever its value.
    """
    if kd is None:
        kd = kd_term(objective, picked, supervision)
    if objective.sft_loss_weight == 0:
        return objective.kd_loss_weight * kd, kd, jnp.zeros_like(kd)
    sft = sft_term(objective, picked)
    if objective.kd_loss_weight == 0:
        return objective.sft_loss_weight * sft, kd, sft
    return objective.kd_loss_weight * kd + objective.sft_loss_weight * sft, kd, sft


def term_cotangents(objective: Objective, cotangents: Losses) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """Returns the cotangents of kd and sft, given those of the three results of `evaluate`."""
    loss_ct, kd_ct, sft_ct = cotangents
    kd_ct = objective.kd_loss_weight * loss_ct + kd_ct
    sft_weight = objective.sft_loss_weight
    return kd_ct, sft_weight * loss_ct + sft_ct if sft_weight != 0 else jnp.zeros_like(sft_ct)  # sft is constant 0


def kd_term(objective: Objective, picked: Picked, supervision: Supervision) -> Float[Array, "*P"]:
    """Returns the divergence of the teacher's and the student's distributions over the buckets, in nats."""
    buckets = _buckets(objective, picked, supervision)
    kd = _share(objective, buckets.log_p, buckets.log_q).sum(axis=-1)
    if buckets.log_p_tail is None or buckets.log_q_tail is None:
        return kd
    return kd + _share(objective, buckets.log_p_tail, buckets.log_q_tail)


def sft_term(objective: Objective, picked: Picked) -> Float[Array, "*P"]:
    """Returns the cross-entropy with the label over the whole vocabulary, in nats."""
    assert picked.row_max is not None
    assert picked.log_sum is not None
    return picked.log_sum - objective.logits_scale * (picked.label - picked.row_max)


def differentiate(
    objective: Objective,
    picked: Picked,
    supervision: Supervision,
    kd_ct: Float[Array, "*P"],
    sft_ct: Float[Array, "*P"],
) -> PickedCotangents:
    """Returns the cotangents of the picked numbers.

    A cotangent of 0 stays 0 whatever it is multiplied by, NaN and infinity too, so that a masked position has no
    gradient whatever it holds.
    """
    buckets = _buckets(objective, picked, supervision)
    slope_K = _slope(objective, buckets.log_p, buckets.log_q)
    if buckets.log_p_tail is None or buckets.log_q_tail is None:
        slope_K = slope_K - jnp.exp(buckets.log_q) * slope_K.sum(axis=-1, keepdims=True)
        log_sum_ct = None
    else:
        tail_slope = _slope(objective, buckets.log_p_tail, buckets.log_q_tail)[..., None]
        odds_K = jnp.exp(buckets.log_q - buckets.log_q_tail[..., None])
        slope_K = slope_K - jnp.where(buckets.clamped[..., None], 0, tail_slope * odds_K)
        log_sum_ct = -jnp.where(kd_ct == 0, 0, kd_ct * slope_K.sum(axis=-1))
    if objective.sft_loss_weight != 0:
        log_sum_ct = sft_ct if log_sum_ct is None else log_sum_ct + sft_ct
    kd_ct = kd_ct[..., None]
    topk_ct = jnp.where(kd_ct == 0, 0, objective.logits_scale * kd_ct * slope_K)
    return PickedCotangents(topk_ct, -objective.logits_scale * sft_ct, log_sum_ct)


class _Buckets(NamedTuple):
    """Log-probabilities of teacher (p) and student (q); `ABSENT` at absent entries. Tails are None without a ghost."""

    log_p: Float[Array, "*P K"]
    log_q: Float[Array, "*P K"]
    log_p_tail: Float[Array, "*P"] | None
    log_q_tail: Float[Array, "*P"] | None
    clamped: Bool[Array, "*P"]  # whether the student's tail is clamped, and thus constant


def _buckets(objective: Objective, picked: Picked, supervision: Supervision) -> _Buckets:
    t_K = supervision.topk_logits.astype(picked.topk.dtype)
    present_K = t_K != -jnp.inf
    if not objective.ghost:
        log_p = _log_softmax(t_K, present_K, objective.target_logits_scale)
        log_q = _log_softmax(picked.topk, present_K, objective.logits_scale)
        return _Buckets(log_p, log_q, None, None, jnp.zeros(picked.label.shape, bool))
    assert supervision.log_sum_exp_logits is not None
    assert picked.row_max is not None
    assert picked.log_sum is not None
    log_p = t_K - supervision.log_sum_exp_logits.astype(t_K.dtype)[..., None]
    log_q = objective.logits_scale * (picked.topk - picked.row_max[..., None]) - picked.log_sum[..., None]
    log_p, log_q = (jnp.where(present_K, log, ABSENT) for log in (log_p, log_q))
    log_p_mass, log_q_mass = _logsumexp(log_p), _logsumexp(log_q)
    log_p_tail, log_q_tail = (_log1mexp(jnp.minimum(mass, MAX_LOG_MASS)) for mass in (log_p_mass, log_q_mass))
    return _Buckets(log_p, log_q, log_p_tail, log_q_tail, log_q_mass > MAX_LOG_MASS)


def _share(objective: Objective, log_p: Float[Array, "*P"], log_q: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns each bucket's share of the divergence, where 0 log 0 = 0."""
    if objective.kd_loss == "fwd_kl":
        return _times_exp(log_p, log_p - log_q)
    if objective.kd_loss == "bwd_kl":
        return _times_exp(log_q, log_q - log_p)
    b = objective.jsd_beta
    log_m = _log_mixture(objective, log_p, log_q)
    return b * _times_exp(log_p, log_p - log_m) + (1 - b) * _times_exp(log_q, log_q - log_m)


def _slope(objective: Objective, log_p: Float[Array, "*P"], log_q: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns the derivative of the share by log q."""
    if objective.kd_loss == "fwd_kl":
        return -jnp.exp(log_p)
    if objective.kd_loss == "bwd_kl":
        return _times_exp(log_q, log_q - log_p + 1)
    return (1 - objective.jsd_beta) * _times_exp(log_q, log_q - _log_mixture(objective, log_p, log_q))


def _log_mixture(objective: Objective, log_p: Float[Array, "*P"], log_q: Float[Array, "*P"]) -> Float[Array, "*P"]:
    a, c = jnp.log(objective.jsd_beta) + log_p, jnp.log1p(-objective.jsd_beta) + log_q
    largest = jnp.maximum(a, c)
    return largest + jnp.log(jnp.exp(a - largest) + jnp.exp(c - largest))


def _times_exp(log_x: Float[Array, "*P"], y: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns exp(log_x) * y, or 0 where exp(log_x) is 0, whatever y is."""
    x = jnp.exp(log_x)
    return jnp.where(x == 0, 0, x * y)


def _log_softmax(values_K: Float[Array, "*P K"], present_K: Bool[Array, "*P K"], scale: float) -> Float[Array, "*P K"]:
    """Returns the log-softmax of scale * values over the present entries; the values are centred before scaling."""
    values_K = jnp.where(present_K, values_K, -jnp.inf)
    scaled_K = scale * (values_K - values_K.max(axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.where(present_K, jnp.exp(scaled_K), 0).sum(axis=-1, keepdims=True))
    return jnp.where(present_K, scaled_K - log_sum, ABSENT)


def _logsumexp(values_K: Float[Array, "*P K"]) -> Float[Array, "*P"]:
    """Returns the logsumexp of values that are finite or NaN."""
    largest = values_K.max(axis=-1)
    return largest + jnp.log(jnp.exp(values_K - largest[..., None]).sum(axis=-1))


def _log1mexp(log_x: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns log(1 - exp(log_x)) for log_x < 0, accurately (Mächler, "Accurately computing log(1 - exp(-|a|))")."""
    near_one = log_x > -0.6931472  # log 2
    return jnp.where(near_one, jnp.log(-jnp.expm1(log_x)), jnp.log1p(-jnp.exp(log_x)))
