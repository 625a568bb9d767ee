"""The vocabulary, whole or split over mesh axes, and the all-reduce that joins what its shards have picked.

Shard i of S holds the logit columns (rows of the unembedding) i*W .. i*W + W-1, where S*W >= V; columns from V on are
padding, which enters no logsumexp and receives no gradient. A position needs from the other shards its K taught logits,
its label's logit, and the maximum and log-sum of each shard: K + 1 + 2S numbers, in one all-reduce. The gradients need
no further all-reduce, except that of the hidden states, to which every shard contributes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.closed_form import Picked
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.rows import Rows


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` token ids, whose columns are split over the mesh axes `axis_names` (major to minor), or whole if empty."""

    size: int
    axis_names: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        """The number of shards."""
        return jax.lax.axis_size(self.axis_names) if self.axis_names else 1

    def first(self, width: int) -> int | jax.Array:
        """Returns the token id of this shard's first column; every shard has `width` columns."""
        return jax.lax.axis_index(self.axis_names) * width if self.axis_names else 0

    def n_valid(self, width: int) -> jax.Array | None:
        """Returns how many of this shard's `width` columns are tokens, or None if all are, on every shard."""
        if self.size == width * self.shards:
            return None
        return jnp.clip(self.size - self.first(width), 0, width).astype(jnp.int32)

    def holds(self, ids: Int[Array, "*P"]) -> Bool[Array, "*P"]:
        """Returns whether these are token ids at all."""
        return (ids >= 0) & (ids < self.size)

    def columns(self, ids: Int[Array, "*P"], width: int) -> Int[Array, "*P"]:
        """Returns the ids' columns on this shard, int32; `width` for ids that are elsewhere or outside [0, size)."""
        columns = ids - self.first(width)
        here = self.holds(ids) & (columns >= 0) & (columns < width)
        return jnp.where(here, columns, width).astype(jnp.int32)

    def sum(self, x: Array) -> Array:
        """Returns the sum over the shards: one all-reduce, or none."""
        return jax.lax.psum(x, self.axis_names) if self.axis_names else x


def taught_rows(
    objective: Objective, vocabulary: Vocabulary, logits: Float[Array, "*P W"], supervision: Supervision
) -> Rows:
    """Returns this shard's rows with the columns of the C = K teacher entries and of the label; W stands for none.

    There is none for absent entries, for ids outside [0, V) or on other shards, and for a label that no term reads.
    Under rank matching the entries are this shard's own C = min(K, W) largest logits.
    """
    width = logits.shape[-1]
    n_valid = vocabulary.n_valid(width)
    ids, labels = supervision.topk_token_ids, supervision.labels[..., None]
    if objective.rank_match:
        real = logits if n_valid is None else jnp.where(jnp.arange(width) < n_valid, logits, -jnp.inf)
        entries = jax.lax.top_k(real, min(ids.shape[-1], width))[1].astype(jnp.int32)
        entries = entries if n_valid is None else jnp.where(entries < n_valid, entries, width)
    else:
        entries = vocabulary.columns(jnp.where(supervision.topk_logits != -jnp.inf, ids, -1), width)
    if objective.rank_match and not vocabulary.axis_names:
        entries = jnp.where(supervision.topk_logits != -jnp.inf, entries, width)
    labels = labels if objective.sft_loss_weight != 0 else jnp.full_like(labels, -1)
    return Rows(logits, jnp.concatenate([entries, vocabulary.columns(labels, width)], axis=-1), n_valid)


def join(
    objective: Objective, vocabulary: Vocabulary, picked: Picked, rows: Rows, supervision: Supervision
) -> tuple[Picked, Rows]:
    """Returns what this shard picked of its rows joined to that of the whole vocabulary, and the rows to spread to.

    Under rank matching the K entries are chosen among the candidates of all shards.
    """
    if not vocabulary.axis_names:
        return picked, rows
    columns, width = rows.columns, rows.logits.shape[-1]
    shards, shard = vocabulary.shards, jax.lax.axis_index(vocabulary.axis_names)

    def placed(x: Float[Array, "*P C"]) -> Float[Array, "*P S*C"]:
        """Returns x in this shard's place among S, zeros elsewhere."""
        mine = jnp.arange(shards)[:, None] == shard
        return jnp.where(mine, x[..., None, :], 0).reshape(*x.shape[:-1], -1)

    here = columns != width
    if objective.rank_match:  # a missing column must not rank
        parts = [placed(jnp.where(here[..., :-1], picked.topk, -jnp.inf))]
    else:
        parts = [jnp.where(here[..., :-1], picked.topk, 0)]
    parts += [jnp.where(here[..., -1:], picked.label[..., None], 0)] if objective.sft_loss_weight != 0 else []
    if picked.row_max is not None and picked.log_sum is not None:
        parts += [placed(picked.row_max[..., None]), placed(picked.log_sum[..., None])]
    sizes = [part.shape[-1] for part in parts]
    joined = _split(vocabulary.sum(jnp.concatenate(parts, axis=-1)), sizes)

    topk = joined.pop(0)
    if objective.rank_match:
        topk, columns = _best(topk, columns, supervision, shard, width)
    else:
        topk = jnp.where(vocabulary.holds(supervision.topk_token_ids), topk, jnp.nan)
    label = jnp.full_like(topk[..., 0], jnp.nan)
    if objective.sft_loss_weight != 0:
        label = jnp.where(vocabulary.holds(supervision.labels), joined.pop(0)[..., 0], jnp.nan)
    if not joined:
        return Picked(topk, label), rows._replace(columns=columns)
    maxima, log_sums = joined
    row_max = maxima.max(axis=-1)
    log_sum = jax.nn.logsumexp(log_sums + objective.logits_scale * (maxima - row_max[..., None]), axis=-1)
    return Picked(topk, label, row_max, log_sum), rows._replace(columns=columns)


def _best(
    candidates: Float[Array, "*P S*C"],
    columns: Int[Array, "*P C+1"],
    supervision: Supervision,
    shard: jax.Array,
    width: int,
) -> tuple[Float[Array, "*P K"], Int[Array, "*P K+1"]]:
    """Returns the K largest of all shards' candidates, and the columns of those that lie on this shard."""
    c = columns.shape[-1] - 1
    topk, places = jax.lax.top_k(candidates, supervision.topk_logits.shape[-1])
    mine = (places // c == shard) & (supervision.topk_logits != -jnp.inf)
    entries = jnp.where(mine, jnp.take_along_axis(columns[..., :-1], places % c, axis=-1), width)
    return topk, jnp.concatenate([entries, columns[..., -1:]], axis=-1)


def _split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Returns x split along its last axis into parts of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis=-1)
