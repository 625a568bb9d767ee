"""Times of a plan, from its kernels and collectives."""

import dataclasses

import pytest
from example_plans import DATA_GROUPS_ACROSS_HOSTS, MESH, TENSOR_GROUPS, config, imagined

from kdjax.parallel.pipeline import Schedule
from kdjax.plan import roofline
from kdjax.plan.gpus import TARGETS
from kdjax.plan.hlo import Collective, Work

GPU = TARGETS["h100"]


def test_seconds_of_a_roofline() -> None:
    """An H100: 0.75 x 989e12 operations, 3.35e12 bytes, 450e9 over NVLink, 50e9 over each port of a host."""
    second = round(0.75 * GPU.peak)
    hidden = Collective("all-reduce", 9 * 10**9, 4, TENSOR_GROUPS, True, Work(second // 100, 0))
    exposed = Collective("collective-permute", 10**9, 2, ((0, 8), (8, 0)))
    plan = imagined(config(), kernels=[(2.0, Work(second, 1)), (1, Work(0, GPU.memory_bandwidth))])
    plan = dataclasses.replace(plan, collectives=[hidden, exposed], mesh_shape=MESH | {"data": 2})
    assert plan.devices == 16
    assert plan.flops == 2 * second
    assert plan.matmul_s == pytest.approx(2)
    assert plan.compute_s == pytest.approx(3)
    assert plan.collective_s(hidden) == pytest.approx(4 * 9e9 * 2 * 7 / 8 / 450e9)
    assert plan.collective_s(exposed) == pytest.approx(2 * 1e9 / 50e9)
    assert plan.communication_s == pytest.approx(0.14 + 0.04)
    assert plan.hidden_s == pytest.approx(4 * 0.01)
    assert plan.exposed_s == pytest.approx(0.14)
    assert plan.step_s == pytest.approx(3 + 0.14 - 0.04 + 0.04)
    assert plan.lower_bound_s == pytest.approx(2)
    assert plan.mfu == pytest.approx(roofline.model_flops(plan.config) / (16 * GPU.peak * plan.step_s))
    sending = dataclasses.replace(plan, kernels=[])
    assert sending.lower_bound_s == pytest.approx(0.18)


def test_a_collective_is_hidden_for_no_longer_than_it_takes() -> None:
    plan = imagined(config(), mesh_shape=MESH)
    short = Collective("all-reduce", 9 * 10**9, 3, TENSOR_GROUPS, hiding_work=Work(0, 99 * GPU.memory_bandwidth))
    assert plan.collective_hidden_s(short) == plan.collective_s(short) == pytest.approx(3 * 0.035)


def test_bandwidth_across_hosts() -> None:
    """All ports of a host's devices that take part, but no more than NVLink, which a device sends over first."""
    plan = imagined(config(), mesh_shape=MESH | {"data": 2})
    across = Collective("all-gather", 16 * 10**9, 1, (tuple(range(16)),))
    assert plan.collective_s(across) == pytest.approx(15e9 / 400e9), "eight ports per host"
    assert plan.collective_s(dataclasses.replace(across, groups=DATA_GROUPS_ACROSS_HOSTS)) == pytest.approx(8e9 / 50e9)
    a100 = dataclasses.replace(plan, target="a100")
    assert a100.collective_s(across) == pytest.approx(15e9 / 200e9)
    within = dataclasses.replace(across, groups=TENSOR_GROUPS)
    assert a100.collective_s(within) == pytest.approx(14e9 / 300e9)


def test_a_plan_fits_up_to_nine_tenths_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "h100", dataclasses.replace(GPU, memory=1000))
    parts = {"parameters": 800, "batch": 100}
    assert imagined(config(), memory=parts).total_bytes == 900
    assert imagined(config(), memory=parts).fits
    assert not imagined(config(), memory=parts | {"batch": 101}).fits


def test_model_flops_by_hand() -> None:
    """GPT-2B's shape at two layers: attention 4 D^2, SwiGLU 3 D F, the head V D; causal attention 6 L T D a token."""
    layer = 4 * 2048**2 + 3 * 2048 * 5440
    assert roofline.matmul_parameters(config()) == 2 * layer + 256000 * 2048
    by_hand = 16 * 512 * (6 * (2 * layer + 256000 * 2048) + 6 * 2 * 512 * 2048)
    assert roofline.model_flops(config()) == by_hand
    assert roofline.matmul_parameters(config(model__tied=True)) == roofline.matmul_parameters(config())


def test_attention_scores() -> None:
    """16 heads, two rows of 512."""
    assert roofline.score_elements(config(batch__microbatch_size=2), tensor=4) == 2 * 4 * 512**2


def test_the_share_of_ticks_that_enter_or_leave_the_pipeline() -> None:
    """With one chunk per stage the loop that asks has only such ticks; with two, it also runs the ticks between."""
    assert roofline.branch_share(Schedule(4, 1, 8)) == 1
    assert roofline.branch_share(Schedule(2, 2, 4)) == pytest.approx(4 / 6)
