"""A chunk's losses and gradients by way of its logits, which exist until its gradients are made: three matmuls."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Picked, evaluate
from kdjax.losses.dispatch import LossCall, rows
from kdjax.losses.fused.chunk import Chunk, weigh
from kdjax.losses.objective import LossSums, Objective, Supervision
from kdjax.losses.vocabulary import join, taught_columns


class Residuals(NamedTuple):
    """What the gradients of a chunk are made of."""

    hidden: Float[Array, "C D"]
    logits: Float[Array, "C W"]
    columns: Int[Array, "C K+1"]
    picked: Picked
    cache: Any  # what the sweep left for the spread


def evaluate_chunk(call: LossCall, chunk: Chunk, unembed_WxD: Float[Array, "W D"]) -> tuple[LossSums, Residuals]:
    """The chunk's sums, from the logits of this shard of the vocabulary."""
    objective, vocabulary, columns_here = call.objective, call.vocabulary, unembed_WxD.shape[0]
    supervision = chunk.supervision
    hidden = chunk.operand(unembed_WxD.dtype)
    logits = jnp.einsum("CD,WD->CW", hidden, unembed_WxD, preferred_element_type=chunk.weight.dtype)
    columns = taught_columns(objective, vocabulary, logits, supervision)
    picked, kd, cache = rows(call.implementation).sweep(
        objective,
        logits,
        columns,
        log_sum=True,
        width=vocabulary.width(columns_here),
        supervision=None if vocabulary.axis_names else supervision,
        store=True,
    )
    picked, columns = join(objective, vocabulary, picked, columns, supervision, columns_here)
    losses = evaluate(objective, picked, supervision, kd)
    sums = weigh(chunk, losses, *_agreement(objective, picked, supervision))
    return sums, Residuals(hidden, logits, columns, picked, cache)


def differentiate_chunk(
    call: LossCall, chunk: Chunk, unembed_WxD: Float[Array, "W D"], made: Residuals, unembed_ct: Float[Array, "W D"]
) -> tuple[Float[Array, "C D"], Float[Array, "W D"]]:
    """The hidden states' gradient of the chunk's loss sum, this shard's part of it, and `unembed_ct` with its own."""
    objective = call.objective
    logits_ct = rows(call.implementation).spread(
        objective,
        made.logits,
        made.columns,
        made.picked,
        chunk.supervision,
        objective.kd_loss_weight * chunk.weight,
        objective.sft_loss_weight * chunk.weight,
        dtype=unembed_WxD.dtype,
        width=call.vocabulary.width(unembed_WxD.shape[0]),
        cache=made.cache,
    )
    dtype = chunk.weight.dtype
    hidden_ct = jnp.einsum("CW,WD->CD", logits_ct, unembed_WxD, preferred_element_type=dtype)
    return hidden_ct, unembed_ct + jnp.einsum("CW,CD->WD", logits_ct, made.hidden, preferred_element_type=dtype)


def _agreement(
    objective: Objective, picked: Picked, supervision: Supervision
) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Whether the student's largest logit is at the teacher's first id; the student's mass on the K ids."""
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
