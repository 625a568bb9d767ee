"""The loss on full logits with a derivative written by hand: one gather, one reduction, one pass back.

Forward: the K + 1 taught columns of each row are gathered and, only when an SFT term or a ghost tail asks for
it, the row's logsumexp is reduced in float32 without a float32 copy of the logits. Backward: the softmax part
is rounded to the logits' dtype once, and the taught columns are overwritten with values summed in float32
before they are rounded, so that softmax - 1 at the label does not cancel in bfloat16 and duplicate ids add.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.objective import Objective, Supervision, computation_dtype
from kdjax.losses.terms import Losses, Picked, differentiate, evaluate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(objective: Objective, logits: Float[Array, "*P V"], supervision: Supervision) -> Losses:
    """(loss, kd, sft) of each position in nats, differentiable by the logits through any of the three."""
    return _forward(objective, logits, supervision)[0]


_Residuals = tuple[Float[Array, "*P V"], Supervision, Int[Array, "*P K+1"], Picked]


def _forward(objective: Objective, logits: Float[Array, "*P V"], supervision: Supervision) -> tuple[Losses, _Residuals]:
    columns = taught_columns(objective, logits, supervision)
    picked = pick(logits, columns)
    if objective.needs_log_sum:
        row_max = logits.max(axis=-1).astype(picked.topk.dtype)
        log_sum = jnp.log(exponentiate(objective, logits, row_max).sum(axis=-1))
        picked = picked._replace(row_max=row_max, log_sum=log_sum)
    return evaluate(objective, picked, supervision), (logits, supervision, columns, picked)


def _backward(objective: Objective, residuals: _Residuals, cotangents: Losses) -> tuple[Float[Array, "*P V"], None]:
    logits, supervision, columns, picked = residuals
    columns_ct, log_sum_ct = differentiate(objective, picked, supervision, cotangents)
    exponentials = None if picked.row_max is None else exponentiate(objective, logits, picked.row_max)
    return spread(objective, logits, exponentials, columns, picked, columns_ct, log_sum_ct, logits.dtype), None


token_losses.defvjp(_forward, _backward)


def taught_columns(
    objective: Objective, logits: Float[Array, "*P V"], supervision: Supervision
) -> Int[Array, "*P K+1"]:
    """The vocabulary columns that the K entries and the label speak of, or V, which is no column.

    V stands for absent entries, for ids outside [0, V), and for the label when no term reads it. Under rank
    matching the entries speak of the student's own K largest logits.
    """
    v = logits.shape[-1]
    ids = supervision.topk_token_ids
    if objective.rank_match:
        ids = jax.lax.top_k(logits, ids.shape[-1])[1]
    ids = jnp.where((supervision.topk_logits != -jnp.inf) & (ids >= 0) & (ids < v), ids, v)
    labels = supervision.labels
    labels = jnp.where((labels >= 0) & (labels < v) & (objective.sft_loss_weight != 0), labels, v)
    return jnp.concatenate([ids.astype(jnp.int32), labels.astype(jnp.int32)[..., None]], axis=-1)


def pick(logits: Float[Array, "*P V"], columns: Int[Array, "*P K+1"]) -> Picked:
    """The logits at the taught columns (NaN at V), without the numbers that take a pass over the vocabulary."""
    taught = jnp.take_along_axis(logits, columns, axis=-1, mode="fill", fill_value=jnp.nan)
    taught = taught.astype(computation_dtype(logits))
    return Picked(taught[..., :-1], taught[..., -1])


def exponentiate(
    objective: Objective, logits: Float[Array, "*P V"], row_max: Float[Array, "*P"]
) -> Float[Array, "*P V"]:
    """exp(logits_scale (z - row_max)), whose sum is the exponential of the log-sum."""
    return jnp.exp(objective.logits_scale * (logits.astype(row_max.dtype) - row_max[..., None]))


def spread(
    objective: Objective,
    logits: Float[Array, "*P V"],
    exponentials: Float[Array, "*P V"] | None,
    columns: Int[Array, "*P K+1"],
    picked: Picked,
    columns_ct: Float[Array, "*P K+1"],
    log_sum_ct: Float[Array, "*P"] | None,
    dtype: jnp.dtype,
) -> Float[Array, "*P V"]:
    """The logits' cotangent in `dtype`, from `differentiate`'s of the taught columns and of the log-sum."""
    same_column = columns[..., :, None] == columns[..., None, :]
    taught_ct = jnp.where(same_column, columns_ct[..., None, :], 0).sum(axis=-1)
    if log_sum_ct is None:
        return _overwrite(jnp.zeros_like(logits, dtype), columns, taught_ct.astype(dtype))
    assert exponentials is not None
    assert picked.row_max is not None
    assert picked.log_sum is not None
    # What each column receives through the log-sum: the row's factor times its exponential.
    factor = (objective.logits_scale * log_sum_ct * jnp.exp(-picked.log_sum))[..., None]
    factor = jnp.where(log_sum_ct[..., None] == 0, 0, factor)
    taught = jnp.concatenate([picked.topk, picked.label[..., None]], axis=-1)
    taught_ct += jnp.where(factor == 0, 0, factor * exponentiate(objective, taught, picked.row_max))
    dense_ct = jnp.where(factor == 0, 0, factor * exponentials)
    return _overwrite(dense_ct.astype(dtype), columns, taught_ct.astype(dtype))


def _overwrite(
    dense: Float[Array, "*P V"], columns: Int[Array, "*P K+1"], values: Float[Array, "*P K+1"]
) -> Float[Array, "*P V"]:
    """`dense` with `values` at these columns; equal columns must carry equal values, and V is dropped."""
    dtype = dense.dtype
    if dtype.itemsize == 2:  # by their bits: XLA on a CPU scatters 16-bit floats through a float32 copy
        dense, values = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (dense, values))
    # Row by row under vmap: to XLA the positions are batch dimensions then, which stay sharded.
    overwrite = jnp.vectorize(
        lambda row, columns, values: row.at[columns].set(values, mode="drop"), signature="(v),(c),(c)->(v)"
    )
    return jax.lax.bitcast_convert_type(overwrite(dense, columns, values), dtype)
