"""Compiling a run for GPUs that are not here: memory, operations, collectives, times, and the verdict."""

import builtins
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import pytest

from kdjax import config as configs
from kdjax.config import command_line
from kdjax.config.validate import resolve
from kdjax.model import param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.plan import compile, plot, roofline, search, table
from kdjax.plan.flops import matmul_flops
from kdjax.plan.gpus import TARGETS, topology
from kdjax.plan.hlo import Collective, Work
from kdjax.plan.roofline import Plan
from kdjax.training import memory
from kdjax.training.step import abstract_state, make_train_step
from kdjax.types import UserError

CONFIG = Path(__file__).parent.parent.parent / "configs" / "gpt2b_nemotron8b.py"
SMALL = {"model__layers": 2, "batch__global_size": 16, "data__sequence_length": 512, "model__attention": "xla"}
SHAPE = {"pipe": 1, "data": 1, "fsdp": 1, "tensor": 8}
TENSOR, DATA_OF_TWO_HOSTS = (tuple(range(8)),), tuple((i, i + 8) for i in range(8))


def config(**changes: object) -> configs.Config:
    return resolve(configs.replace(configs.build(command_line.load(CONFIG)), **SMALL | changes))


def imagined(config: configs.Config, nbytes: int = 2**30, step_s: float = 1.0, **changes: Any) -> Plan:
    """A plan that nothing was compiled for, of a step that takes so long."""
    shape = {axis: max(1, getattr(config.mesh, axis)) for axis in meshes.AXES}
    kernels = [(1.0, Work(0, round(step_s * TARGETS["h100"].memory_bandwidth)))]
    made = Plan(config, "h100", shape, {"parameters": nbytes}, kernels, [], "none", 1.0)
    return dataclasses.replace(made, **changes)


def written_flops(made: Plan, mesh: jax.sharding.Mesh) -> int:
    """Of a device, as JAX wrote the program."""
    arguments = abstract_state(made.config, mesh), compile.abstract_batch(made.config, mesh, 64)
    return matmul_flops(make_train_step(made.config, mesh), *arguments)


@pytest.mark.usefixtures("compiler", "uncached")
def test_memory_and_work_go_down_as_devices_share_them() -> None:
    """Of a model's bytes, those that are split; of the matmuls, each device its share."""
    whole, shared = (
        compile.make_plan(config(mesh__fsdp=fsdp, mesh__tensor=tensor), "h100_sxm", 8)
        for fsdp, tensor in ((1, 1), (4, 2))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(whole.config.model)))
    nbytes = 4 * count
    assert whole.memory["parameters"] == whole.memory["gradients"] == nbytes
    # Adam's two moments, over the eight replicas where an axis divides, and its count of steps.
    assert whole.memory["optimiser"] == pytest.approx(2 * nbytes / 8, rel=0.01)
    assert shared.memory["parameters"] == pytest.approx(nbytes / 8, rel=0.01)
    assert shared.memory["gradients"] == pytest.approx(nbytes / 2, rel=0.01)
    assert shared.memory["optimiser"] == pytest.approx(nbytes / 4, rel=0.01)
    for made in (whole, shared):
        assert made.fits
        assert min(made.memory.values()) >= 0, made.memory
        mesh = meshes.make_mesh(made.config.mesh, topology("h100", 8).devices)
        floor = sum(memory.held(made.config, mesh).values()) + search.kept(made.config, mesh)
        assert 0.5 * made.nbytes < floor <= made.nbytes
        assert made.flops == pytest.approx(written_flops(made, mesh), rel=0.02), "XLA's program against JAX's"
    assert shared.flops == pytest.approx(whole.flops, rel=0.01)  # 16 rows over 8 devices, or over 4 with half the width
    model, tokens = whole.config.model, 16 * 512 / 8
    linear = count - model.vocab_size * model.d_model  # the embedding multiplies nothing
    assert whole.flops > 2 * tokens * linear * 3  # forward, twice back; and the layers once more
    assert whole.flops < 2 * tokens * linear * 4.5
    assert 0.7 * whole.flops < roofline.model_flops(whole.config) / 8 < whole.flops
    over = {(c.kind, c.axes(shared.shape)) for c in shared.collectives if c.wire_bytes > 2**20}
    assert over == {("all-reduce", ("tensor",)), ("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}
    assert {c.axes(whole.shape) for c in whole.collectives} == {("data",)}
    assert all(c.in_loop == (c.axes(shared.shape) == ("tensor",)) for c in shared.collectives if c.wire_bytes > 2**20)


@pytest.mark.usefixtures("compiler", "uncached")
def test_a_pipeline_idles_and_computes_its_bubble() -> None:
    """One tick in five is idle, and computed; interleaved, one in nine. The head runs once a microbatch."""
    changes = {"model__layers": 4, "mesh__pipe": 2, "mesh__data": 1, "batch__global_size": 4}
    plain, interleaved = (compile.make_plan(config(**changes, mesh__interleave=chunks), "h100", 2) for chunks in (1, 2))
    assert plain.schedule.bubble == pytest.approx(1 / 5)  # (P - 1) / (M + P - 1)
    assert interleaved.schedule.bubble == pytest.approx(1 / 9)
    assert plain.flags == "pipeline"
    model, tokens = plain.config.model, 512
    kernels = roofline.matmul_parameters(plain.config) - model.vocab_size * model.d_model
    layers = 2 * tokens * (kernels + 2 * model.layers * 512 * model.d_model) / 2  # of a microbatch and device, forward
    head = 2 * tokens * model.vocab_size * model.d_model / 2
    # Forward, once more for all but a chunk's last layer, once more for each layer, and backward.
    assert plain.flops == pytest.approx(5 * 4.5 * layers + 4 * 3 * head, rel=0.03)
    assert interleaved.flops == pytest.approx(4.5 * 4 * layers + 4 * 3 * head, rel=0.03)
    for made in (plain, interleaved):
        permutes = [c for c in made.collectives if c.kind == "collective-permute"]
        assert {c.axes(made.shape) for c in permutes} == {("pipe",)}
        entering, both, leaving = map(len, made.schedule.phases)
        unread = leaving == 1  # what is sent in the last tick; XLA drops it where that is a loop of its own
        assert sum(c.times for c in permutes) == entering + 2 * both + leaving - unread
        assert all(c.in_loop for c in permutes if c.times > 1)
    assert "bubble             20.0%" in table.tell(plain)


@pytest.mark.usefixtures("compiler", "uncached")
def test_compiler_options_reach_the_compiler() -> None:
    """Unmerged, each parameter's gradient is scattered by itself."""
    made = compile.make_plan(config(), "h100", 2, options={"xla_gpu_reduce_scatter_combine_threshold_bytes": 0})
    scattered = [c for c in made.collectives if c.kind == "reduce-scatter"]
    assert len(scattered) == len(jax.tree.leaves(param_shapes(made.config.model)))


def test_seconds_of_a_roofline() -> None:
    """An H100: 0.75 x 989e12 operations, 3.35e12 bytes, 450e9 over NVLink, 50e9 over each port of a host."""
    card = TARGETS["h100"]
    second = round(0.75 * card.peak)
    hidden = Collective("all-reduce", 9 * 10**9, 4, TENSOR, True, Work(second // 100, 0))
    exposed = Collective("collective-permute", 10**9, 2, ((0, 8), (8, 0)))
    made = imagined(config(), kernels=[(2.0, Work(second, 1)), (1, Work(0, card.memory_bandwidth))])
    made = dataclasses.replace(made, collectives=[hidden, exposed], shape=SHAPE | {"data": 2})
    assert made.matmul_s == pytest.approx(2)
    assert made.compute_s == pytest.approx(3)
    assert made.sent_s(hidden) == pytest.approx(4 * 9e9 * 2 * 7 / 8 / 450e9)
    assert made.hidden_s == pytest.approx(4 * 0.01)
    assert made.sent_s(exposed) == pytest.approx(2 * 1e9 / 50e9)
    assert made.step_s == pytest.approx(3 + 0.14 - 0.04 + 0.04)
    assert made.best_s == pytest.approx(2)
    across = Collective("all-gather", 16 * 10**9, 1, (tuple(range(16)),))
    assert made.sent_s(across) == pytest.approx(15e9 / 400e9), "eight ports a host"
    assert made.sent_s(dataclasses.replace(across, groups=DATA_OF_TWO_HOSTS)) == pytest.approx(8e9 / 50e9)
    assert made.mfu == pytest.approx(roofline.model_flops(made.config) / (16 * card.peak * made.step_s))


def test_model_flops_by_hand() -> None:
    """GPT-2B's shape at two layers: attention 4 D^2, SwiGLU 3 D F, the head V D; causal attention 6 L T D a token."""
    layer = 4 * 2048**2 + 3 * 2048 * 5440
    assert roofline.matmul_parameters(config()) == 2 * layer + 256000 * 2048
    by_hand = 16 * 512 * (6 * (2 * layer + 256000 * 2048) + 6 * 2 * 512 * 2048)
    assert roofline.model_flops(config()) == by_hand
    assert roofline.matmul_parameters(config(model__tied=True)) == roofline.matmul_parameters(config())


def test_a_table_of_collectives() -> None:
    sent = [
        Collective("all-reduce", 2**30, 3, TENSOR, True, Work(0, 10**9)),
        Collective("all-reduce", 2**30, 2, TENSOR, True, Work(0, 10**9)),
        Collective("all-gather", 2**30, 1, DATA_OF_TWO_HOSTS),
        Collective("all-reduce", 4, 7, TENSOR),
    ]
    lines = table._tell_collectives(imagined(config(), collectives=sent, shape=SHAPE | {"data": 2}))
    assert [" ".join(line.split()) for line in lines] == [
        "all-reduce over tensor of a host 5 times in microbatches 8.750 GiB sent 0.0209 s overlapped, 7% hidden",
        "all-gather over data across hosts 1 times a step 0.500 GiB sent 0.0107 s exposed",
        "and 7 times less than a MiB",
    ]


def test_the_search_compiles_the_promising_and_ranks_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Of candidates on eight devices, no more than the budget; none that needs more than one that did not fit."""
    made: list[Plan] = []

    def make(candidate: configs.Config) -> Plan:
        made.append(imagined(candidate, 2**30 * (100 if candidate.model.remat == "none" else 1), 1 / (1 + len(made))))
        return made[-1]

    ranked = search.search(config(), "h100", jax.devices(), 12, make)
    assert len(made) == 12
    assert {id(one) for one in ranked} == {id(one) for one in made}
    fits = [one.fits for one in ranked]
    assert fits == sorted(fits, reverse=True)
    fitting = [one.step_s for one in ranked if one.fits]
    assert len(fitting) >= 6
    assert fitting == sorted(fitting)
    kinds = {(one.config.mesh.pipe, one.config.mesh.tensor) for one in made}
    assert len(kinds) >= 3, "not twelve of one kind"
    too_large = [one.config for one in made if one.config.model.remat == "none"]
    for one in too_large:
        assert [o.mesh for o in too_large].count(one.mesh) == 1 or one.batch.microbatch_size < 4
    out = capsys.readouterr().out
    assert "candidates (mesh, microbatch, remat, interleave)" in out
    assert "12 of 12" in out


def test_when_nothing_fits_the_search_turns_to_what_needs_least() -> None:
    least = min(one.floor for one in search.candidates(config(), TARGETS["h100"], jax.devices()))

    def make(candidate: configs.Config) -> Plan:
        mesh = meshes.make_mesh(candidate.mesh, jax.devices())
        needs = sum(memory.held(candidate, mesh).values()) + search.kept(candidate, mesh)
        return imagined(candidate, 2**30 if needs == least else 2**40)

    assert search.search(config(), "h100", jax.devices(), 8, make)[0].fits


def test_every_candidate_is_possible_and_different() -> None:
    found = list(search.candidates(config(model__layers=4), TARGETS["h100"], jax.devices()))
    assert len({repr(one.config) for one in found}) == len(found) > 50
    for one in found:
        mesh = meshes.make_mesh(one.config.mesh, jax.devices())
        meshes.check_split(mesh, one.config.batch)
        assert one.config.model.layers % (one.config.mesh.pipe * one.config.mesh.interleave) == 0
    assert {one.config.mesh.pipe for one in found} == {1, 2, 4}
    assert {one.config.mesh.interleave for one in found} == {1, 2}
    same = {one.config.model.remat: one for one in found if one.config.mesh == found[0].config.mesh}
    assert same["none"].floor > same["dots"].floor > same["layer"].floor
    assert same["dots"].guess_s < same["layer"].guess_s


def test_a_search_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "h100", dataclasses.replace(TARGETS["h100"], memory=2**28))
    with pytest.raises(UserError, match=r"nothing fits 8 x h100: the least needs \d\.\d GiB a device; give more"):
        search.search(config(), "h100", jax.devices(), 4, imagined)


@pytest.mark.parametrize(
    "changes", [{}, {"mesh__pipe": 4, "model__layers": 4}, {"mesh__pipe": 2, "mesh__schedule": "gpipe"}]
)
def test_a_picture(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its words are text; a pipeline's microbatches stand in their cells, forward and backward on every stage."""
    sent = [Collective("all-reduce", 2**30, 3, ((0, 1),), True, Work(0, 10**9))]
    drawn = imagined(config(**changes, mesh__data=2), collectives=sent)
    for name in ("a.png", "a.svg"):
        plot.check(tmp_path / name)
        plot.draw(drawn, "gpt2b", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    for words in ("gpt2b on", "memory of a device: 1.0 GiB, fits", "90%: what fits", "exposed communication"):
        assert words in text
    assert ("bubble" in text) == (drawn.schedule.stages > 1)
    if drawn.schedule.stages > 1:
        assert text.count(">7</text>") >= 2 * drawn.schedule.stages  # the last of eight microbatches


def test_a_picture_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"a\.gif: name a file that ends in \.svg or \.png"):
        plot.check(tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"there is no directory .*/nowhere"):
        plot.check(tmp_path / "nowhere" / "a.svg")
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[plot\]'"):
        plot.check(tmp_path / "a.svg")


@pytest.mark.usefixtures("compiler", "uncached")
def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """0 where it fits, 1 where it does not, and the search finds what does."""
    monkeypatch.setattr(plan, "compile_only", lambda: None)  # which concerns a process of its own
    compile_once = functools.cache(compile.make_plan)
    monkeypatch.setattr(plan, "make_plan", compile_once)
    words = [f"--config.{key.replace('__', '.')}={value}" for key, value in SMALL.items()]
    command = ["--config", str(CONFIG), "--devices", "2", *words]
    assert command.main([*command, "--picture", str(tmp_path / "plan.svg")]) == 0
    out = capsys.readouterr().out
    assert "2 x NVIDIA H100 80GB HBM3" in out
    assert "fits: 90% of 79.1 GiB are to be had" in out
    assert "reduce-scatter     over data" in out
    assert "gpt2b_nemotron8b on 2 x NVIDIA H100" in (tmp_path / "plan.svg").read_text()
    small_card = dataclasses.replace(plan.TARGETS["h100"], memory=4 * 2**30)
    monkeypatch.setitem(plan.TARGETS, "h100", small_card)
    assert command.main(command) == 1
    assert "DOES NOT FIT: 90% of 4.0 GiB" in capsys.readouterr().out
    monkeypatch.setitem(plan.TARGETS, "h100", dataclasses.replace(small_card, memory=12 * 2**30))
    assert command.main([*command, "--search", "--budget", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1" in out
    compiled = compile_once.cache_info().misses
    best = next(line for line in out.splitlines() if line.startswith("the best: "))
    assert command.main([*command, *best.removeprefix("the best: ").split()]) == 0
    assert compile_once.cache_info().misses == compiled == 2, "the flags say what was compiled"
