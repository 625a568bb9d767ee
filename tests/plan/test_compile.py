"""Training steps compiled for GPUs that are not here: memory, operations and collectives."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from example_plans import FLAGS, compiled, config

import kdjax.plan.__main__ as command
from kdjax.config import Config
from kdjax.distributed import xla_flags
from kdjax.model import param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.plan import roofline, search, table
from kdjax.plan.compile import compile_only, make_plan
from kdjax.plan.flops import matmul_flops
from kdjax.plan.gpus import TARGETS, topology
from kdjax.plan.roofline import Plan
from kdjax.training.layout import Layout
from kdjax.training.memory import held_bytes
from kdjax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("compiler", "uncached")


def traced_flops(plan: Plan, layout: Layout) -> int:
    """Returns the matmul operations per device of the step as JAX traced it."""
    return matmul_flops(make_train_step(layout), layout.abstract_state(), layout.abstract_batch(64))


@pytest.mark.slow
def test_memory_and_work_shrink_as_more_devices_share_them() -> None:
    """The model's bytes by what splits them; the matmuls by the devices."""
    whole, shared = compiled(unmerged=True), compiled(mesh__fsdp=4, mesh__tensor=2)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(whole.config.model)))
    nbytes = 4 * count
    assert whole.memory["parameters"] == whole.memory["gradients"] == nbytes
    # Adam's two moments, over the eight replicas where an axis divides, and its count of steps.
    assert whole.memory["optimiser"] == pytest.approx(2 * nbytes / 8, rel=0.01)
    assert shared.memory["parameters"] == pytest.approx(nbytes / 8, rel=0.01)
    assert shared.memory["gradients"] == pytest.approx(nbytes / 2, rel=0.01)
    assert shared.memory["optimiser"] == pytest.approx(nbytes / 4, rel=0.01)
    for plan in (whole, shared):
        assert plan.fits
        assert min(plan.memory.values()) >= 0, plan.memory
        layout = Layout(plan.config, meshes.make_mesh(plan.config.mesh.sizes, topology("h100", 8).devices))
        floor = sum(held_bytes(layout).values()) + search.activation_bytes(plan.config, layout.mesh)
        assert 0.5 * plan.total_bytes < floor <= plan.total_bytes
        assert plan.flops == pytest.approx(traced_flops(plan, layout), rel=0.02), "XLA's program against JAX's"
    assert shared.flops == pytest.approx(whole.flops, rel=0.01)  # 16 rows over 8 devices, or over 4 with half the width
    model, tokens = whole.config.model, 16 * 512 / 8
    linear = count - model.vocab_size * model.d_model  # the embedding multiplies nothing
    assert whole.flops > 2 * tokens * linear * 3  # forward, backward twice that; and the layers once more
    assert whole.flops < 2 * tokens * linear * 4.5
    assert 0.7 * whole.flops < roofline.model_flops(whole.config) / 8 < whole.flops
    large = [c for c in shared.collectives if c.sent_bytes > 2**20]
    assert {(c.kind, c.axes(shared.mesh_shape)) for c in large} == {
        ("all-reduce", ("tensor",)),
        ("all-gather", ("fsdp",)),
        ("reduce-scatter", ("fsdp",)),
    }
    assert all(c.in_loop == (c.axes(shared.mesh_shape) == ("tensor",)) for c in large)
    assert {c.axes(whole.mesh_shape) for c in whole.collectives} == {("data",)}
    # The compiler option reached the compiler: each parameter's gradient is scattered by itself.
    scattered = [c for c in whole.collectives if c.kind == "reduce-scatter"]
    assert len(scattered) == len(jax.tree.leaves(param_shapes(model)))
    assert (whole.flags, shared.flags) == ("overlap", "overlap")


@pytest.mark.slow
def test_a_compiled_plan_is_printed_and_drawn(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The exit code is 0 where it fits, 1 where it does not."""
    plan = compiled(mesh__fsdp=4, mesh__tensor=2)
    monkeypatch.setattr(command, "compile_only", lambda: None)  # which concerns a process of its own

    def make_plan(config: Config, target: str, devices: int, *arguments: Any) -> Plan:
        assert dataclasses.replace(config, mesh=plan.config.mesh) == plan.config
        assert (target, devices, arguments) == ("h100", 8, (64, None))
        return plan

    monkeypatch.setattr(command, "make_plan", make_plan)
    words = [*FLAGS, "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    assert command.main([*words, "--picture", str(tmp_path / "plan.svg")]) == 0
    out = capsys.readouterr().out
    assert "8 x NVIDIA H100 80GB HBM3" in out
    assert "fits; limit: 90% of 79.1 GiB" in out
    assert "reduce-scatter     over fsdp" in out
    assert "gpt2b_nemotron8b on 8 x NVIDIA H100" in (tmp_path / "plan.svg").read_text()
    monkeypatch.setitem(TARGETS, "h100", dataclasses.replace(TARGETS["h100"], memory=2**30))
    assert command.main(words) == 1
    assert "DOES NOT FIT; limit: 90% of 1.0 GiB" in capsys.readouterr().out


def test_compiler_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that training would set, unless XLA_FLAGS sets them, and then the caller's options."""

    class NotCompiled(Exception):
        pass

    class Step:
        def lower(self, state: Any, batch: Any) -> "Step":
            assert batch.topk_logits.shape == (16, 512, 7)
            return self

        def compile(self, options: dict[str, Any]) -> None:
            raise NotCompiled(options)

    def options_of(flags: str | None = None, **changes: Any) -> dict[str, Any]:
        with pytest.raises(NotCompiled) as caught:
            make_plan(config(**changes), "h100", 2, top_k=7, flags=flags, options={"xla_gpu_autotune_level": 3})
        return caught.value.args[0]

    monkeypatch.setattr("kdjax.plan.compile.make_train_step", lambda layout: Step())
    overlap = xla_flags.compiler_options("overlap")
    assert options_of() == overlap | {"xla_gpu_autotune_level": 3}
    piped = options_of(mesh__pipe=2, mesh__data=1)
    assert piped == xla_flags.compiler_options("pipeline") | {"xla_gpu_autotune_level": 3}
    assert options_of("deterministic") == {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 3}
    assert options_of("none") == {"xla_gpu_autotune_level": 3}
    scheduler = "xla_gpu_enable_latency_hiding_scheduler"
    monkeypatch.setenv("XLA_FLAGS", f"--{scheduler}=false")
    assert options_of().keys() == overlap.keys() - {scheduler} | {"xla_gpu_autotune_level"}


def test_nothing_but_the_cpu_is_used_and_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[str, Any] = {}
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setattr("kdjax.cli.stay_on_host", lambda: updates.__setitem__("platform", "host"))
    compile_only()
    assert updates == {"platform": "host", "jax_enable_compilation_cache": False}


@pytest.mark.slow
def test_a_pipeline_idles_and_computes_its_bubble() -> None:
    """One tick in five is idle, and computed; interleaved, one in nine. The head runs once per microbatch."""
    changes = {"model__layers": 4, "mesh__pipe": 2, "mesh__data": 1, "batch__global_size": 4}
    changes |= {"model__norm": "rmsnorm", "model__activation": "gelu"}  # compile faster
    plain, interleaved = (compiled(2, **changes, mesh__interleave=chunks) for chunks in (1, 2))
    assert plain.schedule.bubble == pytest.approx(1 / 5)  # (P - 1) / (M + P - 1)
    assert interleaved.schedule.bubble == pytest.approx(1 / 9)
    assert plain.flags == "pipeline"
    model, tokens = plain.config.model, 512
    kernels = roofline.matmul_parameters(plain.config) - model.vocab_size * model.d_model
    attention = 2 * model.layers * 512 * model.d_model
    layers = 2 * tokens * (kernels + attention) / 2  # forward, per microbatch and device
    head = 2 * tokens * model.vocab_size * model.d_model / 2
    # Forward, once more for all but a chunk's last layer, once more for each layer, and backward.
    assert plain.flops == pytest.approx(5 * 4.5 * layers + 4 * 3 * head, rel=0.03)
    assert interleaved.flops == pytest.approx(4.5 * 4 * layers + 4 * 3 * head, rel=0.03)
    for plan in (plain, interleaved):
        permutes = [c for c in plan.collectives if c.kind == "collective-permute"]
        assert {c.axes(plan.mesh_shape) for c in permutes} == {("pipe",)}
        entering, both, leaving = map(len, plan.schedule.phases)
        unread = leaving == 1  # what is sent in the last tick; XLA drops it where that is a loop of its own
        assert sum(c.times for c in permutes) == entering + 2 * both + leaving - unread
        assert all(c.in_loop for c in permutes if c.times > 1)
    assert "bubble             20.0%    of the layers' time: 2 stages x 1 chunks, 4 microbatches" in table.render(plain)
