"""The unembedding and the loss in one, chunk of tokens by chunk of tokens: the logits [B, T, V] never exist.

A chunk's logits are gone once its gradients are made, in the forward pass already: three matmuls in all, not
the four of recomputing the logits backwards. That is possible because the result is a sum, whose one scalar
cotangent can be multiplied in afterwards; so the per-token weights come in as `loss_mask`.
Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989) does the same for labels.

What happens to one chunk is the business of `dense.py` (all logits) or `gathered.py` (K of them).
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.dispatch import LossCall
from kdjax.losses.fused import dense, gathered
from kdjax.losses.fused.chunk import Chunk, split
from kdjax.losses.objective import LossSums, Supervision, computation_dtype
from kdjax.losses.platform import platform, varying, zeros

# A chunk's logits take 4 C V bytes, and every chunk reads and writes the unembedding's gradient once. On two
# cores, N = 1024, V = 49152, D = 128, float32, 128 was both the fastest and smaller than what came next:
# C = 64 687 ms, 36 MiB; 128 608 ms, 48 MiB; 256 680 ms, 97 MiB; 512 709 ms, 193 MiB; all at once, by JAX's
# own differentiation, 741 ms, 576 MiB. An accelerator needs more rows to be worth that traffic:
# 2048 keep its 12 V D bytes to a quarter of the 6 C V D operations' time on an H100 (arithmetic, not measured).
DENSE_CHUNK_TOKENS = {"cpu": 128}
DENSE_CHUNK_TOKENS_ELSEWHERE = 2048

# A chunk's gathered rows take C K D elements and are read again for the gradients, the sooner the better: on two
# cores, N = 1024, V = 32768, D = 512, K = 64, C = 16 took 42 ms and 2 MiB, 32 40 ms and 4 MiB, 128 45 ms and 17 MiB,
# 256 62 ms and 33 MiB. 256 keep an accelerator's rows to 128 MiB at K = 64, D = 4096 in bfloat16.
GATHERED_CHUNK_TOKENS = {"cpu": 32}
GATHERED_CHUNK_TOKENS_ELSEWHERE = 256


def linear_losses(
    call: LossCall,
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "W D"],
    supervision: Supervision,
    loss_mask: Float[Array, "B T"],
    chunk_tokens: int | None = None,
) -> LossSums:
    """The sums over all positions, by `lax.scan` over chunks of at most `chunk_tokens` of them.

    The gradient takes, beside its results, about [W, D] and one chunk's logits [C, W] in float32; gathered,
    [W, D] and the chunk's rows [C, K, D].
    """
    chunk_tokens = _chunk_tokens(call) if chunk_tokens is None else chunk_tokens
    weight = loss_mask.astype(computation_dtype(hidden, unembed))
    chunks = split(hidden, weight, supervision, chunk_tokens)
    return _sums(call, chunks.hidden, unembed, chunks.weight, chunks.supervision)


def _path(call: LossCall) -> ModuleType:
    return gathered if call.implementation == "gathered" else dense


def _chunk_tokens(call: LossCall) -> int:
    if _path(call) is gathered:
        return GATHERED_CHUNK_TOKENS.get(platform(), GATHERED_CHUNK_TOKENS_ELSEWHERE)
    return DENSE_CHUNK_TOKENS.get(platform(), DENSE_CHUNK_TOKENS_ELSEWHERE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    call: LossCall,
    hidden: Float[Array, "n C D"],
    unembed_WxD: Float[Array, "W D"],
    weight: Float[Array, "n C"],
    supervision: Supervision,
) -> LossSums:
    """Losses only: one matmul."""
    chunks = Chunk(hidden, weight, supervision)
    operand_WxD = _operand(chunks, unembed_WxD)

    def evaluate(chunk: Chunk) -> LossSums:
        return _path(call).evaluate_chunk(call, chunk, operand_WxD)[0]

    start = _no_sums(evaluate, chunks)
    return jax.lax.scan(lambda sums, chunk: (_add(sums, evaluate(chunk)), None), start, chunks)[0]


class _Gradients(NamedTuple):
    """Derivatives of the loss sum in the computation dtype; empty arrays carry the types to return."""

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
) -> tuple[LossSums, _Gradients]:
    """Losses and both gradients of their weighted sum: three matmuls, accumulated in the computation dtype."""
    chunks = Chunk(hidden, weight, supervision)
    operand_WxD = _operand(chunks, unembed_WxD)
    path = _path(call)

    def evaluate(unembed_ct: Array, chunk: Chunk) -> tuple[LossSums, Array, Array]:
        sums, made = path.evaluate_chunk(call, chunk, operand_WxD)
        hidden_ct, unembed_ct = path.differentiate_chunk(call, chunk, operand_WxD, made, unembed_ct)
        return sums, unembed_ct, hidden_ct

    def body(carry: tuple[LossSums, Array], chunk: Chunk) -> tuple[tuple[LossSums, Array], Float[Array, "C D"]]:
        sums, unembed_ct, hidden_ct = evaluate(carry[1], chunk)
        return (_add(carry[0], sums), unembed_ct), hidden_ct

    no_gradient = zeros(unembed_WxD.shape, weight.dtype, chunks, unembed_WxD)
    start = (_no_sums(lambda chunk: evaluate(no_gradient, chunk)[0], chunks), no_gradient)
    (sums, unembed_ct), hidden_ct = jax.lax.scan(body, start, chunks)
    return sums, _Gradients(hidden_ct, unembed_ct, hidden[:0], unembed_WxD[:0])


def _scale_gradients(
    call: LossCall, gradients: _Gradients, sums_ct: LossSums
) -> tuple[Float[Array, "n C D"], Float[Array, "W D"], None, None]:
    """The gradients times the loss's cotangent, summed over shards, rounded to the arguments' dtypes at the end."""
    axes = call.vocabulary.axis_names
    hidden_ct = _sum_over_copies(sums_ct.loss * gradients.hidden, gradients.like_hidden, axes)
    unembed_ct = _sum_over_copies(sums_ct.loss * gradients.unembed, gradients.like_unembed, ())
    return (
        hidden_ct.astype(gradients.like_hidden.dtype),
        unembed_ct.astype(gradients.like_unembed.dtype),
        None,
        None,
    )


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _sum_over_copies(cotangent: Array, like: Array, axes: tuple[str, ...]) -> Array:
    """A cotangent summed over the mesh axes along which its argument is one value: `axes`, at least.

    Where `shard_map` checks them (check_vma=True), types say along which axes an argument varies: each copy
    of one that varies gets its own derivative. Unchecked, hidden states are taken to be the same on all shards.
    """
    copies = (varying(cotangent) | set(axes)) - varying(like)
    return jax.lax.psum(cotangent, tuple(sorted(copies))) if copies else cotangent


def _operand(chunks: Chunk, unembed_WxD: Float[Array, "W D"]) -> Float[Array, "W D"]:
    """The unembedding in the dtype that the matmuls multiply in: the wider of the two arguments'."""
    return unembed_WxD.astype(jnp.result_type(chunks.hidden, unembed_WxD))


def _no_sums(evaluate: Callable[[Chunk], LossSums], chunks: Chunk) -> LossSums:
    """The sums over no chunk."""
    sums = jax.eval_shape(evaluate, jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda s: zeros(s.shape, s.dtype, s), sums)


def _add(a: LossSums, b: LossSums) -> LossSums:
    return jax.tree.map(jnp.add, a, b)
