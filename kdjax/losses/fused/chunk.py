"""A chunk of positions, the unit in which the fused losses work, and the sums over one."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kdjax.losses.closed_form import Losses
from kdjax.losses.objective import LossSums, Supervision


class Chunk(NamedTuple):
    """C positions, or n chunks of them under a leading axis."""

    hidden: Float[Array, "*n C D"]
    weight: Float[Array, "*n C"]  # in the computation dtype
    supervision: Supervision

    @property
    def masked(self) -> Bool[Array, "*n C"]:
        """Positions of weight 0, which may hold anything, NaN too."""
        return jnp.equal(self.weight, 0)

    def operand(self, dtype: jnp.dtype) -> Float[Array, "*n C D"]:
        """The hidden states as the matmuls take them: in `dtype`, 0 where masked."""
        return jnp.where(self.masked[..., None], 0, self.hidden).astype(dtype)


def split(
    hidden: Float[Array, "B T D"], weight: Float[Array, "B T"], supervision: Supervision, chunk_tokens: int
) -> Chunk:
    """The positions as n even chunks of at most `chunk_tokens`, padded by less than one token a chunk."""
    tokens = weight.size
    n = max(1, math.ceil(tokens / chunk_tokens))
    c = math.ceil(tokens / n)

    def chunked(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, n * c - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, c, *x.shape[1:])

    return Chunk(chunked(hidden), chunked(weight), jax.tree.map(chunked, supervision))


def weigh(
    chunk: Chunk,
    losses: Losses,
    top1_agreement: Float[Array, "C"] | None,
    student_topk_mass: Float[Array, "C"] | None,
) -> LossSums:
    """The sums over the chunk, each position by its weight; a masked one counts for nothing, whatever it holds."""
    terms = LossSums(*losses, jnp.ones_like(chunk.weight), top1_agreement, student_topk_mass)
    return jax.tree.map(lambda term: jnp.where(chunk.masked, 0, chunk.weight * term).sum(), terms)
