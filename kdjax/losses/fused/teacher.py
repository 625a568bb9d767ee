"""The divergence of two models over their whole vocabulary, chunk by chunk of positions: neither has logits [B, T, V].

Both sides come as hidden states and unembedding. A chunk's logits of student and teacher exist together until the
student's gradients are computed, in the forward pass, as `linear.py` explains. With z the student's and t the teacher's
logits times their scales, s = logits_scale, q = softmax(z), p = softmax(t) and m = b p + (1 - b) q:

    fwd_kl  kd = sum_V p (log p - log q)                    dkd/dlogit = s (q - p)
    bwd_kl  kd = sum_V q (log q - log p)                    dkd/dlogit = s q (log q - log p - kd)
    jsd     kd = b KL(p | m) + (1 - b) KL(q | m)            dkd/dlogit = s (1 - b) q (log q - log m - KL(q | m))

These are derivatives of the whole sums, through q's normalisation: for a kd whose derivative by q_v is g_v it is
s q_v (g_v - sum_u q_u g_u). Lin, "Divergence measures based on the Shannon entropy" (1991), has
the last divergence; Gu et al., "MiniLLM" (arXiv:2306.08543), compare the first two.

A shard of the vocabulary holds the same token ids of both sides. What the shards exchange for a position is, in one
all-reduce, both log-sums with their maxima, the student's logits at the label and at the teacher's largest; and in a
second one the sums over the vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Losses
from kdjax.losses.fused.linear import Chunk, Gradients, add, dense_chunk_tokens, no_sums, scale_gradients, split
from kdjax.losses.objective import Objective, TeacherStates, TeacherSums, computation_dtype
from kdjax.losses.platform import zeros
from kdjax.losses.reference import ABSENT
from kdjax.losses.vocabulary import Vocabulary


class Call(NamedTuple):
    """Everything static in one call. Hashable."""

    objective: Objective
    vocabulary: Vocabulary


class Lesson(NamedTuple):
    """What a position learns from, beside the teacher's unembedding."""

    labels: Int[Array, "*P"]
    teacher_hidden: Float[Array, "*P E"]


class Evaluated(NamedTuple):
    """Both models' log-probabilities of this shard's columns, and the numbers of each position over all columns."""

    log_q: Float[Array, "C W"]
    log_p: Float[Array, "C W"]
    losses: Losses
    student_kl: Float[Array, "C"]  # the sum of q times the gradient of its divergence; 0 for fwd_kl
    agrees: Float[Array, "C"]
    teacher_entropy: Float[Array, "C"]


def linear_losses(
    objective: Objective,
    vocabulary: Vocabulary,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "W D"],
    teacher: TeacherStates,
    labels: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    chunk_tokens: int | None = None,
) -> TeacherSums:
    """Returns the sums over all positions, by `lax.scan` over chunks of at most `chunk_tokens` of them.

    The gradient needs, beside its results, about [W, D] and one chunk's logits [C, W] of both models in float32.
    """
    weight = loss_mask.astype(computation_dtype(hidden, unembed))
    positions = Chunk(hidden, weight, Lesson(labels, teacher.hidden))
    chunks = split(positions, dense_chunk_tokens() if chunk_tokens is None else chunk_tokens)
    call = Call(objective, vocabulary)
    return _sums(call, chunks.hidden, unembed, chunks.weight, chunks.supervision, teacher.unembed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    call: Call,
    hidden: Float[Array, "n C D"],
    unembed_WxD: Float[Array, "W D"],
    weight: Float[Array, "n C"],
    lesson: Lesson,
    teacher_WxE: Float[Array, "W E"],
) -> TeacherSums:
    """Returns the sums without gradients: one matmul for each model."""
    chunks = Chunk(hidden, weight, lesson)

    def evaluate(chunk: Chunk) -> TeacherSums:
        return _sums_of(chunk, _evaluate_chunk(call, chunk, unembed_WxD, teacher_WxE))

    start = no_sums(evaluate, chunks)
    return jax.lax.scan(lambda sums, chunk: (add(sums, evaluate(chunk)), None), start, chunks)[0]


def _sums_and_gradients(
    call: Call,
    hidden: Float[Array, "n C D"],
    unembed_WxD: Float[Array, "W D"],
    weight: Float[Array, "n C"],
    lesson: Lesson,
    teacher_WxE: Float[Array, "W E"],
) -> tuple[TeacherSums, Gradients]:
    """Returns the sums and both gradients of the loss sum: four matmuls, accumulated in the computation dtype."""
    chunks, dtype = Chunk(hidden, weight, lesson), weight.dtype

    def evaluate(chunk: Chunk) -> tuple[TeacherSums, Array, Array]:
        found = _evaluate_chunk(call, chunk, unembed_WxD, teacher_WxE)
        operand = jnp.result_type(chunk.hidden, unembed_WxD)
        logits_ct = _differentiate(call, chunk, found).astype(operand)
        hidden_ct = jnp.einsum("CW,WD->CD", logits_ct, unembed_WxD.astype(operand), preferred_element_type=dtype)
        unembed_ct = jnp.einsum("CW,CD->WD", logits_ct, chunk.operand(operand), preferred_element_type=dtype)
        return _sums_of(chunk, found), hidden_ct, unembed_ct

    def body(carry: tuple[TeacherSums, Array], chunk: Chunk) -> tuple[tuple[TeacherSums, Array], Float[Array, "C D"]]:
        sums, hidden_ct, unembed_ct = evaluate(chunk)
        return (add(carry[0], sums), carry[1] + unembed_ct), hidden_ct

    no_gradient = zeros(unembed_WxD.shape, dtype, chunks, unembed_WxD, teacher_WxE)
    start = no_sums(lambda chunk: evaluate(chunk)[0], chunks), no_gradient
    (sums, unembed_ct), hidden_ct = jax.lax.scan(body, start, chunks)
    return sums, Gradients(hidden_ct, unembed_ct, hidden[:0], unembed_WxD[:0])


def _scale_gradients(
    call: Call, gradients: Gradients, sums_ct: TeacherSums
) -> tuple[Float[Array, "n C D"], Float[Array, "W D"], None, None, None]:
    """Returns the gradients times the loss's cotangent; what the student learns from has none."""
    return *scale_gradients(call.vocabulary, gradients, sums_ct), None, None, None


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _evaluate_chunk(
    call: Call, chunk: Chunk, unembed_WxD: Float[Array, "W D"], teacher_WxE: Float[Array, "W E"]
) -> Evaluated:
    """Returns what a chunk of C positions amounts to, from its logits of both models."""
    objective, vocabulary, lesson = call.objective, call.vocabulary, chunk.supervision
    z_CxW = _logits(vocabulary, chunk, objective.logits_scale, chunk.hidden, unembed_WxD)
    t_CxW = _logits(vocabulary, chunk, objective.target_logits_scale, lesson.teacher_hidden, teacher_WxE)
    (z_max, z_log_sum), (t_max, t_log_sum) = _log_sum(z_CxW), _log_sum(t_CxW)
    z_top = jnp.take_along_axis(z_CxW, jnp.argmax(t_CxW, axis=-1, keepdims=True), axis=-1)[..., 0]
    z_label = _at(vocabulary, z_CxW, lesson.labels)
    if vocabulary.axis_names:
        parts = jnp.stack([z_max, z_log_sum, t_max, t_log_sum, z_top], axis=-1)
        joined = vocabulary.sum(jnp.concatenate([vocabulary.placed(parts), z_label[:, None]], axis=-1))
        z_label = joined[:, -1]
        maxima_z, sums_z, maxima_t, sums_t, tops = jnp.moveaxis(joined[:, :-1].reshape(len(joined), -1, 5), -1, 0)
        z_max, z_log_sum = _joined(maxima_z, sums_z)
        t_max, t_log_sum = _joined(maxima_t, sums_t)
        z_top = jnp.take_along_axis(tops, jnp.argmax(maxima_t, axis=-1, keepdims=True), axis=-1)[..., 0]
    log_q = z_CxW - z_max[:, None] - z_log_sum[:, None]
    log_p = t_CxW - t_max[:, None] - t_log_sum[:, None]

    sums = [-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), *_divergence_sums(objective, log_q, log_p)]
    entropy, *terms = jnp.moveaxis(vocabulary.sum(jnp.stack(sums, axis=-1)), -1, 0)
    if objective.kd_loss == "jsd":
        kd, student_kl = objective.jsd_beta * terms[0] + (1 - objective.jsd_beta) * terms[1], terms[1]
    else:
        kd = terms[0]
        student_kl = kd if objective.kd_loss == "bwd_kl" else jnp.zeros_like(kd)
    sft = jnp.zeros_like(kd)
    if objective.sft_loss_weight != 0:
        sft = jnp.where(vocabulary.holds(lesson.labels), z_log_sum - (z_label - z_max), jnp.nan)
    weighted = ((objective.kd_loss_weight, kd), (objective.sft_loss_weight, sft))
    loss = sum((w * term for w, term in weighted if w != 0), jnp.zeros_like(kd))
    return Evaluated(log_q, log_p, (loss, kd, sft), student_kl, (z_top >= z_max).astype(kd.dtype), entropy)


def _logits(
    vocabulary: Vocabulary, chunk: Chunk, scale: float, hidden: Float[Array, "C D"], unembed_WxD: Float[Array, "W D"]
) -> Float[Array, "C W"]:
    """Returns scaled logits in the computation dtype: all 0 at masked positions, `ABSENT` in padding columns."""
    operand = jnp.result_type(hidden, unembed_WxD)
    hidden_CxD = chunk._replace(hidden=hidden).operand(operand)
    logits = jnp.einsum("CD,WD->CW", hidden_CxD, unembed_WxD.astype(operand), preferred_element_type=chunk.dtype)
    n_valid = vocabulary.n_valid(logits.shape[-1])
    return (
        scale * logits if n_valid is None else jnp.where(jnp.arange(logits.shape[-1]) < n_valid, scale * logits, ABSENT)
    )


def _log_sum(x_CxW: Float[Array, "C W"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Returns the maximum of each row, and log sum exp(x - maximum)."""
    largest = x_CxW.max(axis=-1)
    return largest, jnp.log(jnp.exp(x_CxW - largest[:, None]).sum(axis=-1))


def _joined(maxima: Float[Array, "C S"], log_sums: Float[Array, "C S"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Returns the same of all shards' columns together."""
    largest = maxima.max(axis=-1)
    return largest, jax.nn.logsumexp(log_sums + maxima - largest[:, None], axis=-1)


def _at(vocabulary: Vocabulary, x_CxW: Float[Array, "C W"], ids: Int[Array, "C"]) -> Float[Array, "C"]:
    """Returns x at these token ids, 0 for those on other shards."""
    columns, width = vocabulary.columns(ids, x_CxW.shape[-1]), x_CxW.shape[-1]
    found = jnp.take_along_axis(x_CxW, jnp.minimum(columns, width - 1)[:, None], axis=-1)[:, 0]
    return jnp.where(columns < width, found, 0)


def _divergence_sums(
    objective: Objective, log_q: Float[Array, "C W"], log_p: Float[Array, "C W"]
) -> list[Float[Array, "C"]]:
    """Returns this shard's part of the divergence; for jsd of KL(p | m) and of KL(q | m)."""
    if objective.kd_loss == "fwd_kl":
        return [jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)]
    if objective.kd_loss == "bwd_kl":
        return [jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)]
    log_m = _log_mixture(objective, log_q, log_p)
    return [jnp.sum(jnp.exp(log_a) * (log_a - log_m), axis=-1) for log_a in (log_p, log_q)]


def _log_mixture(objective: Objective, log_q: Float[Array, "C W"], log_p: Float[Array, "C W"]) -> Float[Array, "C W"]:
    b = objective.jsd_beta
    return jnp.logaddexp(jnp.log(b) + log_p, jnp.log1p(-b) + log_q)


def _differentiate(call: Call, chunk: Chunk, found: Evaluated) -> Float[Array, "C W"]:
    """Returns the weighted losses' derivatives by this shard's columns of the student's unscaled logits."""
    objective, log_q, log_p = call.objective, found.log_q, found.log_p
    q, kl_Cx1 = jnp.exp(log_q), found.student_kl[:, None]
    if objective.kd_loss == "fwd_kl":
        kd_ct = q - jnp.exp(log_p)
    elif objective.kd_loss == "bwd_kl":
        kd_ct = q * (log_q - log_p - kl_Cx1)
    else:
        kd_ct = (1 - objective.jsd_beta) * q * (log_q - _log_mixture(objective, log_q, log_p) - kl_Cx1)
    logits_ct = objective.kd_loss_weight * kd_ct
    if objective.sft_loss_weight != 0:
        columns = call.vocabulary.columns(chunk.supervision.labels, q.shape[-1])
        sft_ct = q - (jnp.arange(q.shape[-1]) == columns[:, None])
        sft_ct = objective.sft_loss_weight * sft_ct
        logits_ct = sft_ct if objective.kd_loss_weight == 0 else logits_ct + sft_ct
    return jnp.where(chunk.masked[:, None], 0, objective.logits_scale * chunk.weight[:, None] * logits_ct)


def _sums_of(chunk: Chunk, found: Evaluated) -> TeacherSums:
    terms = TeacherSums(*found.losses, jnp.ones_like(chunk.weight), found.agrees, found.teacher_entropy)
    return chunk.sums(terms)
