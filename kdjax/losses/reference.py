"""The specification: the losses as algebra over whole logits, differentiated by JAX.

Every faster implementation is tested against this one.

At each position, with student logits z [V], teacher entries (i_k, tau_k) for k = 1..K, and label y:

    s_k = logits_scale z[i_k]              log q = log-softmax of s over K
    t_k = target_logits_scale tau_k        log p = log-softmax of t over K

    fwd_kl:  kd = sum_k p_k (log p_k - log q_k)
    bwd_kl:  kd = sum_k q_k (log q_k - log p_k)
    jsd:     kd = b KL(p | m) + (1 - b) KL(q | m),   m = b p + (1 - b) q,   b = jsd_beta

    sft  = logsumexp_V(logits_scale z) - logits_scale z[y]
    loss = kd_loss_weight kd + sft_loss_weight sft

`logits_scale` scales both terms and there is no T^2 factor, as in NeMo-Aligner's
`GPTKnowledgeDistillationModel`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.objective import LossSums, Objective, Supervision, computation_dtype

# Log-probability of an absent entry, in both distributions: its probability exp(-1e30) is 0 and, unlike -inf, it can be
# subtracted from itself.
ABSENT = -1e30

# The largest log-mass of the top-k that leaves a tail; 2^-23 is float32's epsilon. Where the logsumexp over K rounds to
# that over V or above it (K = V, where the tail is empty; a student certain of the top-k; duplicate ids), the tail
# would be log(0) or the log of a negative number. A clamped tail is a constant with derivative 0, so that the tail's
# term does not pull such a student back towards the teacher; the terms of the K buckets keep their derivatives.
MAX_LOG_MASS = -(2.0**-23)


def token_losses(
    objective: Objective, student_logits: Float[Array, "B T V"], supervision: Supervision
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns (loss, kd, sft) of each position in nats, in float32 (float64 for float64 logits)."""
    dtype = computation_dtype(student_logits)
    z_BxTxV = objective.logits_scale * student_logits.astype(dtype)
    t_BxTxK = objective.target_logits_scale * supervision.topk_logits.astype(dtype)
    if objective.rank_match:
        t_BxTxK = jnp.sort(t_BxTxK, axis=-1, descending=True)
        s_BxTxK = jax.lax.top_k(z_BxTxV, t_BxTxK.shape[-1])[0]
    else:
        s_BxTxK = logits_at(z_BxTxV, supervision.topk_token_ids)
    present_BxTxK = t_BxTxK != -jnp.inf
    s_BxTxK = jnp.where(present_BxTxK, s_BxTxK, -jnp.inf)
    log_z_BxT = jax.nn.logsumexp(z_BxTxV, axis=-1)

    if objective.ghost:
        assert supervision.log_sum_exp_logits is not None
        log_p = with_tail(t_BxTxK - supervision.log_sum_exp_logits.astype(dtype)[..., None], present_BxTxK)
        log_q = with_tail(s_BxTxK - log_z_BxT[..., None], present_BxTxK)
    else:
        log_p = jnp.where(present_BxTxK, jax.nn.log_softmax(t_BxTxK), ABSENT)
        log_q = jnp.where(present_BxTxK, jax.nn.log_softmax(s_BxTxK), ABSENT)
    kd = divergence(log_p, log_q, objective)

    if objective.sft_loss_weight == 0:  # as in NeMo-Aligner: a term that is not asked for reports 0
        return objective.kd_loss_weight * kd, kd, jnp.zeros_like(kd)
    sft = log_z_BxT - logits_at(z_BxTxV, supervision.labels[..., None])[..., 0]
    if objective.kd_loss_weight == 0:  # and stays out of the loss, whatever its value
        return objective.sft_loss_weight * sft, kd, sft
    return objective.kd_loss_weight * kd + objective.sft_loss_weight * sft, kd, sft


def linear_losses(
    objective: Objective,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    supervision: Supervision,
    loss_mask: Float[Array, "B T"],
) -> LossSums:
    """Returns the sums of `kdjax.losses.linear_topk_kd_loss`, computed from all logits at once."""
    dtype = computation_dtype(hidden, unembed)
    logits_BxTxV = jnp.einsum("BTD,VD->BTV", hidden, unembed, preferred_element_type=dtype)
    loss, kd, sft = token_losses(objective, logits_BxTxV, supervision)

    z_BxTxV = jax.lax.stop_gradient(objective.logits_scale * logits_BxTxV)
    k = supervision.topk_logits.shape[-1]
    if objective.rank_match:
        z_BxTxK = jax.lax.top_k(z_BxTxV, k)[0]
        agrees = jnp.zeros_like(kd)
    else:
        z_BxTxK = logits_at(z_BxTxV, supervision.topk_token_ids)
        first_BxTx1 = jnp.argmax(supervision.topk_logits, axis=-1, keepdims=True)
        z_first_BxT = jnp.take_along_axis(z_BxTxK, first_BxTx1, axis=-1)[..., 0]
        agrees = jnp.where(z_first_BxT >= z_BxTxV.max(axis=-1), 1.0, 0.0)
    q_BxTxK = jnp.exp(z_BxTxK - jax.nn.logsumexp(z_BxTxV, axis=-1, keepdims=True))
    mass = jnp.where(supervision.topk_logits != -jnp.inf, q_BxTxK, 0).sum(axis=-1)

    weight = loss_mask.astype(dtype)
    terms = (loss, *jax.lax.stop_gradient((kd, sft)), jnp.ones_like(loss), agrees, mass)
    return LossSums(*(jnp.where(weight == 0, 0, weight * term).sum() for term in terms))


def logits_at(logits_V: Float[Array, "*P V"], ids_K: Int[Array, "*P K"]) -> Float[Array, "*P K"]:
    """Returns the logits at these ids; NaN at ids outside [0, V), which must not pick another token's logit."""
    v = logits_V.shape[-1]
    picked = jnp.take_along_axis(logits_V, jnp.clip(ids_K, 0, v - 1), axis=-1)
    return jnp.where((ids_K >= 0) & (ids_K < v), picked, jnp.nan)


def with_tail(log_prob_K: Float[Array, "*P K"], present_K: Bool[Array, "*P K"]) -> Float[Array, "*P K+1"]:
    """Returns the log-probabilities of the K buckets and of the tail, log(1 - their mass).

    The mass is clamped to about 1 - 2^-23 (see `MAX_LOG_MASS`). The K buckets keep their probabilities: nothing is
    renormalised.
    """
    log_mass = jax.nn.logsumexp(jnp.where(present_K, log_prob_K, -jnp.inf), axis=-1, keepdims=True)
    log_tail = jax.nn.log1mexp(-jnp.minimum(log_mass, MAX_LOG_MASS))
    return jnp.concatenate([jnp.where(present_K, log_prob_K, ABSENT), log_tail], axis=-1)


def divergence(log_p: Float[Array, "*P K"], log_q: Float[Array, "*P K"], objective: Objective) -> Float[Array, "*P"]:
    """Returns the divergence of teacher p and student q in nats, summed over the last axis."""
    if objective.kd_loss == "fwd_kl":
        return kl(log_p, log_q)
    if objective.kd_loss == "bwd_kl":
        return kl(log_q, log_p)
    b = objective.jsd_beta
    log_m = jnp.logaddexp(jnp.log(b) + log_p, jnp.log1p(-b) + log_q)
    return b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m)


def kl(log_a: Float[Array, "*P K"], log_b: Float[Array, "*P K"]) -> Float[Array, "*P"]:
    """Returns KL(a | b) = sum_k a_k (log a_k - log b_k) in nats, where 0 log 0 = 0."""
    a = jnp.exp(log_a)
    return jnp.sum(a * jnp.where(a == 0, 0, log_a - log_b), axis=-1)
