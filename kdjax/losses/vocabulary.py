"""The vocabulary, whole or split over mesh axes, and the one sum that joins what its shards know of a position.

Shard i of S holds the logit columns (rows of the unembedding) i*W .. i*W + W-1, S*W >= V; columns from V on are
padding, which enters no logsumexp and receives no gradient. What a position needs of the other shards is its K
taught logits, its label's, and the maximum and log-sum of each shard: K + 1 + 2S numbers, in one all-reduce.
The gradients need no further one, except of the hidden states, which every shard has a part in.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.closed_form import Picked
from kdjax.losses.objective import Objective, Supervision


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` token ids, their columns split over the mesh axes `axis_names` (major to minor), or here whole."""

    size: int
    axis_names: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        """The number of shards."""
        return jax.lax.axis_size(self.axis_names) if self.axis_names else 1

    def first(self, columns: int) -> int | jax.Array:
        """The token id of this shard's first column."""
        return jax.lax.axis_index(self.axis_names) * columns if self.axis_names else 0

    def width(self, columns: int) -> jax.Array | None:
        """How many of this shard's columns are tokens; None: all of them, on every shard."""
        if self.size == columns * self.shards:
            return None
        return jnp.clip(self.size - self.first(columns), 0, columns).astype(jnp.int32)

    def holds(self, ids: Int[Array, "*P"]) -> Bool[Array, "*P"]:
        """Whether these are token ids at all."""
        return (ids >= 0) & (ids < self.size)

    def local(self, ids: Int[Array, "*P"], columns: int) -> Int[Array, "*P"]:
        """Their columns on this shard, int32; `columns` for those that are elsewhere or no ids."""
        local = ids - self.first(columns)
        here = self.holds(ids) & (local >= 0) & (local < columns)
        return jnp.where(here, local, columns).astype(jnp.int32)

    def sum(self, x: Array) -> Array:
        """The sum over the shards: one all-reduce, or none."""
        return jax.lax.psum(x, self.axis_names) if self.axis_names else x


def taught_columns(
    objective: Objective, vocabulary: Vocabulary, logits: Float[Array, "*P W"], supervision: Supervision
) -> Int[Array, "*P C+1"]:
    """This shard's columns that the C = K entries and the label speak of, or W, which is no column.

    W stands for absent entries, for ids outside [0, V) or on other shards, and for a label that no term reads.
    Under rank matching the entries speak of this shard's own C = min(K, W) largest logits.
    """
    columns = logits.shape[-1]
    ids, labels = supervision.topk_token_ids, supervision.labels[..., None]
    if objective.rank_match:
        width = vocabulary.width(columns)
        real = logits if width is None else jnp.where(jnp.arange(columns) < width, logits, -jnp.inf)
        entries = jax.lax.top_k(real, min(ids.shape[-1], columns))[1].astype(jnp.int32)
        entries = entries if width is None else jnp.where(entries < width, entries, columns)
    else:
        entries = vocabulary.local(jnp.where(supervision.topk_logits != -jnp.inf, ids, -1), columns)
    if objective.rank_match and not vocabulary.axis_names:
        entries = jnp.where(supervision.topk_logits != -jnp.inf, entries, columns)
    labels = labels if objective.sft_loss_weight != 0 else jnp.full_like(labels, -1)
    return jnp.concatenate([entries, vocabulary.local(labels, columns)], axis=-1)


def join(
    objective: Objective,
    vocabulary: Vocabulary,
    picked: Picked,
    columns: Int[Array, "*P C+1"],
    supervision: Supervision,
    width: int,
) -> tuple[Picked, Int[Array, "*P K+1"]]:
    """What was picked on this shard of `width` columns, as that of the whole vocabulary, and the columns for it."""
    if not vocabulary.axis_names:
        return picked, columns
    shards, shard = vocabulary.shards, jax.lax.axis_index(vocabulary.axis_names)

    def placed(x: Float[Array, "*P C"]) -> Float[Array, "*P S*C"]:
        """x in this shard's place among S, zeros elsewhere."""
        mine = jnp.arange(shards)[:, None] == shard
        return jnp.where(mine, x[..., None, :], 0).reshape(*x.shape[:-1], -1)

    here = columns != width
    if objective.rank_match:  # what is no column here must not rank
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
        return Picked(topk, label), columns
    maxima, log_sums = joined
    row_max = maxima.max(axis=-1)
    log_sum = jax.nn.logsumexp(log_sums + objective.logits_scale * (maxima - row_max[..., None]), axis=-1)
    return Picked(topk, label, row_max, log_sum), columns


def _best(
    candidates: Float[Array, "*P S*C"],
    columns: Int[Array, "*P C+1"],
    supervision: Supervision,
    shard: jax.Array,
    width: int,
) -> tuple[Float[Array, "*P K"], Int[Array, "*P K+1"]]:
    """The K largest of all shards' own largest logits, and those columns of them that lie on this shard."""
    c = columns.shape[-1] - 1
    topk, places = jax.lax.top_k(candidates, supervision.topk_logits.shape[-1])
    mine = (places // c == shard) & (supervision.topk_logits != -jnp.inf)
    entries = jnp.where(mine, jnp.take_along_axis(columns[..., :-1], places % c, axis=-1), width)
    return topk, jnp.concatenate([entries, columns[..., -1:]], axis=-1)


def _split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """x's last axis in parts of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis=-1)
