"""The objective on the few numbers of each position that it depends on, and its derivatives by them.

All of the student that enters a position's loss is K + 2 numbers: the logits at the teacher's ids, the logit
of the label, and the logsumexp. Whoever makes the pass over the vocabulary picks them (`Picked`), asks here for
the losses and their derivatives by the picked numbers, and spreads those over the vocabulary again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.reference import ABSENT, divergence, with_tail

Losses = tuple[Float[Array, "*P"], Float[Array, "*P"], Float[Array, "*P"]]  # loss, kd, sft


class Picked(NamedTuple):
    """What the objective needs of student logits z [V], in the computation dtype.

    `row_max` is a constant to derivatives: losses depend on differences of logits only, and those taken from
    the row's maximum keep their digits when all logits are near 1000. It and `log_sum` are None where no pass
    over the vocabulary was made.
    """

    topk: Float[Array, "*P K"]  # z at the teacher's ids; NaN at absent entries and at ids outside [0, V)
    label: Float[Array, "*P"]  # z at the label; NaN at labels outside [0, V)
    row_max: Float[Array, "*P"] | None = None
    log_sum: Float[Array, "*P"] | None = None  # log sum_v exp(logits_scale (z_v - row_max))


def evaluate(objective: Objective, picked: Picked, supervision: Supervision) -> Losses:
    """(loss, kd, sft) of each position in nats. A term of weight 0 stays out of the loss, whatever its value."""
    kd = kd_term(objective, picked, supervision)
    if objective.sft_loss_weight == 0:
        return objective.kd_loss_weight * kd, kd, jnp.zeros_like(kd)
    sft = sft_term(objective, picked)
    if objective.kd_loss_weight == 0:
        return objective.sft_loss_weight * sft, kd, sft
    return objective.kd_loss_weight * kd + objective.sft_loss_weight * sft, kd, sft


def differentiate(
    objective: Objective, picked: Picked, supervision: Supervision, cotangents: Losses
) -> tuple[Float[Array, "*P K+1"], Float[Array, "*P"] | None]:
    """Cotangents of the K picked logits with the label's beside them, and of the log-sum (None if not needed).

    A cotangent of 0 stays 0 through every NaN and infinity: a masked position has no gradient, whatever it
    holds.
    """
    loss_ct, kd_ct, sft_ct = cotangents
    kd_ct = objective.kd_loss_weight * loss_ct + kd_ct
    sft_weight = objective.sft_loss_weight
    sft_ct = sft_weight * loss_ct + sft_ct if sft_weight != 0 else jnp.zeros_like(sft_ct)  # sft is constant 0

    def kd(topk: Array, log_sum: Array | None) -> Array:
        return kd_term(objective, picked._replace(topk=topk, log_sum=log_sum), supervision)

    topk_ct, log_sum_ct = jax.vjp(kd, picked.topk, picked.log_sum)[1](kd_ct)
    topk_ct = jnp.where(kd_ct[..., None] == 0, 0, topk_ct)
    label_ct = -objective.logits_scale * sft_ct
    columns_ct = jnp.concatenate([topk_ct, label_ct[..., None]], axis=-1)
    if not objective.needs_log_sum:
        return columns_ct, None
    return columns_ct, jnp.where(kd_ct == 0, 0, log_sum_ct) + sft_ct


def kd_term(objective: Objective, picked: Picked, supervision: Supervision) -> Float[Array, "*P"]:
    """The divergence of the teacher's and the student's distributions over the top-k buckets, in nats."""
    t_K = supervision.topk_logits.astype(picked.topk.dtype)
    present_K = t_K != -jnp.inf
    if not objective.ghost:
        log_p = _log_softmax(t_K, present_K, objective.target_logits_scale)
        log_q = _log_softmax(picked.topk, present_K, objective.logits_scale)
        return divergence(log_p, log_q, objective)
    assert supervision.log_sum_exp_logits is not None
    assert picked.row_max is not None
    assert picked.log_sum is not None
    log_p_K = t_K - supervision.log_sum_exp_logits.astype(t_K.dtype)[..., None]
    log_q_K = objective.logits_scale * (picked.topk - picked.row_max[..., None]) - picked.log_sum[..., None]
    return divergence(with_tail(log_p_K, present_K), with_tail(log_q_K, present_K), objective)


def sft_term(objective: Objective, picked: Picked) -> Float[Array, "*P"]:
    """The cross-entropy with the label over the whole vocabulary, in nats."""
    assert picked.row_max is not None
    assert picked.log_sum is not None
    return picked.log_sum - objective.logits_scale * (picked.label - picked.row_max)


def _log_softmax(values_K: Float[Array, "*P K"], present_K: Bool[Array, "*P K"], scale: float) -> Float[Array, "*P K"]:
    """log-softmax of scale * values over the present entries, centred before it is scaled."""
    values_K = jnp.where(present_K, values_K, -jnp.inf)
    centred_K = values_K - jax.lax.stop_gradient(values_K.max(axis=-1, keepdims=True))
    return jnp.where(present_K, jax.nn.log_softmax(scale * centred_K), ABSENT)
