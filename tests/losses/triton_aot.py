"""Compiles the loss with the Triton kernels for H100s on a machine without one, and keeps the PTX of the kernels.

    JAX_PLATFORMS=cpu python tests/losses/triton_aot.py

prints as a table what `test_triton.py` asserts.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import gpu_compiler as aot
import jax
import jax.numpy as jnp
import jax_triton.triton_lib
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from kdjax.losses import topk_kd_loss
from kdjax.plan.gpus import topology

P = jax.sharding.PartitionSpec
N = 4096
EVERYTHING: dict[str, Any] = {"kd_loss": "jsd", "tail": "ghost", "sft_loss_weight": 0.4}


class Compiled(NamedTuple):
    """An XLA program and the PTX of its kernels."""

    program: Any
    ptx: dict[str, str]


def compiled(function: Callable[..., Any], mesh: Any, *arguments: Any) -> Compiled:
    """Returns the function compiled with its first argument donated: logits that nothing needs later."""
    ptx: dict[str, str] = {}
    compile_ttir = jax_triton.triton_lib.compile_ttir_inplace

    def keep(*args: Any) -> Any:
        result = compile_ttir(*args)
        ptx[result.name] = result.binary
        return result

    with (
        mock.patch.object(jax_triton.triton_lib, "compile_ttir_inplace", keep),
        mock.patch.dict(jax_triton.triton_lib._COMPILED_KERNEL_CACHE, clear=True),
        jax.set_mesh(mesh),
        _not_cached(),
    ):
        program = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
    return Compiled(program, ptx)


@contextlib.contextmanager
def _not_cached() -> Iterator[None]:
    """Turns off JAX's cache on disk, which writes programs for absent GPUs but cannot read them."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def h100s(data: int, tensor: int) -> Any:
    """Returns a mesh of data * tensor H100s."""
    devices = np.array(topology("h100", data * tensor).devices).reshape(data, tensor)
    return jax.sharding.Mesh(devices, ("data", "tensor"))


def arguments(mesh: Any, v: int, dtype: str, k: int) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of logits, top-k, labels and teacher's logsumexp of N positions, split over the mesh."""

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, P("data", None, *axes))
        return jax.ShapeDtypeStruct((2, N // 2, *shape), dtype, sharding=sharding)

    number = array((), jnp.float32)
    return [
        array((v,), dtype, "tensor"),
        array((k,), jnp.float32),
        array((k,), jnp.int32),
        array((), jnp.int32),
        number,
    ]


def loss_and_gradient(**settings: Any) -> Callable[..., Any]:
    """Returns a function of `arguments` for the summed loss and its derivative by the logits."""

    def total(
        logits: jax.Array, topk_logits: jax.Array, ids: jax.Array, labels: jax.Array, lse: jax.Array
    ) -> jax.Array:
        teaching = topk_logits, ids, labels
        return topk_kd_loss(logits, *teaching, log_sum_exp_logits=lse, implementation="triton", **settings)[0].sum()

    return jax.value_and_grad(total)


def row_loop(ptx: str) -> tuple[str, str]:
    """Returns the loop over the row, which is the one that moves the most bytes, and everything else."""
    loops = [(0, 0)]
    for branch in re.finditer(r"@%p\d+ bra\s+(\$L\w+);", ptx):
        start = ptx.find(f"\n{branch[1]}:", 0, branch.start())
        loops += [(start, branch.end())] if start >= 0 else []
    start, end = max(loops, key=lambda loop: sum(aot.accesses(ptx[slice(*loop)])))
    return ptx[start:end], ptx[:start] + ptx[end:]


def main() -> None:
    """Prints the table."""
    print("| V | logits | K | kernel | registers | spills | loop: loads, stores | after it | reads [N, V] | writes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    mesh = h100s(1, 1)
    for v in aot.VOCABULARIES:
        for dtype in aot.DTYPES:
            for k in aot.TOPK:
                program, ptx = compiled(loss_and_gradient(**EVERYTHING), mesh, *arguments(mesh, v, dtype, k))
                for kernel, reads, writes in aot.traffic(program.as_text(), N * v):
                    name = kernel.removeprefix("kdjax_")
                    resources = aot.resources(ptx[name])
                    spills = resources["spill_stores"] + resources["spill_loads"]
                    counts = [
                        ", ".join(f"{aot.accesses(part, kind).count(16)} x 16 B" for kind in ("ld", "st"))
                        for part in row_loop(ptx[name])
                    ]
                    print(
                        f"| {v} | {dtype} | {k} | {name} | {resources['registers']} | {spills}"
                        f" | {counts[0]} | {counts[1]} | {reads} | {writes} |"
                    )


if __name__ == "__main__":
    main()
