"""The loss of logits that exist anyway, with a derivative written by hand: one pass forward, one backward.

Nothing as large as the logits is stored beside them: the residuals are the K + 2 picked numbers of each row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from kdjax.losses.closed_form import Losses, Picked, evaluate, term_cotangents
from kdjax.losses.dispatch import LossCall
from kdjax.losses.objective import Supervision
from kdjax.losses.platform import platform, zeros
from kdjax.losses.rows import Rows
from kdjax.losses.vocabulary import join, taught_rows

# Bytes of one block of rows in float32, small enough to stay in a core's cache from pass to pass.
CPU_BLOCK_BYTES = 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(call: LossCall, logits: Float[Array, "*P W"], supervision: Supervision) -> Losses:
    """Returns (loss, kd, sft) of each position in nats, differentiable by the logits through any of the three.

    `logits` holds this shard's columns of the vocabulary.
    """
    return _forward(call, logits, supervision)[0]


Residuals = tuple[Float[Array, "*P W"], Supervision, Int[Array, "*P K+1"], Picked]


def _forward(call: LossCall, logits: Float[Array, "*P W"], supervision: Supervision) -> tuple[Losses, Residuals]:
    objective, vocabulary = call.objective, call.vocabulary

    def sweep(logits: Array, supervision: Supervision) -> tuple[Picked, Array | None, Array, Array | None]:
        rows = taught_rows(objective, vocabulary, logits, supervision)
        for_kd = supervision if call.kd_in_sweep else None
        swept = call.kernels.sweep(objective, rows, log_sum=objective.needs_log_sum, supervision=for_kd)
        return swept.picked, swept.kd, rows.columns, swept.without_entries

    picked, kd, columns, without_entries = _by_blocks(call, sweep, logits, supervision)
    picked = join(objective, vocabulary, picked, Rows(logits, columns), supervision)
    logits = logits if without_entries is None else without_entries
    return evaluate(objective, picked, supervision, kd), (logits, supervision, columns, picked)


def _backward(call: LossCall, residuals: Residuals, cotangents: Losses) -> tuple[Float[Array, "*P W"], None]:
    def spread(logits: Array, supervision: Supervision, columns: Array, picked: Picked, *term_ct: Array) -> Array:
        rows = Rows(logits, columns, call.vocabulary.n_valid(logits.shape[-1]))
        return call.kernels.spread(call.objective, rows, picked, supervision, *term_ct, dtype=logits.dtype)

    return _by_blocks(call, spread, *residuals, *term_cotangents(call.objective, cotangents)), None


token_losses.defvjp(_forward, _backward)


def _by_blocks(
    call: LossCall, f: Callable[..., PyTree[Array]], logits: Float[Array, "*P W"], *arrays: PyTree[Array]
) -> PyTree[Array]:
    """Returns f(logits, *arrays), whose rows are independent: block by block for XLA on a CPU, else all at once.

    On a CPU, XLA holds several float32 copies of what it works on, so it gets one block of rows at a time. N = 1024,
    V = 32768 on two cores, gradient with an SFT term: 69 ms and 3 MiB of temporaries; all at once 208 ms and 130 MiB.
    """
    block = max(1, CPU_BLOCK_BYTES // (4 * logits.shape[-1]))
    leading = logits.shape[:-1]
    n = logits.size // logits.shape[-1]
    if call.implementation != "xla" or platform() != "cpu" or n <= block:
        return f(logits, *arrays)
    flat = jax.tree.map(lambda x: x.reshape(n, *x.shape[len(leading) :]), (logits, *arrays))

    def of_block(start: int | jax.Array) -> PyTree[Array]:
        # The barrier keeps XLA from converting all 16-bit logits to float32 ahead of the loop.
        here, start = jax.lax.optimization_barrier((flat, start))
        return _bits(f(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), here)), jnp.bfloat16)

    def add_block(i: jax.Array, out: PyTree[Array]) -> PyTree[Array]:
        start = jnp.minimum(i * block, n - block)  # the last block may repeat rows of the one before it
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0), out, of_block(start)
        )

    out = jax.tree.map(lambda x: zeros((n, *x.shape[1:]), x.dtype, x), jax.eval_shape(of_block, 0))
    out = jax.lax.fori_loop(0, -(-n // block), add_block, out)
    out = _bits(out, jnp.uint16)
    return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), out)


def _bits(tree: PyTree[Array], dtype: DTypeLike) -> PyTree[Array]:
    """Returns the tree with leaves of `dtype`, bfloat16 or uint16, as the other of the two.

    XLA on a CPU updates a slice of bfloat16 through a float32 copy of the whole array.
    """
    other = jnp.uint16 if dtype == jnp.bfloat16 else jnp.bfloat16
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, other) if x.dtype == dtype else x, tree)
