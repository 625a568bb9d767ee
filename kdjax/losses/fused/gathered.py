"""A chunk's losses and gradients from the K rows of the unembedding that the teacher speaks of, and no others.

Without an SFT term and without a tail, the softmax runs over the K entries alone: nothing else of the vocabulary
enters the loss, and 6 K D operations a token stand where the dense path takes 6 V D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Picked, differentiate, evaluate
from kdjax.losses.dispatch import LossCall
from kdjax.losses.fused.chunk import Chunk, weigh
from kdjax.losses.objective import LossSums
from kdjax.losses.platform import platform


class Residuals(NamedTuple):
    """What the gradients of a chunk are made of."""

    hidden: Float[Array, "C D"]
    rows: Float[Array, "C K D"]
    columns: Int[Array, "C K"]  # of this shard; W for entries that are elsewhere, absent, or no ids
    picked: Picked


def evaluate_chunk(call: LossCall, chunk: Chunk, unembed_WxD: Float[Array, "W D"]) -> tuple[LossSums, Residuals]:
    """The chunk's sums. `top1_agreement` and `student_topk_mass` would need the other rows: None."""
    vocabulary, columns_here = call.vocabulary, unembed_WxD.shape[0]
    topk_logits, ids, *_ = chunk.supervision
    columns = vocabulary.local(jnp.where(topk_logits != -jnp.inf, ids, -1), columns_here)
    hidden = chunk.operand(unembed_WxD.dtype)
    rows_CxKxD = unembed_WxD[jnp.minimum(columns, columns_here - 1)]
    topk = jnp.einsum("CD,CKD->CK", hidden, rows_CxKxD, preferred_element_type=chunk.weight.dtype)
    topk = vocabulary.sum(jnp.where(columns < columns_here, topk, 0))
    topk = jnp.where(vocabulary.holds(ids), topk, jnp.nan)
    picked = Picked(topk, jnp.full_like(topk[:, 0], jnp.nan))
    losses = evaluate(call.objective, picked, chunk.supervision)
    return weigh(chunk, losses, None, None), Residuals(hidden, rows_CxKxD, columns, picked)


def differentiate_chunk(
    call: LossCall, chunk: Chunk, unembed_WxD: Float[Array, "W D"], made: Residuals, unembed_ct: Float[Array, "W D"]
) -> tuple[Float[Array, "C D"], Float[Array, "W D"]]:
    """The hidden states' gradient of the chunk's loss sum, this shard's part of it, and `unembed_ct` with its own."""
    kd_ct = call.objective.kd_loss_weight * chunk.weight
    topk_ct = differentiate(call.objective, made.picked, chunk.supervision, kd_ct, jnp.zeros_like(kd_ct)).topk
    topk_ct = jnp.where(made.columns < unembed_WxD.shape[0], topk_ct, 0)
    dtype = chunk.weight.dtype
    hidden_ct = jnp.einsum("CK,CKD->CD", topk_ct.astype(unembed_WxD.dtype), made.rows, preferred_element_type=dtype)
    add = add_in_place if platform() == "cpu" else add_sorted
    return hidden_ct, add(unembed_ct, made.columns, topk_ct, made.hidden.astype(dtype))


def add_in_place(
    unembed_ct: Float[Array, "W D"],
    columns: Int[Array, "C K"],
    topk_ct: Float[Array, "C K"],
    hidden: Float[Array, "C D"],
) -> Float[Array, "W D"]:
    """`unembed_ct` with topk_ct[c, k] * hidden[c] added to row columns[c, k], entry by entry; row W is dropped.

    The order of additions is fixed on a CPU only: a GPU adds equal rows atomically, in any order.
    """

    def add_entry(k: Int[Array, ""], unembed_ct: Float[Array, "W D"]) -> Float[Array, "W D"]:
        return unembed_ct.at[columns[:, k]].add(topk_ct[:, k, None] * hidden, mode="drop")

    return jax.lax.fori_loop(0, columns.shape[1], add_entry, unembed_ct)


def add_sorted(
    unembed_ct: Float[Array, "W D"],
    columns: Int[Array, "C K"],
    topk_ct: Float[Array, "C K"],
    hidden: Float[Array, "C D"],
) -> Float[Array, "W D"]:
    """The same with equal rows summed first, by a scan over the entries sorted by row: in the same order always."""
    w, k = unembed_ct.shape[0], columns.shape[1]
    order = jnp.argsort(columns, axis=None, stable=True)
    column = columns.reshape(-1)[order]
    part = topk_ct.reshape(-1)[order, None] * hidden[order // k]
    changes = column[1:] != column[:-1]
    first, last = jnp.append(True, changes), jnp.append(changes, True)

    def combine(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0][:, None], b[1], a[1] + b[1])

    _, total = jax.lax.associative_scan(combine, (first, part))
    return unembed_ct.at[jnp.where(last, column, w)].add(total, mode="drop")
