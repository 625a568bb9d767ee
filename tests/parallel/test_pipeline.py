"""The schedules as tables, and over a stage that is no transformer; then what the student's step takes and sends."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_problem as toy
from jax.sharding import PartitionSpec as P

from kdjax import config as configs
from kdjax.config import Config, MeshConfig
from kdjax.config.validate import resolve
from kdjax.parallel import mesh as meshes
from kdjax.parallel import pipeline
from kdjax.parallel.collectives import per_device
from kdjax.parallel.pipeline import Parts, Schedule
from kdjax.plan.flops import matmul_flops
from kdjax.plan.hlo import collectives
from kdjax.training.layout import Layout
from kdjax.training.step import make_train_step

SCHEDULES = [
    Schedule(stages, chunks, microbatches)
    for stages in (2, 3, 4, 8)
    for chunks in (1, 2, 3)
    for microbatches in (1, stages - 1, stages, stages + 1, 4 * stages)
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_item_is_worked_on_once_and_in_time(schedule: Schedule) -> None:
    """What an item needs left the neighbour one tick before; inputs stay in the ring until they are needed."""
    S, v = schedule.stages, schedule.chunks
    entering, both, leaving = schedule.phases
    forward, backward, ring = {}, {}, {}
    for t in range(leaving.stop):
        for s in range(S):
            item = schedule.forward(t, s)
            if item.exists and t not in leaving:
                key = item.microbatch, item.chunk * S + s
                assert key not in forward
                forward[key] = t
                ring[s, item.number % schedule.ring] = key
            item = schedule.backward(t, s)
            if item.exists:
                key = item.microbatch, item.chunk * S + s
                assert key not in backward
                assert t not in entering
                assert ring[s, item.number % schedule.ring] == key
                backward[key] = t
    last = v * S - 1
    everything = {(m, q) for m in range(schedule.microbatches) for q in range(last + 1)}
    assert forward.keys() == backward.keys() == everything
    for m, q in everything:
        assert q == 0 or forward[m, q - 1] == forward[m, q] - 1
        assert backward[m, q] == (forward[m, q] if q == last else backward[m, q + 1] + 1)
        assert forward[m, last] in both  # there the losses are


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_critical_path_is_that_of_1f1b(schedule: Schedule) -> None:
    """(M + P - 1)(F + B) with v = 1; with v > 1 (M + (P - 1) / v)(F + B), for whole groups of microbatches."""
    forward, backward = 3.0, 7.0
    ticks = [len(phase) for phase in schedule.phases]
    took = (ticks[0] * forward + ticks[1] * (forward + backward) + ticks[2] * backward) / schedule.chunks
    M, S, v = schedule.microbatches, schedule.stages, schedule.chunks
    groups = M if v == 1 else -(-M // S) * S
    assert took == pytest.approx((groups + (S - 1) / v) * (forward + backward))
    assert schedule.bubble == pytest.approx(1 - M * (forward + backward) / took)
    if v > 1 and M % S == 0:
        assert schedule.bubble < dataclasses.replace(schedule, chunks=1).bubble


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", [Schedule(3, 1, 4), Schedule(3, 2, 5), Schedule(3, 3, 2), Schedule(1, 1, 4)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_stage_will_do(schedule: Schedule, dtype: str) -> None:
    """Gradients of both schedules beside plain differentiation; each microbatch has its own gate on every stage."""
    S, layers, width, rows = schedule.stages, 2 * schedule.stages * schedule.chunks, 5, 3
    rng = np.random.default_rng(S + schedule.microbatches)
    weights = jnp.asarray(rng.normal(size=(layers, width, width)) / 2, dtype)
    shared = {"in": jnp.asarray(rng.normal(size=(4, width)), dtype), "out": jnp.asarray(rng.normal(size=width), dtype)}
    microbatches = {
        "row": jnp.asarray(rng.integers(4, size=(schedule.microbatches, rows))),
        "gate": jnp.asarray(rng.uniform(size=(schedule.microbatches, rows, 1)), dtype),
    }

    def run(chunk: Any, x: Any, microbatch: Any) -> Any:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w) * microbatch["gate"], None), x, chunk)[0]

    def leave(shared: Any, y: Any, microbatch: Any) -> Any:
        wide = (y @ shared["out"]).astype(jnp.float32)
        return jnp.sum(wide**2), {"rows": jnp.float32(rows), "sum": wide.sum()}

    parts = Parts(lambda shared, microbatch: shared["in"][microbatch["row"]], run, leave)

    def plain(shared: Any, weights: Any) -> Any:
        parts_of = [jax.tree.map(lambda x, m=m: x[m], microbatches) for m in range(schedule.microbatches)]
        done = [leave(shared, run(weights, parts.enter(shared, m), m), m) for m in parts_of]
        return jax.tree.map(lambda *x: sum(x), *done)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (shared, weights))
    expected, sums = jax.grad(plain, argnums=(0, 1), has_aux=True)(*wide)
    mesh = meshes.make_mesh(MeshConfig(pipe=S, data=1).sizes, jax.devices()[:S])
    stages = P(None, "pipe")

    def squeezed(method: Any, shared: Any, chunks: Any, microbatches: Any) -> Any:
        found = method(parts, schedule, shared, chunks[:, 0], microbatches)
        return found[0], found[1][:, None], found[2]

    for method in (pipeline.gradients, pipeline.gpipe_gradients):
        local = functools.partial(squeezed, method)
        mapped = per_device(local, mesh, (P(), stages, P()), (P(), stages, P()))
        shared_ct, chunks_ct, found_sums = jax.jit(mapped)(
            shared, pipeline.by_stage(weights, S, schedule.chunks), microbatches
        )
        precision = 2e-6 if dtype == "float32" else 2e-2
        for ours, theirs in zip(
            jax.tree.leaves((shared_ct, pipeline.stacked(chunks_ct))), jax.tree.leaves(expected), strict=True
        ):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, theirs, rtol=precision, atol=precision * np.abs(theirs).max())
        assert found_sums["rows"] == rows * schedule.microbatches
        np.testing.assert_allclose(found_sums["sum"], sums["sum"], rtol=10 * precision)


T, D, VOCAB = 48, 32, 768
STAGES, WIDTH = 4, 2


def compiled(directory: Path, microbatches: int, **changes: Any) -> tuple[Config, Any, Any]:
    """The student's step on pipe 4 x tensor 2, four rows a microbatch; its program and the operations of a device."""
    model = {"layers": 8, "d_model": D, "n_heads": 4, "d_ff": 96, "vocab_size": VOCAB, "tied": False}
    config = toy.config(
        directory,
        **{f"model__{name}": value for name, value in model.items()},
        **{"data__sequence_length": T, "batch__microbatch_size": 4, "batch__global_size": 4 * microbatches} | changes,
    )
    config = resolve(configs.replace(config, mesh__pipe=STAGES, mesh__data=1, mesh__tensor=WIDTH))
    mesh = meshes.make_mesh(config.mesh.sizes)
    arguments = Layout(config, mesh).abstract_state(), Layout(config, mesh).abstract_batch(toy.TOP_K)
    step: Any = make_train_step(Layout(config, mesh))
    return config, step.lower(*arguments).compile(), matmul_flops(step, *arguments)


def temp_bytes(*args: Any, **changes: Any) -> int:
    return int(compiled(*args, **changes)[1].memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("interleave", [1, 2])
def test_memory_does_not_grow_with_microbatches(tmp_path: Path, interleave: int) -> None:
    few, many = (temp_bytes(tmp_path, m, mesh__interleave=interleave) for m in (STAGES, 4 * STAGES))
    assert many <= 1.02 * few, (few, many)


@pytest.mark.slow
def test_gpipe_grows_by_at_most_two_stage_inputs_a_microbatch(tmp_path: Path) -> None:
    few, many = (temp_bytes(tmp_path, m, mesh__schedule="gpipe") for m in (STAGES, 4 * STAGES))
    stage_input = 4 * T * D * 4
    assert 0.5 * stage_input < (many - few) / (3 * STAGES) <= 2 * stage_input


@pytest.mark.slow
def test_operations_are_those_of_the_schedule(tmp_path: Path) -> None:
    """(M + P - 1)(F + B) for the layers of a stage, B being a second forward pass and twice that; 3 M for the head."""
    microbatches = 8
    config, _, counted = compiled(tmp_path, microbatches, model__remat="none")
    model, tokens = config.model, 4 * T
    kernels = D * D * 4 + 3 * D * model.d_ff
    layer = 2 * tokens * kernels + 2 * 2 * tokens * T * D  # attention: scores, then their mean of values
    forward = layer * model.layers / STAGES / WIDTH
    head = 2 * tokens * D * VOCAB / (STAGES * WIDTH)
    expected = (microbatches + STAGES - 1) * 4 * forward + microbatches * 3 * head
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("interleave", [1, 2])
def test_what_a_tick_sends(tmp_path: Path, interleave: int) -> None:
    """Neighbours' values, what the vocabulary's shards tell each other, each layer's sums; no gradients, no logits."""
    microbatches = 8
    config, program, _ = compiled(tmp_path, microbatches, mesh__interleave=interleave)
    mesh = meshes.make_mesh(config.mesh.sizes)
    pipe = {tuple(line) for line in mesh.device_ids[:, 0, 0, :].T.tolist()}
    tensor = {tuple(line) for line in mesh.device_ids[:, 0, 0, :].tolist()}
    everyone = {tuple(sorted(mesh.device_ids.flat))}
    schedule = Schedule(STAGES, interleave, microbatches)
    ticks = len(schedule.phases[1])
    found = collectives(program.as_text(), mesh.size)
    in_loop = [c for c in found if c.times == ticks]
    permutes = [c for c in in_loop if c.kind == "collective-permute"]
    assert len(permutes) == 2
    reduced = [{tuple(sorted(group)) for group in c.groups} for c in in_loop if c.kind == "all-reduce"]
    across = [groups for groups in reduced if groups != tensor]
    assert all(groups in (pipe, everyone) for groups in across)
    assert 1 <= len(across) <= 6
    repeated = [c for c in found if c.times > 1]
    assert {c.kind for c in repeated} == {"all-reduce", "collective-permute"}
    shard, tokens = VOCAB // mesh.size, 4 * T
    for logits in (f"[{tokens},{shard}]", f"[4,{T},{shard}]", f"[{shard},{tokens}]", f"{T},{VOCAB}]"):
        assert logits not in program.as_text()


@pytest.mark.slow
def test_no_gradient_travels_between_replicas_in_the_loop(tmp_path: Path) -> None:
    """Parameters are gathered before, gradients scattered after it."""
    config = toy.config(
        tmp_path, model__layers=4, model__padded_vocab_size=64, batch__global_size=32, batch__microbatch_size=2
    )
    config = resolve(configs.replace(config, mesh__pipe=2, mesh__data=2, mesh__fsdp=2))
    mesh = meshes.make_mesh(config.mesh.sizes)
    layout = Layout(config, mesh)
    step: Any = make_train_step(layout)
    program = step.lower(layout.abstract_state(), layout.abstract_batch(toy.TOP_K)).compile()
    found = collectives(program.as_text(), mesh.size)
    pipe = {tuple(line) for line in mesh.device_ids.reshape(2, -1).T.tolist()}
    assert {c.kind for c in found if c.times == 1} >= {"all-gather", "reduce-scatter"}
    for c in found:
        if c.times > 1 and c.kind != "collective-permute":
            assert c.kind == "all-reduce"
            assert {tuple(sorted(group)) for group in c.groups} <= pipe, c
