"""The Triton kernels: their numbers in Triton's interpreter, and what they compile to for an H100, on any machine."""

import importlib
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys

import gpu_compiler as aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.plan.gpus import topology
from kdjax.types import UserError

HERE = pathlib.Path(__file__).parent
P = jax.sharding.PartitionSpec

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or aot.missing() is not None,
    reason=f"pip install 'kdjax[triton]'; {aot.missing()}",
)
if importlib.util.find_spec("jax_triton") is not None and aot.missing() is None:
    from triton_aot import EVERYTHING, N, arguments, compiled, h100s, loss_and_gradient, row_loop


@pytest.mark.slow
@needs_triton
def test_numbers() -> None:
    """Runs `triton_cases.py` in a process of its own: importing triton decides whether kernels are interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.delitem(sys.modules, "kdjax.losses.rows.triton", raising=False)
    with pytest.raises(UserError, match=r"jax_triton.*kdjax\[triton\].*choose 'pallas'"):
        importlib.import_module("kdjax.losses.rows.triton")


@needs_triton
@pytest.mark.parametrize(
    ("v", "dtype", "k"),
    [*itertools.product([128256], aot.DTYPES, aot.TOPK), (32000, "bfloat16", 100), (151936, "float32", 4)],
)
def test_compiled_for_an_h100(v: int, dtype: str, k: int) -> None:
    """Three passes, in 16-byte loads and stores, without spills or other memory as large as the logits.

    The sweep counts as writing an array because it writes -inf over each row's K entries, in the logits' memory.
    """
    mesh = h100s(1, 1)
    program, ptx = compiled(loss_and_gradient(**EVERYTHING), mesh, *arguments(mesh, v, dtype, k))
    assert aot.traffic(program.as_text(), N * v) == [("kdjax_sweep", 1, 1), ("kdjax_spread", 1, 1)]
    itemsize = jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.05 * N * v * itemsize

    # The tile of the sweep is 64 bytes per thread, that of the spread 16 logits. A masked tile follows the loop.
    accesses = {"sweep": {"ld": [16] * 4, "st": []}, "spread": {"ld": [16] * itemsize, "st": [16] * itemsize}}
    for name, expected in accesses.items():
        assert_no_spills(ptx[name])
        loop, rest = row_loop(ptx[name])
        for kind in ("ld", "st"):
            assert aot.accesses(loop, kind) == expected[kind]
            assert [size for size in aot.accesses(rest, kind) if size == 16] == expected[kind]
    *_, taught = re.split(r"st\.global\.v4", ptx["spread"])
    assert "bar.sync" in taught[: taught.index("st.global")]  # no thread may overtake another's part of the row
    assert ("cvt.rn.bf16x2.f32" in ptx["spread"]) == (dtype == "bfloat16")  # rounds to nearest, unlike the interpreter


def assert_no_spills(ptx: str) -> None:
    resources = aot.resources(ptx)
    assert (resources["spill_stores"], resources["spill_loads"]) == (0, 0)
    assert resources["registers"] <= 64  # four programs of 256 threads at a time on a multiprocessor


@needs_triton
def test_no_pass_forward_unless_a_term_needs_it() -> None:
    """Renormalised KD alone reads the taught logits only, and writes a gradient of mostly zeros."""
    mesh = h100s(1, 1)
    ptx = compiled(loss_and_gradient(), mesh, *arguments(mesh, 128256, "bfloat16", 64)).ptx
    assert max(aot.accesses(ptx["sweep"])) < 16
    loop, rest = row_loop(ptx["spread"])
    assert (aot.accesses(loop, "ld"), aot.accesses(loop, "st")) == ([], [16, 16])
    assert 16 not in aot.accesses(rest, "ld")


@needs_triton
@pytest.mark.parametrize("check_vma", [False, True])
def test_vocabulary_parallel(check_vma: bool) -> None:
    """Each GPU makes the same three passes over its shard of positions and vocabulary, even with padded columns."""
    v, mesh = 128256, h100s(2, 4)
    gradient = loss_and_gradient(axis_name="tensor", vocab_size=v - 3, **EVERYTHING)

    def local(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, logits_ct = gradient(*arguments)
        return jax.lax.psum(loss, "data"), logits_ct

    split = P("data", None, "tensor")
    in_specs = split, *[P("data")] * 4
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), split), check_vma=check_vma)
    program, ptx = compiled(sharded, mesh, *arguments(mesh, v, "bfloat16", 64))
    assert aot.traffic(program.as_text(), N // 2 * v // 4) == [("kdjax_sweep", 1, 1), ("kdjax_spread", 1, 1)]
    for kernel in ptx.values():
        assert_no_spills(kernel)
        assert set(aot.accesses(row_loop(kernel)[0])) == {16}


@needs_triton
@pytest.mark.parametrize(("gpu", "capability"), [("a100", 80), ("h100", 90), ("h200", 90), ("b200", 100)])
def test_compute_capability(gpu: str, capability: int) -> None:
    """Kernels are compiled for the GPUs of the mesh in context, which this machine need not have."""
    kernels = importlib.import_module("kdjax.losses.rows.triton")
    with jax.set_mesh(jax.sharding.Mesh(np.array(topology(gpu, 1).devices), ("x",))):
        assert kernels._compute_capability() == capability
