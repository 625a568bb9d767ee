"""The search for a mesh, a microbatch size and a rematerialisation."""

import dataclasses

import jax
import pytest
from example_plans import config, imagined

from kdjax import config as configs
from kdjax.config import Config
from kdjax.parallel import mesh as meshes
from kdjax.plan import search
from kdjax.plan.gpus import TARGETS
from kdjax.plan.roofline import Plan
from kdjax.plan.search import Candidate
from kdjax.training.layout import Layout
from kdjax.training.memory import held_bytes
from kdjax.types import UserError


def on_mesh(**changes: object) -> tuple[Config, jax.sharding.Mesh]:
    changed = config(mesh__data=1, **changes)
    count = changed.mesh.pipe * changed.mesh.tensor
    return changed, meshes.make_mesh(changed.mesh.sizes, jax.devices()[:count])


def test_the_promising_are_compiled_and_ranked(capsys: pytest.CaptureFixture[str]) -> None:
    """No more than the budget, of several kinds, and none that needs no less than one that did not fit."""
    plans: list[Plan] = []

    def make(candidate: Config) -> Plan:
        nbytes = 2**30 * (100 if candidate.model.remat == "none" else 1)
        plans.append(imagined(candidate, nbytes, 1 / (1 + len(plans))))
        return plans[-1]

    ranked = search.search(config(), "h100", jax.devices(), 12, make)
    assert len(plans) == 12
    assert {id(plan) for plan in ranked} == {id(plan) for plan in plans}
    fits = [plan.fits for plan in ranked]
    assert fits == sorted(fits, reverse=True)
    times = [plan.step_s for plan in ranked if plan.fits]
    assert len(times) >= 6
    assert times == sorted(times)
    kinds = {(plan.config.mesh.pipe, plan.config.mesh.tensor) for plan in plans}
    assert len(kinds) >= 3, "not twelve of one kind"
    too_large = [plan.config for plan in plans if plan.config.model.remat == "none"]
    for large in too_large:
        assert [other.mesh for other in too_large].count(large.mesh) == 1 or large.batch.microbatch_size < 4
    out = capsys.readouterr().out
    assert "candidates (mesh, microbatch, remat, interleave), of which " in out
    assert "compiling the 12 most promising" in out
    assert "12 of 12" in out
    assert "12 compiled, " in out


def test_when_nothing_fits_the_smallest_is_tried_next() -> None:
    least = min(candidate.min_bytes for candidate in search.candidates(config(), TARGETS["h100"], jax.devices()))
    plans: list[Plan] = []

    def make(candidate: Config) -> Plan:
        mesh = meshes.make_mesh(candidate.mesh.sizes, jax.devices())
        needs = sum(held_bytes(Layout(candidate, mesh)).values()) + search.activation_bytes(candidate, mesh)
        plans.append(imagined(candidate, 2**30 if needs == least else 2**40))
        return plans[-1]

    assert search.search(config(), "h100", jax.devices(), 8, make)[0].fits
    assert [plan.fits for plan in plans[:5]] == [False] * 4 + [True], "after half of the budget"


def test_every_candidate_is_possible_and_different() -> None:
    found = list(search.candidates(config(model__layers=4), TARGETS["h100"], jax.devices()))
    assert len({repr(candidate.config) for candidate in found}) == len(found) > 50
    for candidate in found:
        mesh = meshes.make_mesh(candidate.config.mesh.sizes, jax.devices())
        batch = candidate.config.batch
        meshes.check_batch(mesh, batch.global_size, batch.microbatch_size)
        assert candidate.config.model.layers % (candidate.config.mesh.pipe * candidate.config.mesh.interleave) == 0
    assert {candidate.config.mesh.pipe for candidate in found} == {1, 2, 4}
    assert {candidate.config.mesh.interleave for candidate in found} == {1, 2}
    assert {candidate.config.batch.microbatch_size for candidate in found} == {1, 2, 4}
    same = {one.config.model.remat: one for one in found if one.config.mesh == found[0].config.mesh}
    assert same["none"].min_bytes > same["dots"].min_bytes > same["layer"].min_bytes
    assert same["dots"].rough_step_s < same["layer"].rough_step_s


def candidate(min_bytes: int = 0, rough_step_s: float = 1.0, **changes: object) -> Candidate:
    return Candidate(config(**changes), min_bytes, rough_step_s)


def test_candidates_alike_are_spread_out() -> None:
    """Within 5% per better one of the same kind the other kind comes first."""
    first, second, third = (candidate(rough_step_s=time, mesh__pipe=1) for time in (1.0, 1.01, 1.02))
    other = candidate(rough_step_s=1.05, mesh__pipe=2)
    assert search.by_promise([other, third, second, first]) == [first, other, second, third]


def test_memory_needed_by_candidates_of_one_mesh() -> None:
    middle = candidate(batch__microbatch_size=2, model__remat="dots")
    for changes, needs in (
        ({"batch__microbatch_size": 2, "model__remat": "dots"}, True),
        ({"batch__microbatch_size": 4, "model__remat": "none"}, True),
        ({"batch__microbatch_size": 1, "model__remat": "none"}, False),
        ({"batch__microbatch_size": 4, "model__remat": "layer"}, False),
        ({"batch__microbatch_size": 4, "model__remat": "none", "mesh__tensor": 2}, False),
    ):
        assert candidate(**changes).needs_at_least(middle) == needs, changes


def test_activations_by_hand() -> None:
    """Two rows of 512 in bfloat16; per layer its input, and what remat keeps: D = 2048, 16 heads of 128, F = 5440."""
    positions, inputs = 2 * 512, 2048
    kept = 2 * 2048 + (16 + 2 * 16) * 128 + 2 * 5440
    for remat, tensor, per_layer in (
        ("layer", 1, inputs),
        ("dots", 1, inputs + kept),
        ("dots", 2, inputs + 2 * 2048 + (kept - 2 * 2048) // 2),
        ("none", 1, inputs + kept + 16 * 512),
        ("none", 4, inputs + 2 * 2048 + (kept - 2 * 2048) // 4 + 4 * 512),
    ):
        changes = {"batch__microbatch_size": 2, "model__remat": remat, "mesh__tensor": tensor}
        assert search.activation_bytes(*on_mesh(**changes)) == 2 * per_layer * positions * 2, (remat, tensor)
    gelu = on_mesh(batch__microbatch_size=2, model__remat="dots", model__activation="gelu")
    assert search.activation_bytes(*gelu) == 2 * (inputs + kept - 5440) * positions * 2
    # A stage of two layers in two chunks holds one layer's at a time, and 2vP - 1 inputs.
    piped = on_mesh(batch__microbatch_size=2, model__remat="layer", model__layers=4, mesh__pipe=2, mesh__interleave=2)
    assert search.activation_bytes(*piped) == (1 + 7) * 2048 * positions * 2


def test_a_rough_step_by_hand() -> None:
    """Compute of the matmuls, the kept activations written and read, and each communication, none of it hidden."""
    card = dataclasses.replace(TARGETS["h100"], memory_bandwidth=10**40, nvlink=1e40, port=1e40)
    held = {"parameters": 10**9, "gradients": 2 * 10**9, "parameters, gathered and rounded": 3 * 10**9}

    def seconds(target: object = card, **changes: object) -> float:
        return search.rough_step_s(*on_mesh(**{"model__remat": "dots"} | changes), target, held)

    plain = seconds()
    assert plain == pytest.approx(search.model_flops(config()) / (0.75 * card.peak))
    head = 256000 * 2048 / search.matmul_parameters(config())
    assert seconds(model__remat="layer") == pytest.approx(plain * (4 * (1 - head) + 3 * head) / 3)
    piped = {"mesh__pipe": 2, "batch__global_size": 4}  # a bubble of 1/5
    per_row = plain / 16
    assert seconds(**piped) == pytest.approx(2 * per_row * (4 * (1 - head) / 0.8 + 3 * head) / 3)
    slow = dataclasses.replace(card, memory_bandwidth=10**9)
    kept = search.activation_bytes(*on_mesh(model__remat="dots"))
    assert seconds(slow) - plain == pytest.approx(2 * 16 * kept / 1e9)
    near = dataclasses.replace(card, nvlink=1e9)
    x = 512 * 2048 * 2  # a row's activations; two sums per layer, in forward and backward
    assert seconds(near, mesh__tensor=2) - plain / 2 == pytest.approx(2 * 2 * 2 * 16 * 2 * x / 2 / 1e9)
    sent = 4 * x * (5 + 4) / 2  # forward and backward in each of five ticks, and once more per microbatch
    assert seconds(near, **piped) - seconds(**piped) == pytest.approx(sent / 1e9)


@pytest.mark.parametrize(("axis", "nbytes"), [("fsdp", 5e9), ("data", 2e9)])
def test_rough_communication_of_parameters(axis: str, nbytes: float) -> None:
    """Over fsdp the gathered parameters and the gradients; over data the parameters and their gradients' sum."""
    card = dataclasses.replace(TARGETS["h100"], memory_bandwidth=10**40, nvlink=1e9, port=1e8)
    held = {"parameters": 10**9, "gradients": 2 * 10**9, "parameters, gathered and rounded": 3 * 10**9}
    changed = config(**{"mesh__data": 1, "model__remat": "dots", f"mesh__{axis}": 8})
    mesh = meshes.make_mesh(changed.mesh.sizes, jax.devices())
    compute_s = search.model_flops(changed) / 8 / (0.75 * card.peak)
    assert search.rough_step_s(changed, mesh, card, held) - compute_s == pytest.approx(nbytes * 7 / 8 / 1e9)


@pytest.mark.parametrize(("per_host", "ports"), [(1, 1), (2, 1), (4, 2), (8, None)])
def test_rough_communication_across_hosts(per_host: int, ports: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the ports of those devices of a host that are in the ring, at least one; within a host over NVLink."""
    monkeypatch.setattr(search, "DEVICES_PER_HOST", per_host)
    card = dataclasses.replace(TARGETS["h100"], memory_bandwidth=10**40, nvlink=1e40, port=1e8)
    held = {"parameters": 0, "gradients": 0, "parameters, gathered and rounded": 10**9}
    changed = config(mesh__data=1, mesh__fsdp=4, mesh__tensor=2, model__remat="dots")
    mesh = meshes.make_mesh(changed.mesh.sizes, jax.devices())

    def ring_s(port: float) -> float:
        target = dataclasses.replace(card, port=port)
        return search.rough_step_s(changed, mesh, target, held) - search.rough_step_s(changed, mesh, target, empty)

    empty = dict.fromkeys(held, 0)
    assert ring_s(1e8) == pytest.approx(1e9 * 3 / 4 / (ports * 1e8) if ports else 0, abs=1e-12)
    assert ring_s(1e40) == pytest.approx(0, abs=1e-12)


def test_one_line_and_the_flags_of_a_plan() -> None:
    plan = imagined(config(mesh__pipe=2, mesh__data=4, mesh__interleave=1, batch__microbatch_size=2), 3 * 2**29)
    chosen = "pipe 2 x data 4 x fsdp 1 x tensor 1 interleave 1 rows 2 remat layer"
    assert " ".join(search.summary_line(plan).split()).startswith(f"{chosen} 1.5 GiB fits step 1.000 s MFU ")
    assert search.config_flags(plan) == (
        "--config.mesh.pipe=2 --config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=1 "
        "--config.mesh.interleave=1 --config.batch.microbatch_size=2 --config.model.remat=layer"
    )


def test_a_search_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "h100", dataclasses.replace(TARGETS["h100"], memory=2**28))
    with pytest.raises(UserError, match=r"nothing fits 8 x h100: the least needs \d\.\d GiB per device; give more"):
        search.search(config(), "h100", jax.devices(), 4, imagined)
    with pytest.raises(UserError, match=r"nothing fits 7 x h100: no mesh divides them"):
        search.search(configs.replace(config(), batch__global_size=3), "h100", jax.devices()[:7], 4, imagined)
