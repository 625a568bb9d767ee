"""What the Pallas kernels compile to for an H100, on a machine without one; `gpu_compiler.py` does the counting."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_compiler as aot
import jax
import pytest

from kdjax.losses.rows import pallas

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
THREE_PASSES = [["kdjax_sweep", 1, 0], ["kdjax_spread", 1, 1]]  # (kernel, [N, V] read, [N, V] written)
# A ghost's sweep counts as writing an array: it writes -inf over the K entries of each row, in the logits' memory.
GHOST_PASSES = [["kdjax_sweep", 1, 1], ["kdjax_spread", 1, 1]]
Compiled = Callable[[aot.Case], dict[str, Any]]

pytestmark = pytest.mark.slow  # the first test, which compiles for all of them
each = pytest.mark.parametrize("case", [*aot.GRID, aot.GHOST], ids=lambda case: case.name)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    if (reason := aot.missing()) is not None:
        pytest.skip(reason)
    results = json.loads(aot.run())
    return lambda case: results[aot.CASES.index(case)]


def assert_whole_row(case: aot.Case, kernel: dict[str, Any], kind: str) -> None:
    """Asserts that the row is loaded or stored once, 16 bytes at a time, up to the end of the last, masked tile."""
    moved, row = kernel[kind], case.v * (4 if case.dtype == "float32" else 2)
    assert moved["bytes_per_access"] == 16
    assert row <= moved["bytes"] < row + kernel["threads"] * 16 * pallas.LOADS


def assert_nothing_large_beside(case: aot.Case, result: dict[str, Any]) -> None:
    """Asserts that a row takes its columns and the picked logits, twice, and a few numbers.

    For a ghost, whose kd XLA evaluates after the sweep, it takes K numbers more.
    """
    arrays = 3 if case == aot.GHOST else 2
    assert result["temp_bytes"] <= aot.N * (arrays * case.k + 16) * 4


@each
def test_three_passes_over_the_logits(compiled: Compiled, case: aot.Case) -> None:
    result = compiled(case)
    assert result["traffic"] == (GHOST_PASSES if case == aot.GHOST else THREE_PASSES)
    assert result["kernels"]["kdjax_sweep"]["st"]["bytes_per_access"] <= 4
    assert result["kernels"]["kdjax_sweep"]["st"]["in_loop"] == 0
    assert_whole_row(case, result["kernels"]["kdjax_sweep"], "ld")
    assert_whole_row(case, result["kernels"]["kdjax_spread"], "ld")
    assert_whole_row(case, result["kernels"]["kdjax_spread"], "st")


@each
def test_no_memory_as_large_as_the_logits(compiled: Compiled, case: aot.Case) -> None:
    result = compiled(case)
    assert_nothing_large_beside(case, result)
    assert result["output_bytes_not_aliased"] < 1024, "the gradient takes the logits' memory"


@pytest.mark.parametrize("case", [*aot.GRID, aot.GHOST, aot.KD_ONLY, aot.UNALIGNED], ids=lambda case: case.name)
def test_no_spills(compiled: Compiled, case: aot.Case) -> None:
    kernels = compiled(case)["kernels"]
    assert set(kernels) == {"kdjax_sweep", "kdjax_spread"}
    for kernel in kernels.values():
        assert kernel["spill_loads"] == kernel["spill_stores"] == 0


@each
def test_four_programs_fit_on_a_multiprocessor(compiled: Compiled, case: aot.Case) -> None:
    for kernel in compiled(case)["kernels"].values():
        assert kernel["registers"] * kernel["threads"] * 4 <= 65536


@each
def test_taught_columns_are_written_after_all_others(compiled: Compiled, case: aot.Case) -> None:
    """Other threads have just written there; at K = 4 no reduction's barrier can stand in for the kernel's own."""
    waits = compiled(case)["kernels"]["kdjax_spread"]["barriers"]
    assert waits == 1 if case.k == 4 else waits >= 1


def test_kd_alone_reads_no_row(compiled: Compiled) -> None:
    """`sweep` reads K + 1 logits of a row, `spread` none: it writes zeros and K values."""
    result = compiled(aot.KD_ONLY)
    kernels = result["kernels"]
    assert result["traffic"] == THREE_PASSES
    for kernel in kernels.values():
        assert kernel["ld"]["bytes_per_access"] <= 4
        assert kernel["ld"]["bytes"] < 32 * kernel["threads"] * 4
    assert_whole_row(aot.KD_ONLY, kernels["kdjax_spread"], "st")


def test_rows_of_any_alignment(compiled: Compiled) -> None:
    result = compiled(aot.UNALIGNED)
    assert result["traffic"] == THREE_PASSES
    assert result["kernels"]["kdjax_sweep"]["ld"]["bytes_per_access"] == 2


def test_logits_that_are_kept_are_copied(compiled: Compiled) -> None:
    """One more read and write, which shows that the counting works, and the gradient has memory of its own."""
    result = compiled(aot.KEPT)
    assert result["traffic"] == [["copy", 1, 1], *THREE_PASSES]
    assert result["output_bytes_not_aliased"] > aot.N * aot.KEPT.v * 2


def test_xla_reads_the_logits_twice(compiled: Compiled) -> None:
    """Once for the maximum and once for the sum; besides, to pick the taught logits and to overwrite them."""
    result = compiled(aot.XLA)
    assert [(read, written) for _, read, written in result["traffic"]] == [(1, 0)] * 3 + [(1, 1)] * 2


def test_the_documented_table_is_what_comes_out(compiled: Compiled) -> None:
    text = DOCS.read_text()
    made_with = f"JAX {jax.__version__}, ptxas {aot.ptxas_version()}"
    if made_with not in text:
        pytest.skip(f"docs/kernels.md was not made with {made_with}")
    assert aot.table([compiled(case) for case in aot.GRID]) in text
