"""The losses and gradients of a chunk of C positions from the K rows of the unembedding that the teacher names.

Without an SFT term and without a tail, the softmax runs over the K entries alone: nothing else of the vocabulary enters
the loss, and 6 K D operations per token take the place of the dense path's 6 V D.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Losses, Picked, differentiate, evaluate
from kdjax.losses.dispatch import LossCall
from kdjax.losses.objective import Supervision, computation_dtype
from kdjax.losses.platform import platform


class Residuals(NamedTuple):
    """What the gradients of a chunk are computed from, beside its arguments."""

    rows: Float[Array, "C K D"]
    columns: Int[Array, "C K"]  # on this shard; W for entries that are elsewhere, absent, or no token ids
    picked: Picked


def evaluate_chunk(
    call: LossCall, hidden_CxD: Float[Array, "C D"], unembed_WxD: Float[Array, "W D"], supervision: Supervision
) -> tuple[Losses, tuple[None, None], Residuals]:
    """Returns the losses of each position, None for the metrics that would need the other rows, and the residuals."""
    vocabulary, width = call.vocabulary, unembed_WxD.shape[0]
    ids = supervision.topk_token_ids
    columns = vocabulary.columns(jnp.where(supervision.topk_logits != -jnp.inf, ids, -1), width)
    rows_CxKxD = unembed_WxD[jnp.minimum(columns, width - 1)]
    dtype = computation_dtype(hidden_CxD)
    topk = jnp.einsum("CD,CKD->CK", hidden_CxD, rows_CxKxD, preferred_element_type=dtype)
    topk = vocabulary.sum(jnp.where(columns < width, topk, 0))
    topk = jnp.where(vocabulary.holds(ids), topk, jnp.nan)
    picked = Picked(topk, jnp.full_like(topk[:, 0], jnp.nan))
    return evaluate(call.objective, picked, supervision), (None, None), Residuals(rows_CxKxD, columns, picked)


def differentiate_chunk(
    call: LossCall,
    hidden_CxD: Float[Array, "C D"],
    unembed_WxD: Float[Array, "W D"],
    supervision: Supervision,
    residuals: Residuals,
    loss_ct: Float[Array, "C"],
    unembed_ct: Float[Array, "W D"],
) -> tuple[Float[Array, "C D"], Float[Array, "W D"]]:
    """Returns what `dense.differentiate_chunk` does."""
    kd_ct = call.objective.kd_loss_weight * loss_ct
    topk_ct = differentiate(call.objective, residuals.picked, supervision, kd_ct, jnp.zeros_like(kd_ct)).topk
    topk_ct = jnp.where(residuals.columns < unembed_WxD.shape[0], topk_ct, 0)
    dtype = loss_ct.dtype
    hidden_ct = jnp.einsum(
        "CK,CKD->CD", topk_ct.astype(unembed_WxD.dtype), residuals.rows, preferred_element_type=dtype
    )
    add = add_in_place if platform() == "cpu" else add_sorted
    return hidden_ct, add(unembed_ct, residuals.columns, topk_ct, hidden_CxD.astype(dtype))


def add_in_place(
    unembed_ct: Float[Array, "W D"],
    columns: Int[Array, "C K"],
    topk_ct: Float[Array, "C K"],
    hidden: Float[Array, "C D"],
) -> Float[Array, "W D"]:
    """Returns `unembed_ct` with topk_ct[c, k] * hidden[c] added to row columns[c, k], entry by entry; row W is dropped.

    The order of the additions is fixed on a CPU only: a GPU adds to equal rows atomically, in any order.
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
    """Returns the same with equal rows summed first, by a scan over entries sorted by row: always in the same order."""
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
