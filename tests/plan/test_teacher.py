"""The plan of a run with a teacher on the mesh, of which only model_config.json is there."""

from pathlib import Path

import jax
import pytest
from example_plans import config

from kdjax import config as configs
from kdjax.checkpoint.model_directory import write_model_config
from kdjax.config import ModelConfig
from kdjax.config.validate import resolve_model
from kdjax.model import param_shapes
from kdjax.plan import roofline, search, table
from kdjax.plan.compile import make_plan
from kdjax.plan.gpus import TARGETS, topology

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler", "uncached")]


def test_the_teacher_is_counted(tmp_path: Path) -> None:
    """Its parameters in bfloat16, split over tensor; its forward pass in operations and in the search's estimate."""
    alone = config(mesh__fsdp=1, mesh__tensor=2, mesh__data=1)
    wide = ModelConfig(
        layers=4, d_model=1024, n_heads=8, d_ff=2048, vocab_size=alone.model.vocab_size, tied=False, norm="rmsnorm"
    )
    wide = resolve_model(wide)
    write_model_config(tmp_path, wide)
    both = configs.replace(alone, teacher__checkpoint=str(tmp_path), data__top_k=None)
    plan = make_plan(both, "h100", 2)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(wide)))
    assert plan.memory["teacher"] == pytest.approx(2 * count / 2, rel=0.01)
    assert min(plan.memory.values()) >= 0, plan.memory
    assert plan.teacher is not None
    forward = roofline.model_flops(plan.teacher) / 3 / 2
    assert plan.flops > roofline.model_flops(alone) / 2 + 0.95 * forward
    assert f"\n  {'teacher':34}" in table.render(plan)

    devices = topology("h100", 2).devices

    def least(config: configs.Config) -> tuple[int, float]:
        found = list(search.candidates(config, TARGETS["h100"], devices))
        return min(c.min_bytes for c in found), min(c.rough_step_s for c in found)

    (bytes_alone, step_alone), (bytes_both, step_both) = least(alone), least(both)
    assert bytes_both >= bytes_alone + count  # 2 bytes each, halved
    assert step_both > step_alone
