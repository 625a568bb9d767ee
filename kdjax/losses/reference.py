"""The specification: the losses as algebra over whole logits, differentiated by JAX.

Every faster implementation is tested against this one.

At each position, with student logits z [V], teacher entries (i_k, tau_k) for k = 1..K, and label y:

    s_k = logits_scale z[i_k]              log q = log-softmax of s over K
    t_k = target_logits_scale tau_k        log p = log-softmax of t over K

    fwd_kl:  kd = sum_k p_k (log p_k - log q_k)
    bwd_kl:  kd = sum_k q_k (log q_k - log p_k)
    jsd:     kd = b KL(p | m) + (1 - b) KL(q | m),   m = b p + (1 - b) q,   b = jsd_beta

Otherwise the probabilities are those over the whole vocabulary: T_k = exp(tau_k - logsumexp of the teacher), and the
student's P = softmax_V(logits_scale z). With tail = "ghost" they are the p and q above, with one more bucket:

    p_tail = 1 - sum_k T_k                 q_tail = sum of P over the ids that are not taught

The last two are learned by the forward KL only; w_k is the weight that an entry carries:

    tail = "label":       kd = - sum_k T_k log P[i_k] - max(0, 1 - sum_k T_k) log P[y]
    targets = "sampled":  kd = sum_k w_k (log T_k - log P[i_k])

The whole loss:

    sft  = logsumexp_V(logits_scale z) - logits_scale z[y]
    loss = kd_loss_weight kd + sft_loss_weight sft

A teacher that runs beside the student (`teacher_losses`) has the same three divergences with the sums over all of V.

`logits_scale` scales both terms and there is no T^2 factor, as in NeMo-Aligner's
`GPTKnowledgeDistillationModel`.

The label's tail is the "naive fix", and the sampled targets are the random sampling, of Anshumann et al., "Sparse Logit
Sampling", ACL 2025. With N ids drawn from the teacher's softmax, id i_k n_k times, w_k = n_k / N makes loss and
gradient unbiased estimates of those of KL(teacher | student) over the whole vocabulary. So do exact top ids, of mass M,
with w_k = T_k, beside N ids drawn from the rest of the softmax with w_k = (1 - M) n_k / N.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.objective import LossSums, Objective, Supervision, TeacherStates, TeacherSums, computation_dtype

# Log-probability of an absent entry, in both distributions: its probability exp(-1e30) is 0 and, unlike -inf, it can be
# subtracted from itself.
ABSENT = -1e30

# The largest log-mass of the teacher's top-k; 2^-23 is float32's epsilon. Where the logsumexp over K, rounded, is that
# over V or more, the rest would be log(0) or the log of a negative number.
MAX_LOG_MASS = -(2.0**-23)


def token_losses(
    objective: Objective, student_logits: Float[Array, "B T V"], supervision: Supervision
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns (loss, kd, sft) of each position in nats, in float32 (float64 for float64 logits)."""
    dtype = computation_dtype(student_logits)
    z_BxTxV = objective.logits_scale * student_logits.astype(dtype)
    kd = kd_term(objective, z_BxTxV, supervision)
    if objective.sft_loss_weight == 0:  # as in NeMo-Aligner: a term that is not asked for reports 0
        return objective.kd_loss_weight * kd, kd, jnp.zeros_like(kd)
    sft = jax.nn.logsumexp(z_BxTxV, axis=-1) - logits_at(z_BxTxV, supervision.labels[..., None])[..., 0]
    if objective.kd_loss_weight == 0:  # and stays out of the loss, whatever its value
        return objective.sft_loss_weight * sft, kd, sft
    return objective.kd_loss_weight * kd + objective.sft_loss_weight * sft, kd, sft


def kd_term(objective: Objective, z_V: Float[Array, "*P V"], supervision: Supervision) -> Float[Array, "*P"]:
    """Returns the distillation term of each position in nats, from scaled logits of the student."""
    t_K, ids_K = supervision.topk_logits.astype(z_V.dtype), supervision.topk_token_ids
    if objective.rank_match:
        t_K, ids_K = jnp.sort(t_K, axis=-1, descending=True), jax.lax.top_k(z_V, t_K.shape[-1])[1]
    present_K = t_K != -jnp.inf
    s_K = jnp.where(present_K, logits_at(z_V, ids_K), -jnp.inf)
    if not objective.needs_teacher_log_sum:
        log_p = jnp.where(present_K, jax.nn.log_softmax(objective.target_logits_scale * t_K), ABSENT)
        log_q = jnp.where(present_K, jax.nn.log_softmax(s_K), ABSENT)
        return divergence(log_p, log_q, objective)

    assert supervision.log_sum_exp_logits is not None
    log_z = jax.nn.logsumexp(z_V, axis=-1)
    log_t = jnp.where(present_K, t_K - supervision.log_sum_exp_logits.astype(z_V.dtype)[..., None], ABSENT)
    log_p = jnp.where(present_K, s_K - log_z[..., None], ABSENT)
    if objective.ghost:
        tail_logits_V = jnp.where(is_taught(ids_K, present_K, z_V.shape[-1]), -jnp.inf, z_V)
        has_tail = tail_logits_V.max(axis=-1, keepdims=True) != -jnp.inf  # it has none where K = V
        tail_logits_V = jnp.where(has_tail, tail_logits_V, 0)  # for a derivative that is not NaN
        log_p_tail = jax.nn.logsumexp(tail_logits_V, axis=-1, keepdims=True) - log_z[..., None]
        log_t, log_p = (
            jnp.concatenate([log_K, jnp.where(has_tail, log_tail, ABSENT)], axis=-1)
            for log_K, log_tail in ((log_t, log_rest(log_t)), (log_p, log_p_tail))
        )
        return divergence(log_t, log_p, objective)
    if objective.sampled:
        assert supervision.topk_weights is not None
        weight_K = jnp.where(present_K, supervision.topk_weights.astype(z_V.dtype), 0)
        return jnp.sum(times(weight_K, log_t - log_p), axis=-1)
    t_K = jnp.exp(log_t)
    log_p_label = logits_at(z_V, supervision.labels[..., None])[..., 0] - log_z
    return -jnp.sum(times(t_K, log_p), axis=-1) - times(jnp.maximum(0, 1 - t_K.sum(axis=-1)), log_p_label)


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


def teacher_losses(
    objective: Objective,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    teacher: TeacherStates,
    labels: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
) -> TeacherSums:
    """Returns the sums of `kdjax.losses.teacher_losses`, computed from all logits of both models at once."""
    dtype = computation_dtype(hidden, unembed)
    weight = loss_mask.astype(dtype)

    def scaled(scale: float, hidden: Float[Array, "B T D"], unembed: Float[Array, "V D"]) -> Float[Array, "B T V"]:
        read = jnp.where(weight[..., None] == 0, 0, hidden)  # a masked position may hold anything
        return scale * jnp.einsum("BTD,VD->BTV", read, unembed, preferred_element_type=dtype)

    z_BxTxV = scaled(objective.logits_scale, hidden, unembed)
    t_BxTxV = jax.lax.stop_gradient(scaled(objective.target_logits_scale, *teacher))
    log_q, log_p = jax.nn.log_softmax(z_BxTxV), jax.nn.log_softmax(t_BxTxV)
    kd = divergence(log_p, log_q, objective)
    sft = jnp.zeros_like(kd)
    if objective.sft_loss_weight != 0:
        sft = -logits_at(log_q, labels[..., None])[..., 0]
    weighted = ((objective.kd_loss_weight, kd), (objective.sft_loss_weight, sft))
    loss = sum((w * term for w, term in weighted if w != 0), jnp.zeros_like(kd))
    z_top = jnp.take_along_axis(z_BxTxV, jnp.argmax(t_BxTxV, axis=-1, keepdims=True), axis=-1)[..., 0]
    agrees = jnp.where(z_top >= z_BxTxV.max(axis=-1), 1.0, 0.0)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    kd, sft = jax.lax.stop_gradient((kd, sft))
    terms = TeacherSums(loss, kd, sft, jnp.ones_like(loss), agrees, entropy)
    return jax.tree.map(lambda term: jnp.where(weight == 0, 0, weight * term).sum(), terms)


def logits_at(logits_V: Float[Array, "*P V"], ids_K: Int[Array, "*P K"]) -> Float[Array, "*P K"]:
    """Returns the logits at these ids; NaN at ids outside [0, V), which must not pick another token's logit."""
    v = logits_V.shape[-1]
    picked = jnp.take_along_axis(logits_V, jnp.clip(ids_K, 0, v - 1), axis=-1)
    return jnp.where((ids_K >= 0) & (ids_K < v), picked, jnp.nan)


def is_taught(ids_K: Int[Array, "*P K"], present_K: Bool[Array, "*P K"], v: int) -> Bool[Array, "*P V"]:
    """Returns for each of the v token ids whether it is one of the present entries."""
    return ((ids_K[..., None] == jnp.arange(v)) & present_K[..., None]).any(axis=-2)


def log_rest(log_prob_K: Float[Array, "*P K"]) -> Float[Array, "*P 1"]:
    """Returns log(1 - the mass of the K probabilities); that mass is clamped to about 1 - 2^-23 (`MAX_LOG_MASS`)."""
    log_mass = jax.nn.logsumexp(log_prob_K, axis=-1, keepdims=True)
    return jax.nn.log1mexp(-jnp.minimum(log_mass, MAX_LOG_MASS))


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
    """Returns KL(a | b) = sum_k a_k (log a_k - log b_k) in nats."""
    return jnp.sum(times(jnp.exp(log_a), log_a - log_b), axis=-1)


def times(a: Float[Array, "*P"], b: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """Returns a * b, and 0 where a is 0, whatever b is: 0 log 0 = 0."""
    return a * jnp.where(a == 0, 0, b)
