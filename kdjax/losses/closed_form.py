"""The losses of a position as functions of the few numbers that they depend on, and their derivatives by these numbers.

A position's loss depends on the student through K + 3 numbers: the logits at the teacher's ids, the logit of the label,
the logsumexp over the vocabulary, and for a ghost tail that over the ids that are not taught. An implementation passes
over the vocabulary to pick them (`Picked`), computes the losses and their derivatives by the picked numbers here, and
spreads these derivatives over the vocabulary again.

Everything here is elementwise or a reduction over K, so that a GPU kernel can run it on its own row. The derivatives
are closed formulas: with f_k the share of bucket k in the divergence and d_k = df_k / d log q_k,

    fwd_kl  f = p (log p - log q)                        d = -p
    bwd_kl  f = q (log q - log p)                        d = q (log q - log p + 1)
    jsd     f = b p (log p - log m) + (1 - b) q (log q - log m)    d = (1 - b) q (log q - log m)

Renormalised, log q_k = scale z_k - logsumexp_K(scale z), so that dkd/dz_k = scale (d_k - q_k sum_j d_j). With a ghost
tail, log q_k = scale z_k - lse and log q_tail = tail_lse - lse, so that the logsumexps have the derivatives
-(sum_k d_k + d_tail) and d_tail. What a column then receives through both of them is one multiple of its exponential,
because the entries' columns, which are not in tail_lse, are written apart (`Dense`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.reference import ABSENT, MAX_LOG_MASS

Losses = tuple[Float[Array, "*P"], Float[Array, "*P"], Float[Array, "*P"]]  # loss, kd, sft


class Picked(NamedTuple):
    """What the objective needs of student logits z [V], in the computation dtype.

    The maxima are constants to derivatives: losses depend on differences of logits only, and differences from the
    maximum keep their digits when all logits are near 1000. Numbers that no pass over the vocabulary was made for are
    None. For a ghost tail, a pass finds those of the tail, and `with_total` adds those of the row.
    """

    topk: Float[Array, "*P K"]  # z at the teacher's ids; NaN at absent entries and at ids outside [0, V)
    label: Float[Array, "*P"]  # z at the label; NaN at labels outside [0, V)
    row_max: Float[Array, "*P"] | None = None
    log_sum: Float[Array, "*P"] | None = None  # log sum_v exp(logits_scale (z_v - row_max))
    tail_max: Float[Array, "*P"] | None = None  # the same over the columns that are not taught; -inf if there are none
    tail_log_sum: Float[Array, "*P"] | None = None


class Dense(NamedTuple):
    """What a column receives through the logsumexps: factor exp(logits_scale (z - centre)); 0 if the factor is 0."""

    factor: Float[Array, "*P"]
    centre: Float[Array, "*P"]


class PickedCotangents(NamedTuple):
    """Cotangents of the logits of `Picked`, and what they receive through the logsumexps (None if there is nothing)."""

    topk: Float[Array, "*P K"]
    label: Float[Array, "*P"]
    at_topk: Dense | None  # to be added at the teacher's ids
    elsewhere: Dense | None  # in all other columns


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


def with_total(objective: Objective, picked: Picked, counts_K: Bool[Array, "*P K"]) -> Picked:
    """Returns `picked` with the numbers of the row, from those of its tail and the entries that count.

    An entry counts unless it is absent, no token id, or another entry has its id.
    """
    assert picked.tail_max is not None
    assert picked.tail_log_sum is not None
    topk = jnp.where(counts_K, picked.topk, -jnp.inf)
    row_max = jnp.maximum(picked.tail_max, topk.max(axis=-1))
    tail = jnp.exp(objective.logits_scale * (picked.tail_max - row_max) + picked.tail_log_sum)
    head = jnp.exp(objective.logits_scale * (topk - row_max[..., None])).sum(axis=-1)
    # The tail's own log-sum where it is all there is, so that its share is exactly 1.
    log_sum = jnp.where(head == 0, picked.tail_log_sum, jnp.log(tail + head))
    return picked._replace(row_max=row_max, log_sum=log_sum)


def kd_term(objective: Objective, picked: Picked, supervision: Supervision) -> Float[Array, "*P"]:
    """Returns the divergence of the teacher's and the student's distributions over the buckets, in nats."""
    if objective.label_tail or objective.sampled:
        log_t, log_p = _whole_vocabulary(objective, picked, supervision)
        weight_K, label_weight = _weights(objective, log_t, supervision)
        if label_weight is None:
            return _times(weight_K, log_t - log_p).sum(axis=-1)
        return -_times(weight_K, log_p).sum(axis=-1) + _times(label_weight, sft_term(objective, picked))
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
    slopes = _slopes(objective, picked, supervision)
    scale = objective.logits_scale
    topk_ct = scale * _times(kd_ct[..., None], slopes.topk)
    label_ct = sft_ct if slopes.label is None else sft_ct - _times(kd_ct, slopes.label)
    if picked.log_sum is None or not objective.needs_log_sum:
        return PickedCotangents(topk_ct, -scale * label_ct, None, None)
    assert picked.row_max is not None
    log_sum_ct = sft_ct if slopes.log_sum is None else sft_ct + _times(kd_ct, slopes.log_sum)
    at_topk = Dense(scale * _times(log_sum_ct, jnp.exp(-picked.log_sum)), picked.row_max)
    if slopes.tail is None:
        return PickedCotangents(topk_ct, -scale * label_ct, at_topk, at_topk)
    assert picked.tail_max is not None
    assert picked.tail_log_sum is not None
    tail_ct = _times(kd_ct, slopes.tail) + _times(log_sum_ct, jnp.exp(_log_tail(objective, picked)))
    factor = scale * _times(tail_ct, jnp.exp(-picked.tail_log_sum))
    centre = jnp.where(picked.tail_max == -jnp.inf, 0, picked.tail_max)
    return PickedCotangents(topk_ct, -scale * label_ct, at_topk, Dense(factor, centre))


class _Slopes(NamedTuple):
    """Derivatives of the kd term; None where it does not depend on the number."""

    topk: Float[Array, "*P K"]  # by logits_scale z at the teacher's ids
    label: Float[Array, "*P"] | None = None  # by logits_scale z at the label
    log_sum: Float[Array, "*P"] | None = None
    tail: Float[Array, "*P"] | None = None  # by the tail's log-sum


def _slopes(objective: Objective, picked: Picked, supervision: Supervision) -> _Slopes:
    if objective.label_tail or objective.sampled:
        log_t, _ = _whole_vocabulary(objective, picked, supervision)
        weight_K, label_weight = _weights(objective, log_t, supervision)
        total = weight_K.sum(axis=-1)
        if label_weight is None:
            return _Slopes(-weight_K, None, total)
        return _Slopes(-weight_K, -label_weight, total + label_weight)
    buckets = _buckets(objective, picked, supervision)
    slope_K = _slope(objective, buckets.log_p, buckets.log_q)
    if buckets.log_p_tail is None or buckets.log_q_tail is None:
        return _Slopes(slope_K - jnp.exp(buckets.log_q) * slope_K.sum(axis=-1, keepdims=True))
    tail_slope = _slope(objective, buckets.log_p_tail, buckets.log_q_tail)
    return _Slopes(slope_K, None, -(slope_K.sum(axis=-1) + tail_slope), tail_slope)


def _weights(
    objective: Objective, log_t: Float[Array, "*P K"], supervision: Supervision
) -> tuple[Float[Array, "*P K"], Float[Array, "*P"] | None]:
    """Returns the shares of the target that the entries carry and, if the tail goes to the label, that of the label."""
    if objective.sampled:
        assert supervision.topk_weights is not None
        return jnp.where(log_t == ABSENT, 0, supervision.topk_weights.astype(log_t.dtype)), None
    t_K = jnp.exp(log_t)
    return t_K, jnp.maximum(0, 1 - t_K.sum(axis=-1))


class _Buckets(NamedTuple):
    """Log-probabilities of teacher (p) and student (q); `ABSENT` at absent entries. Tails are None without a ghost."""

    log_p: Float[Array, "*P K"]
    log_q: Float[Array, "*P K"]
    log_p_tail: Float[Array, "*P"] | None
    log_q_tail: Float[Array, "*P"] | None


def _buckets(objective: Objective, picked: Picked, supervision: Supervision) -> _Buckets:
    if objective.ghost:
        log_p, log_q = _whole_vocabulary(objective, picked, supervision)
        log_q_tail = _log_tail(objective, picked)
        log_p_tail = _log1mexp(jnp.minimum(_logsumexp(log_p), MAX_LOG_MASS))
        empty = log_q_tail == -jnp.inf
        return _Buckets(log_p, log_q, *(jnp.where(empty, ABSENT, log) for log in (log_p_tail, log_q_tail)))
    t_K = supervision.topk_logits.astype(picked.topk.dtype)
    present_K = t_K != -jnp.inf
    log_p = _log_softmax(t_K, present_K, objective.target_logits_scale)
    log_q = _log_softmax(picked.topk, present_K, objective.logits_scale)
    return _Buckets(log_p, log_q, None, None)


def _whole_vocabulary(
    objective: Objective, picked: Picked, supervision: Supervision
) -> tuple[Float[Array, "*P K"], Float[Array, "*P K"]]:
    """Returns the teacher's and the student's log-probabilities of the entries over their whole vocabularies."""
    assert supervision.log_sum_exp_logits is not None
    assert picked.row_max is not None
    assert picked.log_sum is not None
    t_K = supervision.topk_logits.astype(picked.topk.dtype)
    log_t = t_K - supervision.log_sum_exp_logits.astype(t_K.dtype)[..., None]
    log_p = objective.logits_scale * (picked.topk - picked.row_max[..., None]) - picked.log_sum[..., None]
    present_K = t_K != -jnp.inf
    return jnp.where(present_K, log_t, ABSENT), jnp.where(present_K, log_p, ABSENT)


def _log_tail(objective: Objective, picked: Picked) -> Float[Array, "*P"]:
    """Returns the log of the student's mass outside the entries, -inf if there is nothing."""
    assert picked.row_max is not None
    assert picked.log_sum is not None
    assert picked.tail_max is not None
    assert picked.tail_log_sum is not None
    return objective.logits_scale * (picked.tail_max - picked.row_max) + picked.tail_log_sum - picked.log_sum


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
    return _times(jnp.exp(log_x), y)


def _times(x: Float[Array, "*P"], y: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns x * y, or 0 where x is 0, whatever y is."""
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
