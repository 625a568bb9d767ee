"""The vocabulary, whole or split over mesh axes, and the all-reduce that joins what its shards have picked.

Shard i of S holds the logit columns (rows of the unembedding) i*W .. i*W + W-1, where S*W >= V; columns from V on are
padding, which enters no logsumexp and receives no gradient. A position needs from the other shards its K taught logits,
its label's logit, and the maximum and log-sum of each shard: K + 1 + 2S numbers, in one all-reduce. Rank matching needs
another one first, of each shard's own K largest logits, to know which are taught. The gradients need no further
all-reduce, except that of the hidden states, to which every shard contributes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.closed_form import Picked, with_total
from kdjax.losses.objective import Objective, Supervision, computation_dtype
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
        return self.shard * width if self.axis_names else 0

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

    @property
    def shard(self) -> jax.Array:
        """The number of this shard."""
        return jax.lax.axis_index(self.axis_names)

    def placed(self, x: Float[Array, "*P C"]) -> Float[Array, "*P S*C"]:
        """Returns x in this shard's place among S, zeros elsewhere; the sum over the shards has all in their places."""
        mine = jnp.arange(self.shards)[:, None] == self.shard
        return jnp.where(mine, x[..., None, :], 0).reshape(*x.shape[:-1], -1)

    def sum(self, x: Array) -> Array:
        """Returns the sum over the shards: one all-reduce, or none."""
        return jax.lax.psum(x, self.axis_names) if self.axis_names else x


def taught_rows(
    objective: Objective, vocabulary: Vocabulary, logits: Float[Array, "*P W"], supervision: Supervision
) -> Rows:
    """Returns this shard's rows with the columns of the K teacher entries and of the label; W stands for none.

    There is none for absent entries, for ids outside [0, V) or on other shards, and for a label that no term reads.
    Under rank matching the entries are the K largest logits of all shards.
    """
    width = logits.shape[-1]
    n_valid = vocabulary.n_valid(width)
    present = supervision.topk_logits != -jnp.inf
    if objective.rank_match:
        entries = _largest(vocabulary, logits, n_valid, present.shape[-1])
        entries = jnp.where(present, entries, width)
    else:
        entries = vocabulary.columns(jnp.where(present, supervision.topk_token_ids, -1), width)
    labels = supervision.labels[..., None]
    labels = labels if objective.reads_labels else jnp.full_like(labels, -1)
    return Rows(logits, jnp.concatenate([entries, vocabulary.columns(labels, width)], axis=-1), n_valid)


def _largest(
    vocabulary: Vocabulary, logits: Float[Array, "*P W"], n_valid: Int[Array, ""] | None, k: int
) -> Int[Array, "*P K"]:
    """Returns the columns of the K largest logits of all shards, largest first; W for those on other shards."""
    width = logits.shape[-1]
    real = logits if n_valid is None else jnp.where(jnp.arange(width) < n_valid, logits, -jnp.inf)
    values, columns = jax.lax.top_k(real, min(k, width))
    columns = columns.astype(jnp.int32)
    columns = columns if n_valid is None else jnp.where(columns < n_valid, columns, width)
    if not vocabulary.axis_names:
        return columns
    # Padding ranks below any logit, even -inf.
    values = jnp.maximum(values.astype(computation_dtype(values)), jnp.finfo(values.dtype).min)
    candidates = vocabulary.sum(vocabulary.placed(jnp.where(columns < width, values, -jnp.inf)))
    places = jax.lax.top_k(candidates, k)[1]
    mine = places // columns.shape[-1] == vocabulary.shard
    return jnp.where(mine, jnp.take_along_axis(columns, places % columns.shape[-1], axis=-1), width)


def join(objective: Objective, vocabulary: Vocabulary, picked: Picked, rows: Rows, supervision: Supervision) -> Picked:
    """Returns what is picked of the whole vocabulary, given what this shard picked of its rows."""
    if vocabulary.axis_names:
        picked = _joined(objective, vocabulary, picked, rows, supervision)
    if not objective.ghost:
        return picked
    counts = supervision.topk_logits != -jnp.inf
    if not objective.rank_match:  # an id that is taught twice is one token of the student
        ids = supervision.topk_token_ids
        earlier = jnp.tri(ids.shape[-1], k=-1, dtype=bool) & counts[..., None, :]
        counts &= vocabulary.holds(ids) & ~(earlier & (ids[..., :, None] == ids[..., None, :])).any(axis=-1)
    return with_total(objective, picked, counts)


def _joined(
    objective: Objective, vocabulary: Vocabulary, picked: Picked, rows: Rows, supervision: Supervision
) -> Picked:
    """Returns what all shards picked: their entries and label, and the log-sum of their log-sums."""
    here = rows.columns != rows.logits.shape[-1]
    parts = [jnp.where(here[..., :-1], picked.topk, 0)]
    if objective.reads_labels:
        parts.append(jnp.where(here[..., -1:], picked.label[..., None], 0))
    largest, log_sum = (picked.tail_max, picked.tail_log_sum) if objective.ghost else (picked.row_max, picked.log_sum)
    if largest is not None and log_sum is not None:
        parts += [vocabulary.placed(largest[..., None]), vocabulary.placed(log_sum[..., None])]
    joined = _split(vocabulary.sum(jnp.concatenate(parts, axis=-1)), [part.shape[-1] for part in parts])

    topk = joined.pop(0)
    if not objective.rank_match:
        topk = jnp.where(vocabulary.holds(supervision.topk_token_ids), topk, jnp.nan)
    label = jnp.full_like(topk[..., 0], jnp.nan)
    if objective.reads_labels:
        label = jnp.where(vocabulary.holds(supervision.labels), joined.pop(0)[..., 0], jnp.nan)
    if not joined:
        return Picked(topk, label)
    maxima, log_sums = joined
    largest = maxima.max(axis=-1)
    centre = jnp.where(largest == -jnp.inf, 0, largest)  # a tail may be empty on all shards
    log_sum = jax.nn.logsumexp(log_sums + objective.logits_scale * (maxima - centre[..., None]), axis=-1)
    if objective.ghost:
        return Picked(topk, label, tail_max=largest, tail_log_sum=log_sum)
    return Picked(topk, label, largest, log_sum)


def _split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Returns x split along its last axis into parts of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(x, ends, axis=-1)
