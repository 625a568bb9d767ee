"""The public losses, and the check of everything that goes into them.

`implementation` names one of the following. None lets `dispatch.py` choose by platform and settings and logs the choice
once; an explicit choice is never replaced by another.

- "reference": the specification as algebra (`reference.py`), differentiated by JAX. Never chosen.
- "xla": derivatives by hand in plain JAX (`rows/xla.py`), for any platform and dtype. Chosen where no other is.
- "pallas": the same as one GPU kernel per direction (`rows/pallas.py`, Pallas lowered through Triton). Chosen on NVIDIA
  GPUs for losses that depend on the logsumexp over the vocabulary, on one device or inside `jax.shard_map`: under plain
  `jit` XLA would gather sharded logits.
- "triton": the same kernels through jax-triton (`rows/triton.py`, extra "triton"). Never chosen: Pallas needs no extra.
- "gathered": K rows of the unembedding instead of V (`fused/gathered.py`), `linear_topk_kd_loss` only. Chosen where the
  loss depends on the K taught logits alone (sft_loss_weight = 0, tail = "renormalize", targets = "topk", matching by
  id) and K / V is small enough (`dispatch.GATHER_BELOW`).
- "pallas_interpret": the arithmetic of the Pallas kernels on any platform, slowly. Never chosen: it is for tests.

`tail` says what becomes of the probability outside the top-k:

- "renormalize": it is dropped, and both distributions sum to 1 over the K entries, as in NeMo-Aligner.
- "ghost": it is one more bucket in both. The teacher's has what `log_sum_exp_logits` leaves to it, at least 2^-23
  (`reference.MAX_LOG_MASS`), the student's that of all ids that are not taught, summed exactly however small it is.
  Where every id is taught there is no such bucket.
- "label": what the teacher's probabilities of the K ids leave over goes to the label, and kd is the student's
  cross-entropy with all of these. A position without any entry learns its label. For kd_loss = "fwd_kl" only.

`targets` = "sampled" says that the entries were drawn at random and carry `topk_weights`, 0 where an entry is absent.
For N draws from the teacher these are n / N at an id that was drawn n times; for exact top entries beside draws from
the rest, their probabilities, and (1 - the sum of these) n / N at the draws. Then kd is the sum of weight * (log of the
teacher's probability - log of the student's): an unbiased estimate, in value and gradient, of the forward KL over the
whole vocabulary, which may be negative at a position. For kd_loss = "fwd_kl" only; tail stays "renormalize" and is not
read.

`axis_name` names the mesh axes, major to minor, over which the vocabulary (the columns of the logits, the rows of the
unembedding) is sharded, inside `jax.shard_map`. All other arguments are the same on all shards, and so are the results.
One all-reduce of K + 1 + 2 shards numbers per position joins the shards (under rank matching after one of K per
shard); another one in the backward pass of `linear_topk_kd_loss` sums the gradient of the hidden states. Under
`shard_map(..., check_vma=False)` differentiate inside of it.

`vocab_size` is the true V, over all shards together, if the vocabulary is padded: columns from V on stay out of the
loss and have gradient 0. None: there is no padding.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses import reference
from kdjax.losses.dispatch import TEACHER_IMPLEMENTATIONS, LossCall, choose_linear, choose_logits
from kdjax.losses.fused import linear
from kdjax.losses.fused import teacher as teacher_path
from kdjax.losses.objective import (
    LossSums,
    Objective,
    Supervision,
    TeacherStates,
    TeacherSums,
    check_ids,
    check_linear,
    check_logits,
    check_supervision,
    check_teacher,
    computation_dtype,
    supervise,
)
from kdjax.losses.token_losses import token_losses
from kdjax.losses.vocabulary import Vocabulary
from kdjax.types import UserError

__all__ = ["linear_losses", "linear_topk_kd_loss", "teacher_losses", "topk_kd_loss"]


def topk_kd_loss(
    student_logits: Float[Array, "B T V"],
    topk_logits: Float[Array, "B T K"],
    topk_token_ids: Int[Array, "B T K"],
    labels: Int[Array, "B T"],
    *,
    kd_loss: str = "fwd_kl",
    kd_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    logits_scale: float = 1.0,
    target_logits_scale: float = 1.0,
    cross_tokenizer: str | bool | None = None,
    tail: str = "renormalize",
    log_sum_exp_logits: Float[Array, "B T"] | None = None,
    jsd_beta: float = 0.5,
    targets: str = "topk",
    topk_weights: Float[Array, "B T K"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    vocab_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the distillation loss of each position against the teacher's cached top-k, and its two terms.

    The loss is computed in float32 whatever the logits' dtype (in float64 for float64), and differentiable by
    `student_logits` through any of the three results. Mask positions with `jnp.where(mask, loss, 0)`: a masked position
    then has a gradient of exactly 0 even if it holds NaN or ids out of range (except with "reference").

    Args:
      student_logits: [B, T, V], float32, bfloat16 or float16; with `axis_name`, this shard's columns.
      topk_logits: the teacher's values, in any order and with any shift. -inf marks an absent entry, which is ignored;
        a position whose entries are all absent has a kd of 0.
      topk_token_ids: the ids of `topk_logits`. An id outside [0, V), which includes negative ids, makes the position's
        kd NaN, and raises an error that names it under `jax.experimental.checkify` (errors=user_checks). An id that
        occurs twice at a position counts twice.
      labels: the ids of the next tokens; one outside [0, V) makes the position's sft NaN. Read if `sft_loss_weight` is
        not 0 or if tail="label", where it makes the kd NaN too.
      kd_loss: "fwd_kl" KL(teacher | student), "bwd_kl" KL(student | teacher), or "jsd", the Jensen-Shannon
        divergence generalised by `jsd_beta`.
      kd_loss_weight, sft_loss_weight: static numbers, 0 or more. A term of weight 0 stays out of the loss; if
        `sft_loss_weight` is 0, the sft result is 0, as in NeMo-Aligner, and costs no pass over the vocabulary.
      logits_scale: multiplies the student's logits in both terms (1 / temperature).
      target_logits_scale: multiplies the teacher's.
      cross_tokenizer: "rank_match" (or True) compares the student's own K largest logits, sorted, with the teacher's
        values, sorted, and ignores the teacher's ids. None (or False) compares by id.
      tail: "renormalize", "ghost" or "label": what becomes of the mass outside the top-k; see `kdjax.losses.api`.
      log_sum_exp_logits: [B, T], the teacher's logsumexp over its whole vocabulary, with the same shift as
        `topk_logits`. Read by tail="ghost", tail="label" and targets="sampled".
      jsd_beta: the weight of the teacher in jsd's mixture, between 0 and 1, both excluded.
      targets: "topk", or "sampled" if the entries were drawn at random; see `kdjax.losses.api`.
      topk_weights: [B, T, K], the share of the target that each entry carries; for targets="sampled" only.
      axis_name, vocab_size, implementation: see `kdjax.losses.api`.

    Returns:
      loss = kd_loss_weight * kd + sft_loss_weight * sft, kd, and sft, each [B, T] in nats.

    Raises:
      UserError: a setting or an array cannot work; the message says why and what would.
    """
    weights, scales = (kd_loss_weight, sft_loss_weight), (logits_scale, target_logits_scale)
    objective = Objective(kd_loss, *weights, *scales, cross_tokenizer, tail, jsd_beta, targets)
    objective.check()
    student_logits = jnp.asarray(student_logits)
    check_logits(student_logits)
    supervision = Supervision(topk_logits, topk_token_ids, labels, log_sum_exp_logits, topk_weights)
    supervision = supervise(objective, supervision)
    vocabulary = _vocabulary(axis_name, vocab_size, student_logits.shape[2])
    check_supervision(objective, supervision, student_logits.shape[:2], vocabulary.size)
    check_ids(objective, supervision, vocabulary.size)
    chosen = choose_logits(implementation, objective, student_logits.dtype)
    if chosen == "reference":
        _check_whole(vocabulary)
        return reference.token_losses(objective, student_logits[..., : vocabulary.size], supervision)
    return token_losses(LossCall(objective, vocabulary, chosen), student_logits, supervision)


def linear_topk_kd_loss(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    topk_logits: Float[Array, "B T K"],
    topk_token_ids: Int[Array, "B T K"],
    labels: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    *,
    kd_loss: str = "fwd_kl",
    kd_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    logits_scale: float = 1.0,
    target_logits_scale: float = 1.0,
    cross_tokenizer: str | bool | None = None,
    tail: str = "renormalize",
    log_sum_exp_logits: Float[Array, "B T"] | None = None,
    jsd_beta: float = 0.5,
    targets: str = "topk",
    topk_weights: Float[Array, "B T K"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    implementation: str | None = None,
) -> LossSums:
    """Returns the sums over positions of `topk_kd_loss` of the logits hidden @ unembed.T, without holding [B, T, V].

    The matmuls multiply in the wider of the arguments' dtypes and accumulate in float32 (float64 for float64);
    gradients come back in the arguments' own dtypes, rounded once. Differentiable by `hidden` and `unembed`, through
    `.loss` only: the gradients are computed along with the losses, in three matmuls; the losses alone take one.

    Args:
      hidden: [B, T, D], the student's last hidden states, after the final norm.
      unembed: [V, D], one row per token (the layout of a tied embedding); with `axis_name`, this shard's rows.
      loss_mask: [B, T], the weight of each position in the sums; a position of weight 0 may hold anything.
      chunk_tokens: the number of positions whose logits (or gathered rows) exist at once; None: chosen by platform.
      The other arguments are those of `topk_kd_loss`.

    Returns:
      `LossSums`, scalars in float32.

    Raises:
      UserError: a setting or an array cannot work; the message says why and what would.
    """
    weights, scales = (kd_loss_weight, sft_loss_weight), (logits_scale, target_logits_scale)
    objective = Objective(kd_loss, *weights, *scales, cross_tokenizer, tail, jsd_beta, targets)
    return linear_losses(
        objective,
        hidden,
        unembed,
        Supervision(topk_logits, topk_token_ids, labels, log_sum_exp_logits, topk_weights),
        loss_mask,
        axis_name=axis_name,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        implementation=implementation,
    )


def linear_losses(
    objective: Objective,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    supervision: Supervision,
    loss_mask: Float[Array, "B T"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    implementation: str | None = None,
) -> LossSums:
    """Returns `linear_topk_kd_loss` with its settings as an `Objective` and the arrays to learn from as one tuple."""
    objective.check()
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UserError(
            f"chunk_tokens = {chunk_tokens!r} would hold no position; give 1 or more, or None to choose by platform"
        )
    hidden, unembed, loss_mask = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(loss_mask)
    check_linear(hidden, unembed, loss_mask)
    supervision = supervise(objective, supervision)
    vocabulary = _vocabulary(axis_name, vocab_size, unembed.shape[0])
    check_supervision(objective, supervision, hidden.shape[:2], vocabulary.size)
    check_ids(objective, supervision, vocabulary.size, loss_mask)
    k, dtype = supervision.topk_logits.shape[-1], computation_dtype(hidden, unembed)
    chosen = choose_linear(implementation, objective, k, unembed.shape[0], dtype)
    if chosen == "reference":
        _check_whole(vocabulary)
        return reference.linear_losses(objective, hidden, unembed[: vocabulary.size], supervision, loss_mask)
    call = LossCall(objective, vocabulary, chosen)
    return linear.linear_losses(call, hidden, unembed, supervision, loss_mask, chunk_tokens)


def teacher_losses(
    objective: Objective,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    teacher: TeacherStates,
    labels: Int[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    implementation: str | None = None,
) -> TeacherSums:
    """Returns the losses against a teacher's whole distribution, without holding either model's logits [B, T, V].

    The divergence `objective.kd_loss` is summed over all token ids; `fused/teacher.py` has the formulae. Differentiable
    by `hidden` and `unembed`, through `.loss` only. The arguments are those of `linear_topk_kd_loss`; `teacher` has
    hidden states [B, T, E] and as many rows of an unembedding [V, E] as the student, for the same token ids.

    Returns:
      `TeacherSums`, scalars in float32.

    Raises:
      UserError: a setting or an array cannot work; the message says why and what would.
    """
    objective.check()
    objective.check_whole()
    if implementation not in TEACHER_IMPLEMENTATIONS:
        raise UserError(
            f"implementation = {implementation!r} works on cached entries; with a teacher beside the student choose one"
            f" of {', '.join(map(repr, TEACHER_IMPLEMENTATIONS))}"
        )
    hidden, unembed, loss_mask = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(loss_mask)
    labels, teacher = jnp.asarray(labels).astype(jnp.int32), TeacherStates(*map(jnp.asarray, teacher))
    check_linear(hidden, unembed, loss_mask)
    check_teacher(teacher, unembed, labels, loss_mask)
    vocabulary = _vocabulary(axis_name, vocab_size, unembed.shape[0])
    if implementation == "reference":
        _check_whole(vocabulary)
        teacher = teacher._replace(unembed=teacher.unembed[: vocabulary.size])
        return reference.teacher_losses(objective, hidden, unembed[: vocabulary.size], teacher, labels, loss_mask)
    return teacher_path.linear_losses(objective, vocabulary, hidden, unembed, teacher, labels, loss_mask, chunk_tokens)


def _vocabulary(axis_name: str | tuple[str, ...] | None, vocab_size: int | None, width: int) -> Vocabulary:
    """Returns the vocabulary that has `width` columns here. Raises UserError if there can be no such vocabulary."""
    axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    try:
        padded = width * Vocabulary(width, axis_names).shards
    except NameError:
        raise UserError(
            f"axis_name = {axis_name!r} is not a mesh axis here; call the loss inside jax.shard_map over a mesh that"
            " has this axis, or give axis_name = None for the whole vocabulary"
        ) from None
    if vocab_size is None:
        return Vocabulary(padded, axis_names)
    if not isinstance(vocab_size, int) or not 1 <= vocab_size <= padded:
        raise UserError(
            f"vocab_size = {vocab_size!r} is not between 1 and the number of columns, {padded} ({width} per shard);"
            " give the number of token ids, or None if no column is padding"
        )
    return Vocabulary(vocab_size, axis_names)


def _check_whole(vocabulary: Vocabulary) -> None:
    """Raises UserError if the vocabulary is sharded."""
    if vocabulary.axis_names:
        raise UserError(
            f"implementation = 'reference' needs the whole vocabulary, not shards over {vocabulary.axis_names};"
            " choose 'xla' or gather the logits and give axis_name = None"
        )
