"""The sets of XLA flags: this jaxlib knows each flag, and the sets have the effects they are there for."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from launching import ROOT

from kdjax.distributed import jax_private, xla_flags
from kdjax.plan.gpus import topology
from kdjax.types import UserError


def test_jax_starts_with_every_flag() -> None:
    """An unknown flag would end it, as the last one shows."""
    program = (
        "import os, jax; from kdjax.distributed import xla_flags\n"
        "for name in xla_flags.FLAG_SETS: xla_flags.apply(name, 1)\n"
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    known, unknown = (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
        for code in (program, f"import os; os.environ['XLA_FLAGS'] += ' --xla_gpu_no_such_flag=true'\n{program}")
    )
    assert (known.returncode, known.stdout) == (0, "2\n"), known.stderr
    assert unknown.returncode != 0
    assert "xla_gpu_no_such_flag" in unknown.stderr


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if JAX had not looked for devices yet."""
    monkeypatch.setattr(jax_private, "backends_are_initialized", lambda: False)


def test_flags_that_the_user_set_stay(early: None) -> None:
    environment = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=d"}
    assert xla_flags.apply("overlap", 1, environment) == "overlap"
    words = environment["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_gpu_enable_pipelined_all_gather=false", "--xla_dump_to=d"]
    assert "--xla_gpu_enable_pipelined_reduce_scatter=true" in words
    assert "--xla_gpu_all_gather_combine_threshold_bytes=536870912" in words
    assert len({word.partition("=")[0] for word in words}) == len(words) == len(xla_flags.FLAG_SETS["overlap"]) + 1


def test_the_default_set_is_logged(
    early: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(xla_flags, "_expects_gpu", lambda: True)
    with caplog.at_level("INFO", "kdjax"):
        assert [xla_flags.apply(None, pipe, {}) for pipe in (1, 2)] == ["overlap", "pipeline"]
    assert "XLA flags of pipeline (--xla is not set): --xla_gpu_enable_latency_hiding_scheduler=true" in caplog.text
    monkeypatch.setattr(xla_flags, "_expects_gpu", lambda: False)
    for name, expected in ((None, "none"), ("deterministic", "deterministic"), ("none", "none")):
        environment: dict[str, str] = {}
        assert xla_flags.apply(name, 2, environment) == expected
        assert bool(environment) == (expected != "none")


def test_a_file_of_flags_is_not_added_to(early: None) -> None:
    with pytest.raises(UserError, match=r"--xla overlap: XLA_FLAGS = flags.txt is a file; add --xla_gpu_enable_lat"):
        xla_flags.apply("overlap", 1, {"XLA_FLAGS": "flags.txt"})
    assert xla_flags.apply("none", 1, {"XLA_FLAGS": "flags.txt"}) == "none"


@pytest.mark.parametrize(
    ("platforms", "is_visible", "expected"),
    [("cpu", True, False), ("cuda,cpu", True, True), ("gpu", True, True), ("", True, True), ("cuda", False, False)],
)
def test_a_gpu_is_expected_where_jax_may_use_one(
    platforms: str, is_visible: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_private, "has_visible_nvidia_gpu", lambda: is_visible)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert xla_flags._expects_gpu() == expected
    finally:
        jax.config.update("jax_platforms", before)


def test_renamed_compiler_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX 0.12 has one mode for each kind of pipelined collective; every other option keeps its name."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    assert xla_flags.compiler_options("overlap") == xla_flags.FLAG_SETS["overlap"]
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    renamed = xla_flags.compiler_options("overlap")
    assert renamed["xla_gpu_pipeline_all_gather"] == "COLLECTIVE_PIPELINING_MODE_ON"
    assert "xla_gpu_enable_pipelined_all_gather" not in renamed
    assert renamed["xla_gpu_all_gather_combine_threshold_bytes"] == 2**29
    assert len(renamed) == len(xla_flags.FLAG_SETS["overlap"])


LAYERS, WIDTH = 4, 1024


def compiled(name: str, function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).compile(compiler_options=xla_flags.compiler_options(name)).as_text()


def layers_in_shards(kind: str, name: str) -> str:
    """Compiles two matmuls per layer, with weights gathered in the loop and their gradients scattered."""
    mesh = jax.sharding.Mesh(np.array(topology(kind, 8).devices), ("x",))

    def at(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def loss(weights: Any, x: Any) -> Any:
        def layer(x: Any, weights: Any) -> Any:
            up, down = (jax.lax.with_sharding_constraint(w, at()) for w in weights)
            return x + jax.nn.gelu(x @ up) @ down, None

        return jnp.mean(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32)))

    def gradients(weights: Any, x: Any) -> Any:
        return jax.lax.with_sharding_constraint(jax.grad(loss)(weights, x), at(None, "x"))

    def shape(sharding: NamedSharding, *size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding)

    weights = tuple(shape(at(None, "x"), LAYERS, *size) for size in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)))
    return compiled(name, gradients, weights, shape(at("x"), 16384, WIDTH))


def chain_of_stages(kind: str, name: str) -> str:
    """Compiles a scan in which each stage sends its result to the next."""
    stages = 4
    mesh = jax.sharding.Mesh(np.array(topology(kind, stages).devices), ("x",))

    def tick(carry: Any, x: Any) -> Any:
        y, w = carry
        sent = jax.lax.ppermute(y, "x", [(i, i + 1) for i in range(stages - 1)])
        y = jnp.where(jax.lax.axis_index("x") == 0, x, sent)
        for _ in range(2):
            y = jax.nn.gelu(y @ w[0])
        return (y, w), y

    def run(w: Any, x: Any) -> Any:
        return jax.lax.scan(tick, (jnp.zeros_like(x[0]), w), x)[1]

    split, whole = PartitionSpec("x"), PartitionSpec()
    spread = jax.shard_map(run, mesh=mesh, in_specs=(split, whole), out_specs=PartitionSpec(None, "x"), check_vma=False)
    w = jax.ShapeDtypeStruct((stages, WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, split))
    x = jax.ShapeDtypeStruct((7, 2048, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, whole))
    return compiled(name, spread, w, x)


def hidden_behind(hlo: str) -> dict[str, list[int]]:
    """Returns, for each kind of collective in a loop, the number of matmuls between each start and its end."""
    found: dict[str, list[int]] = {}
    running: dict[str, int] = {}
    for line in hlo.partition("\nENTRY")[0].splitlines():
        defined = re.match(r"\s+(?:ROOT )?%(\S+) = .*? (\S+?)\((?:%([\w.-]+))?", line)
        if defined is None:
            running = {}  # another computation
            continue
        name, op, operand = defined.groups()
        if op.endswith("-start") or op == "send":
            running[name] = 0
        elif op.endswith("-done") and operand in running:
            found.setdefault(op.removesuffix("-done"), []).append(running.pop(operand))
        elif "gemm" in name or "__cublas" in line:
            running = {other: count + 1 for other, count in running.items()}
    return found


@pytest.mark.usefixtures("compiler", "uncached")
@pytest.mark.parametrize("kind", ["a100", "h100"])
def test_overlap_fetches_a_layers_weights_while_the_one_before_it_computes(kind: str) -> None:
    default, overlap = (hidden_behind(layers_in_shards(kind, name)) for name in ("none", "overlap"))
    assert max(default.get("all-gather", [0])) == 0
    assert max(overlap["all-gather"]) > 0


@pytest.mark.usefixtures("compiler", "uncached")
def test_pipeline_sends_to_the_next_stage_while_computing() -> None:
    assert hidden_behind(chain_of_stages("h100", "overlap"))["collective-permute"] == [0]
    assert hidden_behind(chain_of_stages("h100", "pipeline"))["send"] == [2]


@pytest.mark.usefixtures("compiler", "uncached")
def test_deterministic_adds_without_atomics() -> None:
    """The gradient of an embedding: rows are added where a token occurs several times."""

    def gradient(ids: Any, rows: Any) -> Any:
        return jnp.zeros((1000, 64)).at[ids].add(rows)

    sharding = jax.sharding.SingleDeviceSharding(topology("h100", 1).devices[0])
    ids = jax.ShapeDtypeStruct((512,), jnp.int32, sharding=sharding)
    rows = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=sharding)
    default, deterministic = (compiled(name, gradient, ids, rows) for name in ("none", "deterministic"))
    assert "scatter(" in default
    assert "unique_indices=true" not in default
    assert "scatter(" not in deterministic or "unique_indices=true" in deterministic
