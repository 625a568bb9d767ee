"""The losses and gradients of a chunk of C positions from its logits, which exist until the gradients are computed."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.closed_form import Losses, Picked, evaluate
from kdjax.losses.dispatch import LossCall
from kdjax.losses.objective import Objective, Supervision, computation_dtype
from kdjax.losses.rows import Exponentials, Rows
from kdjax.losses.vocabulary import join, taught_rows


class Residuals(NamedTuple):
    """What the gradients of a chunk are computed from, beside its arguments."""

    rows: Rows
    picked: Picked
    exponentials: Exponentials | None


def evaluate_chunk(
    call: LossCall, hidden_CxD: Float[Array, "C D"], unembed_WxD: Float[Array, "W D"], supervision: Supervision
) -> tuple[Losses, tuple[Float[Array, "C"], Float[Array, "C"]], Residuals]:
    """Returns the losses of each position, its top-1 agreement and student mass on the top-k, and the residuals."""
    objective, vocabulary = call.objective, call.vocabulary
    dtype = computation_dtype(hidden_CxD)
    logits_CxW = jnp.einsum("CD,WD->CW", hidden_CxD, unembed_WxD, preferred_element_type=dtype)
    rows = taught_rows(objective, vocabulary, logits_CxW, supervision)
    for_kd = supervision if call.kd_in_sweep else None
    swept = call.kernels.sweep(objective, rows, log_sum=True, supervision=for_kd, store=True)
    picked = join(objective, vocabulary, swept.picked, rows, supervision)
    losses = evaluate(objective, picked, supervision, swept.kd)
    rows = rows if swept.without_entries is None else rows._replace(logits=swept.without_entries)
    return losses, _agreement(objective, picked, supervision), Residuals(rows, picked, swept.exponentials)


def differentiate_chunk(
    call: LossCall,
    hidden_CxD: Float[Array, "C D"],
    unembed_WxD: Float[Array, "W D"],
    supervision: Supervision,
    residuals: Residuals,
    loss_ct: Float[Array, "C"],
    unembed_ct: Float[Array, "W D"],
) -> tuple[Float[Array, "C D"], Float[Array, "W D"]]:
    """Returns this shard's part of the hidden states' gradient, and `unembed_ct` plus the unembedding's gradient.

    Both are gradients of the chunk's losses weighted by `loss_ct`, in its dtype.
    """
    objective = call.objective
    logits_ct = call.kernels.spread(
        objective,
        residuals.rows,
        residuals.picked,
        supervision,
        objective.kd_loss_weight * loss_ct,
        objective.sft_loss_weight * loss_ct,
        dtype=unembed_WxD.dtype,
        exponentials=residuals.exponentials,
    )
    dtype = loss_ct.dtype
    hidden_ct = jnp.einsum("CW,WD->CD", logits_ct, unembed_WxD, preferred_element_type=dtype)
    return hidden_ct, unembed_ct + jnp.einsum("CW,CD->WD", logits_ct, hidden_CxD, preferred_element_type=dtype)


def _agreement(
    objective: Objective, picked: Picked, supervision: Supervision
) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Returns whether the student's largest logit is at the teacher's most likely id, and its mass on the K ids."""
    assert picked.row_max is not None
    assert picked.log_sum is not None
    if objective.rank_match:
        agrees = jnp.zeros_like(picked.row_max)
    else:
        first = jnp.argmax(supervision.topk_logits, axis=-1, keepdims=True)
        z_first = jnp.take_along_axis(picked.topk, first, axis=-1)[..., 0]
        agrees = jnp.where(z_first >= picked.row_max, 1.0, 0.0).astype(picked.row_max.dtype)
    centred = objective.logits_scale * (picked.topk - picked.row_max[..., None])
    probability = jnp.exp(centred - picked.log_sum[..., None])
    return agrees, jnp.where(supervision.topk_logits != -jnp.inf, probability, 0).sum(axis=-1)
