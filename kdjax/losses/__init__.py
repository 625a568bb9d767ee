"""The distillation losses, and the choice of who computes them.

`reference.py` is the specification, as algebra; `xla.py` and `linear.py` compute the same with derivatives
written by hand.
"""

import functools
import logging

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses import linear, reference, xla
from kdjax.losses.objective import (
    LossSums,
    Objective,
    check_linear,
    check_logits,
    check_supervision,
    supervise,
)
from kdjax.types import UserError

__all__ = ["LossSums", "linear_topk_kd_loss", "topk_kd_loss"]

IMPLEMENTATIONS = ("reference", "xla")


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
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """The distillation loss of each position against the teacher's cached top-k, and its two terms.

    Computed in float32 whatever the logits' dtype (float64 for float64). Differentiable in `student_logits`
    through any of the three results. Mask positions with `jnp.where(mask, loss, 0)`: a masked position then
    has a gradient of exactly 0 even where it holds NaN or ids out of range (not so with "reference").

    Args:
      student_logits: [B, T, V], float32, bfloat16 or float16, over the true vocabulary.
      topk_logits: the teacher's values, in any order and with any shift; -inf marks an absent entry, which
        takes part in nothing. A position where all are absent has a kd of 0.
      topk_token_ids: their ids. One outside [0, V), negative ones too, makes the position's kd NaN. Ids that
        occur twice in a row count twice.
      labels: ids of the next tokens; one outside [0, V) makes the position's sft NaN. Not read when
        `sft_loss_weight` is 0.
      kd_loss: "fwd_kl" KL(teacher | student), "bwd_kl" KL(student | teacher), or "jsd", the Jensen-Shannon
        divergence generalised by `jsd_beta`.
      kd_loss_weight, sft_loss_weight: static numbers, 0 or more. A term of weight 0 stays out of the loss;
        with `sft_loss_weight` = 0 the sft result is 0, as in NeMo-Aligner, and no pass over the vocabulary is
        made for it.
      logits_scale: multiplies the student's logits in both terms (1 / temperature).
      target_logits_scale: multiplies the teacher's.
      cross_tokenizer: "rank_match" (or True) compares the student's own K largest logits, sorted, with the
        teacher's values, sorted, and ignores the teacher's ids. None or False: compare by id.
      tail: what becomes of the mass outside the top-k. "renormalize": dropped, both distributions sum to 1
        over the K entries. "ghost": one more bucket on either side, whose mass is what `log_sum_exp_logits` and
        the student's own logsumexp leave over; K = V leaves it almost nothing (`reference.MAX_LOG_MASS`).
      log_sum_exp_logits: [B, T], the teacher's logsumexp over its whole vocabulary, under the same shift as
        `topk_logits`. Read by tail="ghost" only.
      jsd_beta: weight of the teacher in jsd's mixture, between 0 and 1.
      axis_name: mesh axes over which V is sharded. Not available yet: None.
      implementation: "reference" | "xla"; None chooses and logs the choice once.

    Returns:
      loss = kd_loss_weight * kd + sft_loss_weight * sft, kd, and sft, each [B, T] in nats.

    Raises:
      UserError: a setting or an array that cannot work, with the remedy.
    """
    objective = Objective(
        kd_loss=kd_loss,
        kd_loss_weight=kd_loss_weight,
        sft_loss_weight=sft_loss_weight,
        logits_scale=logits_scale,
        target_logits_scale=target_logits_scale,
        cross_tokenizer=cross_tokenizer,
        tail=tail,
        jsd_beta=jsd_beta,
    )
    objective.check()
    if axis_name is not None:
        raise UserError(
            f"axis_name = {axis_name!r}: logits sharded over the vocabulary are not available yet;"
            " gather them and give axis_name = None"
        )
    chosen = _choose("topk_kd_loss", implementation)
    student_logits = jnp.asarray(student_logits)
    check_logits(student_logits)
    supervision = supervise(objective, topk_logits, topk_token_ids, labels, log_sum_exp_logits)
    check_supervision(objective, supervision, student_logits.shape[:2], student_logits.shape[2])
    losses = reference.token_losses if chosen == "reference" else xla.token_losses
    return losses(objective, student_logits, supervision)


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
    chunk_tokens: int | None = None,
    implementation: str | None = None,
) -> LossSums:
    """`topk_kd_loss` of the logits hidden @ unembed.T, summed over positions, without holding [B, T, V].

    The matmuls multiply in the wider of the arguments' dtypes and accumulate in float32; gradients come back
    in the arguments' own dtypes, rounded once. Differentiable in `hidden` and `unembed`, through `.loss` only:
    the gradients are made along with the losses, in three matmuls; without differentiation there is one.

    Args:
      hidden: [B, T, D], the student's last hidden states, after the final norm.
      unembed: [V, D], one row a token (the layout of a tied embedding), true vocabulary.
      loss_mask: [B, T], the weight of each position in the sums; a position of weight 0 may hold anything.
      chunk_tokens: positions whose logits exist at once; None: 128 on a CPU, 2048 elsewhere.
      implementation: "reference" holds all logits and is differentiated by JAX; "xla" is the above. None
        chooses and logs the choice once.
      The other arguments are those of `topk_kd_loss`.

    Returns:
      `LossSums`, scalars in float32.

    Raises:
      UserError: a setting or an array that cannot work, with the remedy.
    """
    objective = Objective(
        kd_loss=kd_loss,
        kd_loss_weight=kd_loss_weight,
        sft_loss_weight=sft_loss_weight,
        logits_scale=logits_scale,
        target_logits_scale=target_logits_scale,
        cross_tokenizer=cross_tokenizer,
        tail=tail,
        jsd_beta=jsd_beta,
    )
    objective.check()
    if chunk_tokens is not None and chunk_tokens < 1:
        raise UserError(f"chunk_tokens = {chunk_tokens!r} holds no position; give 1 or more, or None to choose")
    chosen = _choose("linear_topk_kd_loss", implementation)
    hidden, unembed, loss_mask = jnp.asarray(hidden), jnp.asarray(unembed), jnp.asarray(loss_mask)
    check_linear(hidden, unembed, loss_mask)
    supervision = supervise(objective, topk_logits, topk_token_ids, labels, log_sum_exp_logits)
    check_supervision(objective, supervision, hidden.shape[:2], unembed.shape[0])
    if chosen == "reference":
        return reference.linear_losses(objective, hidden, unembed, supervision, loss_mask)
    return linear.linear_losses(objective, hidden, unembed, supervision, loss_mask, chunk_tokens)


def _choose(operation: str, implementation: str | None) -> str:
    if implementation is None:
        _log_choice(operation, "xla")
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"implementation = {implementation!r} is not available; choose one of"
            f" {', '.join(map(repr, IMPLEMENTATIONS))}, or None to let {operation} choose"
        )
    return implementation


@functools.cache
def _log_choice(operation: str, chosen: str) -> None:
    logging.getLogger("kdjax").info("%s: implementation %r chosen", operation, chosen)
