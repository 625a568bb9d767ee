"""The unembedding and the loss in one, chunk of tokens by chunk of tokens: the logits [B, T, V] never exist.

A chunk's logits are gone once its gradients are made, in the forward pass already: three matmuls in all, not
the four of recomputing the logits backwards. That is possible because the result is a sum, whose one scalar
cotangent can be multiplied in afterwards; so the per-token weights come in as `loss_mask`.
Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989) does the same for labels.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.objective import LossSums, Objective, Supervision, computation_dtype
from kdjax.losses.terms import Picked, differentiate, evaluate
from kdjax.losses.xla import exponentiate, pick, spread, taught_columns

# A chunk's logits take 4 C V bytes, and every chunk reads and writes the unembedding's gradient once. On two
# cores, N = 1024, V = 49152, D = 128, float32, 128 was both the fastest and smaller than what came next:
# C = 64 687 ms, 36 MiB; 128 608 ms, 48 MiB; 256 680 ms, 97 MiB; 512 709 ms, 193 MiB; all at once, by JAX's
# own differentiation, 741 ms, 576 MiB. An accelerator needs more rows to be worth that traffic:
# 2048 keep its 12 V D bytes to a quarter of the 6 C V D operations' time on an H100 (arithmetic, not measured).
CPU_CHUNK_TOKENS = 128
ACCELERATOR_CHUNK_TOKENS = 2048


class _Chunks(NamedTuple):
    """Positions as the scan takes them, n chunks of C; one of them in the scan's body."""

    hidden: Float[Array, "n C D"]
    weight: Float[Array, "n C"]
    supervision: Supervision


def linear_losses(
    objective: Objective,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    supervision: Supervision,
    loss_mask: Float[Array, "B T"],
    chunk_tokens: int | None = None,
) -> LossSums:
    """The sums over all positions, by `lax.scan` over chunks of at most `chunk_tokens` of them.

    The gradient takes, beside its results, about [V, D] and one chunk's logits [C, V] in float32.
    """
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK_TOKENS
    tokens = loss_mask.size
    n = max(1, math.ceil(tokens / chunk_tokens))
    c = math.ceil(tokens / n)  # even chunks, padded by less than one token each

    def chunked(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, n * c - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, c, *x.shape[1:])

    weight = loss_mask.astype(computation_dtype(hidden, unembed))
    return _sums(objective, chunked(hidden), unembed, chunked(weight), jax.tree.map(chunked, supervision))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    objective: Objective,
    hidden: Float[Array, "n C D"],
    unembed_VxD: Float[Array, "V D"],
    weight: Float[Array, "n C"],
    supervision: Supervision,
) -> LossSums:
    """Losses only: one matmul."""
    chunks = _Chunks(hidden, weight, supervision)
    operand_VxD = _operand(chunks, unembed_VxD)

    def body(sums: LossSums, chunk: _Chunks) -> tuple[LossSums, None]:
        return _add(sums, _evaluate_chunk(objective, chunk, operand_VxD)[0]), None

    return jax.lax.scan(body, _no_sums(chunks), chunks)[0]


class _Gradients(NamedTuple):
    """Derivatives of the loss sum in the computation dtype; empty arrays carry the dtypes to return."""

    hidden: Float[Array, "n C D"]
    unembed: Float[Array, "V D"]
    like_hidden: Float[Array, "0"]
    like_unembed: Float[Array, "0"]


def _sums_and_gradients(
    objective: Objective,
    hidden: Float[Array, "n C D"],
    unembed_VxD: Float[Array, "V D"],
    weight: Float[Array, "n C"],
    supervision: Supervision,
) -> tuple[LossSums, _Gradients]:
    """Losses and both gradients of their weighted sum: three matmuls, accumulated in the computation dtype."""
    chunks = _Chunks(hidden, weight, supervision)
    operand_VxD = _operand(chunks, unembed_VxD)
    dtype = weight.dtype

    def body(carry: tuple[LossSums, Array], chunk: _Chunks) -> tuple[tuple[LossSums, Array], Float[Array, "C D"]]:
        sums, unembed_ct = carry
        chunk_sums, hidden, logits, exponentials, columns, picked = _evaluate_chunk(objective, chunk, operand_VxD)
        none = jnp.zeros_like(chunk.weight)
        columns_ct, log_sum_ct = differentiate(objective, picked, chunk.supervision, (chunk.weight, none, none))
        logits_ct = spread(objective, logits, exponentials, columns, picked, columns_ct, log_sum_ct, operand_VxD.dtype)
        hidden_ct = jnp.einsum("CV,VD->CD", logits_ct, operand_VxD, preferred_element_type=dtype)
        unembed_ct += jnp.einsum("CV,CD->VD", logits_ct, hidden, preferred_element_type=dtype)
        return (_add(sums, chunk_sums), unembed_ct), hidden_ct

    start = (_no_sums(chunks), jnp.zeros(unembed_VxD.shape, dtype))
    (sums, unembed_ct), hidden_ct = jax.lax.scan(body, start, chunks)
    like_hidden, like_unembed = jnp.empty(0, hidden.dtype), jnp.empty(0, unembed_VxD.dtype)
    return sums, _Gradients(hidden_ct, unembed_ct, like_hidden, like_unembed)


def _scale_gradients(
    objective: Objective, gradients: _Gradients, sums_ct: LossSums
) -> tuple[Float[Array, "n C D"], Float[Array, "V D"], None, None]:
    """The gradients times the loss's cotangent, rounded to the arguments' dtypes here and nowhere before."""
    hidden_ct = (sums_ct.loss * gradients.hidden).astype(gradients.like_hidden.dtype)
    unembed_ct = (sums_ct.loss * gradients.unembed).astype(gradients.like_unembed.dtype)
    return hidden_ct, unembed_ct, None, None


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _evaluate_chunk(
    objective: Objective, chunk: _Chunks, unembed_VxD: Float[Array, "V D"]
) -> tuple[LossSums, Float[Array, "C D"], Float[Array, "C V"], Float[Array, "C V"], Int[Array, "C K+1"], Picked]:
    """A chunk's sums, and what its gradients are made of: hidden, logits, exponentials, taught columns, picked."""
    weight, supervision = chunk.weight, chunk.supervision
    masked = jnp.equal(weight, 0)  # such a position may hold anything, NaN too
    hidden = jnp.where(masked[:, None], 0, chunk.hidden).astype(unembed_VxD.dtype)
    logits = jnp.einsum("CD,VD->CV", hidden, unembed_VxD, preferred_element_type=weight.dtype)
    columns = taught_columns(objective, logits, supervision)
    row_max = logits.max(axis=-1)
    exponentials = _stored(exponentiate(objective, logits, row_max))
    picked = pick(logits, columns)._replace(row_max=row_max, log_sum=jnp.log(exponentials.sum(axis=-1)))
    losses = evaluate(objective, picked, supervision)
    terms = (*losses, jnp.ones_like(weight), *_agreement(objective, picked, supervision))
    sums = LossSums(*(jnp.where(masked, 0, weight * term).sum() for term in terms))
    return sums, hidden, logits, exponentials, columns, picked


def _stored(x: Array) -> Array:
    """`x`, written to memory on a CPU, where XLA would compute the exponentials twice and slowly inside its sums.

    Measured as for the chunk sizes: 1024 rows take 0.11 s less of 0.48 s. A GPU rather computes than writes.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


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


def _operand(chunks: _Chunks, unembed_VxD: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The unembedding in the dtype that the matmuls multiply in: the wider of the two arguments'."""
    return unembed_VxD.astype(jnp.result_type(chunks.hidden, unembed_VxD))


def _no_sums(chunks: _Chunks) -> LossSums:
    return LossSums(*[jnp.zeros((), chunks.weight.dtype)] * len(LossSums._fields))


def _add(a: LossSums, b: LossSums) -> LossSums:
    return jax.tree.map(jnp.add, a, b)
