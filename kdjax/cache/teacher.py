"""The teacher's forward pass on the mesh, and what a cache keeps of it, chunk by chunk: [N, V] never exists.

Every device works on its rows of the vocabulary. What the shards exchange for a position is their k best logits and a
few sums; everything is returned replicated, so that any process can write any record.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.vocabulary import Vocabulary
from kdjax.model import Params, bind
from kdjax.parallel import pipeline
from kdjax.parallel.axes import VOCABULARY_AXES
from kdjax.parallel.collectives import per_device
from kdjax.parallel.mesh import ROWS
from kdjax.training.layout import Layout
from kdjax.training.step import gathered, parts_of

# A chunk's logits take 4 C V bytes on a device.
CHUNK_TOKENS = {"cpu": 64}
CHUNK_TOKENS_ELSEWHERE = 2048
BLOCK = 128  # columns that are looked at together when ids are drawn


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to keep of each position."""

    top_k: int  # exact entries, largest first; 0: none
    draws: int = 0  # ids to draw from the teacher's distribution outside the exact entries
    scales: tuple[float, ...] = (1.0,)  # target_logits_scales whose logsumexp is kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherRows:
    """Rows that the teacher reads, [B, T]; a padding position has segment id 0."""

    tokens: Int[Any, "B T"]
    labels: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    segment_ids: Int[Any, "B T"]
    uniforms: Float[Any, "B T"]  # in [0, 1); they decide what is drawn


class Targets(NamedTuple):
    """What the teacher says of each position. Logarithms are natural, and those of probabilities over all of V."""

    ids: Int[Array, "*P k"]  # of the exact entries, largest first
    log_probs: Float[Array, "*P k"]
    log_sums: Float[Array, "*P scales"]  # log sum_v exp(s * log p_v) for each scale s
    label_log_probs: Float[Array, "*P"]
    drawn_ids: Int[Array, "*P n"]  # distinct ids outside the exact entries
    draws: Int[Array, "*P n"]  # how often each was drawn; 0: not at all
    tail_log_probs: Float[Array, "*P"]  # the mean of log p outside the exact entries, weighted by p


def make_targets_step(layout: Layout, wanted: Wanted) -> Callable[[Params, TeacherRows], Targets]:
    """Returns the jitted function (parameters, global rows) -> targets of all positions, on every device."""
    specs = layout.stage_param_specs

    def leave(shared: Params, y: Array, rows: TeacherRows) -> tuple[Targets, tuple[()]]:
        model = bind(layout.config.model, shared, layout.shards)
        return find_targets(layout, model.final_norm(y), model.unembedding(), rows, wanted), ()

    parts = parts_of(layout, leave)

    def targets(params: Params, rows: TeacherRows) -> Targets:
        schedule, microbatches = layout.microbatches(rows)
        found = pipeline.outputs(parts, schedule, *gathered(layout, params, specs), microbatches)
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), found)

    local = per_device(targets, layout.mesh, (specs, ROWS), ROWS)
    return jax.jit(lambda params, rows: local(layout.by_stage(params), rows), out_shardings=layout.replicated)


def find_targets(
    layout: Layout, hidden: Float[Array, "B T D"], unembed: Float[Array, "W D"], rows: TeacherRows, wanted: Wanted
) -> Targets:
    """Returns the targets of one microbatch, from the residual stream after the last norm. Only inside `per_device`."""
    axes = VOCABULARY_AXES if layout.shards.vocabulary > 1 else ()
    vocabulary = Vocabulary(layout.config.model.vocab_size, axes)
    unembed = unembed.astype(hidden.dtype)
    tokens = rows.tokens.size
    chunk = CHUNK_TOKENS.get(jax.default_backend(), CHUNK_TOKENS_ELSEWHERE)
    n = math.ceil(tokens / chunk)
    c = math.ceil(tokens / n)

    def chunked(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(x, [(0, n * c - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(n, c, *x.shape[1:])

    def of_chunk(chunk: tuple[Array, Array, Array]) -> Targets:
        hidden_CxD, labels_C, uniforms_C = chunk
        logits_CxW = jnp.einsum("CD,WD->CW", hidden_CxD, unembed, preferred_element_type=jnp.float32)
        return _of_logits(logits_CxW, labels_C, uniforms_C, vocabulary, wanted)

    found = jax.lax.map(of_chunk, (chunked(hidden), chunked(rows.labels), chunked(rows.uniforms)))
    return jax.tree.map(
        lambda x: x.reshape(n * c, *x.shape[2:])[:tokens].reshape(*rows.tokens.shape, *x.shape[2:]), found
    )


def _of_logits(
    logits: Float[Array, "C W"],
    labels: Int[Array, "C"],
    uniforms: Float[Array, "C"],
    vocabulary: Vocabulary,
    wanted: Wanted,
) -> Targets:
    """Returns the targets of C positions from this shard's columns of their logits."""
    width = logits.shape[-1]
    n_valid = vocabulary.n_valid(width)
    if n_valid is not None:
        logits = jnp.where(jnp.arange(width) < n_valid, logits, -jnp.inf)
    largest = logits.max(axis=-1, keepdims=True)
    logits = logits - (jax.lax.pmax(largest, vocabulary.axis_names) if vocabulary.axis_names else largest)
    weights = jnp.exp(logits)  # probabilities up to a factor, 0 in padding columns
    log_sum = jnp.log(vocabulary.sum(weights.sum(axis=-1)))
    other = [vocabulary.sum(jnp.exp(s * logits).sum(axis=-1)) for s in wanted.scales]
    log_sums = (
        jnp.stack([jnp.log(x) - s * log_sum for x, s in zip(other, wanted.scales, strict=True)], axis=-1)
        if other
        else jnp.zeros((len(logits), 0))
    )
    columns = vocabulary.columns(labels, width)
    label = jnp.take_along_axis(logits, jnp.minimum(columns, width - 1)[:, None], axis=-1)[:, 0]
    label_log_probs = vocabulary.sum(jnp.where(columns < width, label, 0)) - log_sum
    values, ids = _largest(vocabulary, logits, wanted.top_k)
    empty = jnp.zeros((len(logits), 0))
    if not wanted.draws:
        tail = jnp.zeros(len(logits))
        return Targets(
            ids,
            values - log_sum[:, None],
            log_sums,
            label_log_probs,
            empty.astype(jnp.int32),
            empty.astype(jnp.int32),
            tail,
        )
    taught = vocabulary.columns(ids, width)
    rest = weights.at[jnp.arange(len(logits))[:, None], taught].set(0, mode="drop")
    drawn_ids, draws = _draw(vocabulary, rest, uniforms, wanted.draws)
    rest_sum = vocabulary.sum(rest.sum(axis=-1))
    mean = vocabulary.sum(jnp.where(rest > 0, rest * logits, 0).sum(axis=-1)) / jnp.maximum(rest_sum, 1e-30)
    return Targets(ids, values - log_sum[:, None], log_sums, label_log_probs, drawn_ids, draws, mean - log_sum)


def _largest(vocabulary: Vocabulary, x: Array, k: int) -> tuple[Array, Int[Array, "C k"]]:
    """Returns the k largest of each row over all shards, and their token ids; among equals the smaller ids."""
    width = x.shape[-1]
    values, columns = jax.lax.top_k(x, min(k, width))
    ids = columns.astype(jnp.int32) + vocabulary.first(width)
    if not vocabulary.axis_names or not k:
        return values, ids
    # Shards follow each other in the order of their ids, and top_k prefers the earlier of two equals.
    values, ids = (jax.lax.all_gather(a, vocabulary.axis_names, axis=1, tiled=True) for a in (values, ids))
    values, places = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, places, axis=1)


def _draw(
    vocabulary: Vocabulary, weights: Float[Array, "C W"], uniforms: Float[Array, "C"], n: int
) -> tuple[Int[Array, "C n"], Int[Array, "C n"]]:
    """Draws n ids in proportion to the weights; returns them ascending, and how often each was drawn, 0 at repetitions.

    Draws are systematic: the points (u + j) / n, j = 0 .. n-1, of the cumulative distribution, with one uniform u a
    position. The expected count of an id is n times its probability, as with independent draws, and its variance is
    smaller. A point is first looked up among blocks of columns, then inside its block, because a running sum over all
    columns costs more than the teacher's last matmul on a CPU.
    """
    c, width = weights.shape
    blocks_CxBxK = jnp.pad(weights, ((0, 0), (0, -width % BLOCK))).reshape(c, -1, BLOCK)
    ends_CxB = jnp.cumsum(blocks_CxBxK.sum(axis=-1), axis=-1)
    mine_C = ends_CxB[:, -1]
    before_C, total_C = jnp.zeros(c), mine_C
    if vocabulary.axis_names:
        shares = jax.lax.all_gather(mine_C, vocabulary.axis_names)  # [shards, C]
        shard = jax.lax.axis_index(vocabulary.axis_names)
        before_C = jnp.where(jnp.arange(len(shares))[:, None] < shard, shares, 0).sum(axis=0)
        total_C = shares.sum(axis=0)
    points_Cxn = (uniforms[:, None] + jnp.arange(n)) / n * total_C[:, None] - before_C[:, None]
    here_Cxn = (points_Cxn >= 0) & (points_Cxn < mine_C[:, None])
    block_Cxn = jnp.minimum((ends_CxB[:, None, :] <= points_Cxn[..., None]).sum(axis=-1), ends_CxB.shape[1] - 1)
    rows_Cx1 = jnp.arange(c)[:, None]
    inside_CxnxK = blocks_CxBxK[rows_Cx1, block_Cxn]
    start_Cxn = jnp.pad(ends_CxB, ((0, 0), (1, 0)))[rows_Cx1, block_Cxn]
    passed_CxnxK = start_Cxn[..., None] + jnp.cumsum(inside_CxnxK, axis=-1) <= points_Cxn[..., None]
    place_Cxn = jnp.minimum(passed_CxnxK.sum(axis=-1), BLOCK - 1)
    # Rounding may lead past the block's last column with a weight.
    empty_Cxn = jnp.take_along_axis(inside_CxnxK, place_Cxn[..., None], axis=-1)[..., 0] == 0
    place_Cxn = jnp.where(empty_Cxn, inside_CxnxK.argmax(axis=-1), place_Cxn)
    ids_Cxn = jnp.where(here_Cxn, block_Cxn * BLOCK + place_Cxn + vocabulary.first(width), 0)
    found_Cxn = vocabulary.sum(here_Cxn.astype(jnp.int32)) > 0
    ids_Cxn = vocabulary.sum(ids_Cxn).astype(jnp.int32)
    same_Cxnxn = (ids_Cxn[:, :, None] == ids_Cxn[:, None, :]) & found_Cxn[:, None, :]
    is_first_Cxn = jnp.argmax(same_Cxnxn, axis=-1) == jnp.arange(n)
    return ids_Cxn, jnp.where(found_Cxn & is_first_Cxn, same_Cxnxn.sum(axis=-1), 0).astype(jnp.int32)
