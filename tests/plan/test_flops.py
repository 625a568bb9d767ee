"""Operations counted on a traced program."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.plan.flops import matmul_flops

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 3 * 5 * 5


def test_matmuls_are_counted_with_their_batches() -> None:
    assert matmul_flops(jnp.matmul, A, B) == ONE
    assert matmul_flops(lambda a, b: jnp.sin(a + a) @ b + 1, A, B) == ONE
    assert matmul_flops(lambda a, b: jnp.einsum("nij,jk->nik", jnp.stack([a] * 7), b), A, B) == 7 * ONE


def test_loops_and_branches() -> None:
    """A scan counts its length, a conditional both branches, a while loop one iteration."""

    def scanned(a: Any, b: Any) -> Any:
        return jax.lax.scan(lambda a, _: (a @ b, None), a, None, length=11)[0]

    def branched(a: Any, b: Any) -> Any:
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ b, lambda a: a @ b @ b, a)

    def repeated(a: Any, b: Any) -> Any:
        return jax.lax.while_loop(lambda a: a[0, 0] > 0, lambda a: a @ b, a)

    assert matmul_flops(scanned, A, B) == 11 * ONE
    assert matmul_flops(branched, A, B) == 3 * ONE
    assert matmul_flops(repeated, A, B) == ONE
    assert matmul_flops(jax.jit(jax.checkpoint(scanned)), A, B) == 11 * ONE
