"""The unembedding and the loss in one, chunk by chunk of positions: the logits [B, T, V] never exist.

The gradients of a chunk are computed in the forward pass, while its logits exist: three matmuls in all, instead of four
with the logits recomputed in the backward pass. This works because the result is a sum, so that its one scalar
cotangent can be multiplied in afterwards; it is why the weights of the positions come in as `loss_mask`. Liger-Kernel's
fused linear cross-entropy (arXiv:2410.10989) does the same for labels.

`dense.py` (all logits) and `gathered.py` (K of them) compute one chunk. `teacher.py` does the same with two models.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.closed_form import Losses
from kdjax.losses.dispatch import LossCall
from kdjax.losses.fused import dense, gathered
from kdjax.losses.objective import LossSums, Supervision, TeacherSums, computation_dtype
from kdjax.losses.platform import platform, varying, zeros
from kdjax.losses.vocabulary import Vocabulary

# A chunk's logits take 4 C V bytes, and every chunk reads and writes the unembedding's gradient once. On two cores,
# N = 1024, V = 49152, D = 128, float32, C = 128 was fastest: C = 64 687 ms, 36 MiB; 128 608 ms, 48 MiB; 256 680 ms,
# 97 MiB; 512 709 ms, 193 MiB; all at once, differentiated by JAX, 741 ms, 576 MiB. An accelerator needs more rows to
# be worth that traffic: 2048 keep its 12 V D bytes to a quarter of the time of the 6 C V D operations on an H100
# (arithmetic, not measured).
DENSE_CHUNK_TOKENS = {"cpu": 128}
DENSE_CHUNK_TOKENS_ELSEWHERE = 2048

# A chunk's gathered rows take C K D elements and are read again for the gradients, soon if the chunk is small. On two
# cores, N = 1024, V = 32768, D = 512, K = 64: C = 16 42 ms, 2 MiB; 32 40 ms, 4 MiB; 128 45 ms, 17 MiB; 256 62 ms,
# 33 MiB. 256 keep an accelerator's rows to 128 MiB at K = 64, D = 4096 in bfloat16.
GATHERED_CHUNK_TOKENS = {"cpu": 32}
GATHERED_CHUNK_TOKENS_ELSEWHERE = 256

Sums = TypeVar("Sums")  # LossSums or TeacherSums


class Chunk(NamedTuple):
    """C positions, or n chunks of C positions under a leading axis."""

    hidden: Float[Array, "*n C D"]
    weight: Float[Array, "*n C"]  # in the computation dtype
    supervision: Any  # `Supervision`, or another tree of arrays with one row for each position

    @property
    def dtype(self) -> jnp.dtype:
        """The computation dtype."""
        return self.weight.dtype

    @property
    def masked(self) -> Bool[Array, "*n C"]:
        """Whether each position has weight 0; it may then hold anything, even NaN."""
        return jnp.equal(self.weight, 0)

    def operand(self, dtype: jnp.dtype) -> Float[Array, "*n C D"]:
        """Returns the hidden states for the matmuls: in `dtype`, 0 where masked."""
        return jnp.where(self.masked[..., None], 0, self.hidden).astype(dtype)

    def sums(self, terms: Sums) -> Sums:
        """Returns the terms' sums over the chunk, weighted; a masked position adds nothing, whatever it holds."""
        return jax.tree.map(lambda term: jnp.where(self.masked, 0, self.weight * term).sum(), terms)


def linear_losses(
    call: LossCall,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "W D"],
    supervision: Supervision,
    loss_mask: Float[Array, "B T"],
    chunk_tokens: int | None = None,
) -> LossSums:
    """Returns the sums over all positions, by `lax.scan` over chunks of at most `chunk_tokens` of them.

    The gradient needs, beside its results, about [W, D] and one chunk's logits [C, W] in float32; on the gathered path,
    [W, D] and the chunk's rows [C, K, D].
    """
    if chunk_tokens is None and _path(call) is gathered:
        chunk_tokens = GATHERED_CHUNK_TOKENS.get(platform(), GATHERED_CHUNK_TOKENS_ELSEWHERE)
    elif chunk_tokens is None:
        chunk_tokens = dense_chunk_tokens()
    weight = loss_mask.astype(computation_dtype(hidden, unembed))
    chunks = split(Chunk(hidden, weight, supervision), chunk_tokens)
    return _sums(call, chunks.hidden, unembed, chunks.weight, chunks.supervision)


def dense_chunk_tokens() -> int:
    """Returns the number of positions whose logits exist at once, where the caller does not choose it."""
    return DENSE_CHUNK_TOKENS.get(platform(), DENSE_CHUNK_TOKENS_ELSEWHERE)


def split(positions: Chunk, chunk_tokens: int) -> Chunk:
    """Returns positions [B, T] as n even chunks of at most `chunk_tokens`, padded by less than one token per chunk."""
    tokens = positions.weight.size
    n = max(1, math.ceil(tokens / chunk_tokens))
    c = math.ceil(tokens / n)

    def chunked(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, n * c - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, c, *x.shape[1:])

    return jax.tree.map(chunked, positions)


def _terms(losses: Losses, chunk: Chunk, metrics: tuple[Array, Array] | tuple[None, None]) -> LossSums:
    return LossSums(*losses, jnp.ones_like(chunk.weight), *metrics)


def _path(call: LossCall) -> ModuleType:
    return gathered if call.implementation == "gathered" else dense


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    call: LossCall,
    hidden: Float[Array, "n C D"],
    unembed_WxD: Float[Array, "W D"],
    weight: Float[Array, "n C"],
    supervision: Supervision,
) -> LossSums:
    """Returns the sums without gradients: one matmul."""
    chunks = Chunk(hidden, weight, supervision)
    operand_WxD = _operand(chunks, unembed_WxD)

    def evaluate(chunk: Chunk) -> LossSums:
        hidden_CxD = chunk.operand(operand_WxD.dtype)
        losses, metrics, _ = _path(call).evaluate_chunk(call, hidden_CxD, operand_WxD, chunk.supervision)
        return chunk.sums(_terms(losses, chunk, metrics))

    start = no_sums(evaluate, chunks)
    return jax.lax.scan(lambda sums, chunk: (add(sums, evaluate(chunk)), None), start, chunks)[0]


class Gradients(NamedTuple):
    """Derivatives of the loss sum in the computation dtype; empty arrays carry the types to return them in."""

    hidden: Float[Array, "n C D"]
    unembed: Float[Array, "W D"]
    like_hidden: Float[Array, "0 C D"]
    like_unembed: Float[Array, "0 D"]


def _sums_and_gradients(
    call: LossCall,
    hidden: Float[Array, "n C D"],
    unembed_WxD: Float[Array, "W D"],
    weight: Float[Array, "n C"],
    supervision: Supervision,
) -> tuple[LossSums, Gradients]:
    """Returns the sums and both gradients of the loss sum: three matmuls, accumulated in the computation dtype."""
    chunks = Chunk(hidden, weight, supervision)
    operand_WxD = _operand(chunks, unembed_WxD)
    path = _path(call)

    def evaluate(unembed_ct: Array, chunk: Chunk) -> tuple[LossSums, Array, Array]:
        hidden_CxD = chunk.operand(operand_WxD.dtype)
        losses, metrics, residuals = path.evaluate_chunk(call, hidden_CxD, operand_WxD, chunk.supervision)
        hidden_ct, unembed_ct = path.differentiate_chunk(
            call, hidden_CxD, operand_WxD, chunk.supervision, residuals, chunk.weight, unembed_ct
        )
        return chunk.sums(_terms(losses, chunk, metrics)), unembed_ct, hidden_ct

    def body(carry: tuple[LossSums, Array], chunk: Chunk) -> tuple[tuple[LossSums, Array], Float[Array, "C D"]]:
        sums, unembed_ct, hidden_ct = evaluate(carry[1], chunk)
        return (add(carry[0], sums), unembed_ct), hidden_ct

    no_gradient = zeros(unembed_WxD.shape, weight.dtype, chunks, unembed_WxD)
    start = (no_sums(lambda chunk: evaluate(no_gradient, chunk)[0], chunks), no_gradient)
    (sums, unembed_ct), hidden_ct = jax.lax.scan(body, start, chunks)
    return sums, Gradients(hidden_ct, unembed_ct, hidden[:0], unembed_WxD[:0])


def _scale_gradients(
    call: LossCall, gradients: Gradients, sums_ct: LossSums
) -> tuple[Float[Array, "n C D"], Float[Array, "W D"], None, None]:
    """Returns the gradients times the loss's cotangent; what the student learns from has none."""
    return *scale_gradients(call.vocabulary, gradients, sums_ct), None, None


def scale_gradients(
    vocabulary: Vocabulary, gradients: Gradients, sums_ct: LossSums | TeacherSums
) -> tuple[Float[Array, "n C D"], Float[Array, "W D"]]:
    """Returns the gradients times the loss's cotangent, summed over shards, rounded to the arguments' dtypes last."""
    hidden_ct = _sum_over_copies(sums_ct.loss * gradients.hidden, gradients.like_hidden, vocabulary.axis_names).astype(
        gradients.like_hidden.dtype
    )
    unembed_ct = _sum_over_copies(sums_ct.loss * gradients.unembed, gradients.like_unembed, ())
    return hidden_ct, unembed_ct.astype(gradients.like_unembed.dtype)


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _sum_over_copies(cotangent: Array, like: Array, axes: tuple[str, ...]) -> Array:
    """Returns the cotangent summed over the mesh axes along which its argument is one value: `axes` and perhaps more.

    Where `shard_map` checks them (check_vma=True), types say along which axes an argument varies, and each copy of one
    that varies gets its own derivative. Unchecked, hidden states are taken to be the same on all shards.
    """
    copies = (varying(cotangent) | set(axes)) - varying(like)
    return jax.lax.psum(cotangent, tuple(sorted(copies))) if copies else cotangent


def _operand(chunks: Chunk, unembed_WxD: Float[Array, "W D"]) -> Float[Array, "W D"]:
    """Returns the unembedding in the dtype that the matmuls multiply in: the wider of the two arguments'."""
    return unembed_WxD.astype(jnp.result_type(chunks.hidden, unembed_WxD))


def no_sums(evaluate: Callable[[Chunk], Sums], chunks: Chunk) -> Sums:
    """Returns zero sums of the types that `evaluate` returns."""
    sums = jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda s: zeros(s.shape, s.dtype, s), sums)


def add(a: Sums, b: Sums) -> Sums:
    return jax.tree.map(jnp.add, a, b)
