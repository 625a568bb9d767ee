"""Compiling a run for GPUs that are not here: memory, operations, collectives, and the verdict."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from kdjax import config as configs
from kdjax import plan
from kdjax.hlo import Collective, collectives
from kdjax.model import param_shapes
from kdjax.validate import resolve

CONFIG = Path(__file__).parent.parent / "configs" / "gpt2b_nemotron8b.py"
SMALL = {"model__layers": 2, "batch__global_size": 16, "data__sequence_length": 512, "model__attention": "xla"}


def config(**changes: object) -> configs.Config:
    return resolve(configs.replace(configs.build(plan.cli.load(CONFIG)), **SMALL | changes))


def test_collectives_of_a_program() -> None:
    """An all-reduce in a loop of five runs five times; groups and bytes are those of the arrays."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def f(x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda y, _: (jnp.sin(jax.lax.psum(y, "tensor")), None), x, None, length=5)
        return jax.lax.all_gather(y, "data", axis=0, tiled=True)

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P(None), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((6, 7), jnp.float32)).compile().as_text()
    tensor, data = tuple(map(tuple, mesh.device_ids)), tuple(map(tuple, mesh.device_ids.T))
    reduced = Collective("all-reduce", 3 * 7 * 4, 5, tensor)
    gathered = Collective("all-gather", 6 * 7 * 4, 1, data)
    assert sorted(collectives(text, 8), key=lambda c: c.kind) == [gathered, reduced]
    assert reduced.wire_bytes == 5 * 84 * 2 * 3 / 4
    assert gathered.wire_bytes == 168 / 2
    assert (gathered.spans(4), reduced.spans(4), gathered.spans(8)) == (True, False, False)


@pytest.mark.usefixtures("compiler", "uncached")
def test_memory_and_work_go_down_as_devices_share_them() -> None:
    """Of a model's bytes, those that are split; of the matmuls, each device its share."""
    whole, shared = (
        plan.make_plan(config(mesh__fsdp=fsdp, mesh__tensor=tensor), "h100_sxm", 8) for fsdp, tensor in ((1, 1), (4, 2))
    )
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(whole.config.model)))
    assert whole.memory["parameters"] == nbytes
    assert whole.memory["optimiser"] == 2 * nbytes + 4  # Adam's moments and its count of steps
    assert shared.memory["parameters"] == pytest.approx(nbytes / 8, rel=0.01)
    assert shared.memory["optimiser"] == pytest.approx(nbytes / 4, rel=0.01)
    assert shared.flops == pytest.approx(whole.flops, rel=0.01)  # 16 rows over 8 devices, or over 4 with half the width
    model, tokens = whole.config.model, 16 * 512 / 8
    linear = nbytes / 4 - model.vocab_size * model.d_model  # the embedding multiplies nothing
    assert whole.flops > 2 * tokens * linear * 3  # forward, twice back; and the layers once more
    assert whole.flops < 2 * tokens * linear * 4.5
    kinds = {c.kind for c in shared.collectives}
    assert kinds == {"all-reduce", "all-gather", "reduce-scatter"}
    assert {c.kind for c in whole.collectives} == {"all-reduce"}
    assert whole.fits
    assert shared.fits


@pytest.mark.usefixtures("compiler", "uncached")
def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where it fits, 1 where it does not, and the search finds what does."""
    monkeypatch.setattr(plan, "compile_only", lambda: None)  # which concerns a process of its own
    words = [f"--config.{key.replace('__', '.')}={value}" for key, value in SMALL.items()]
    command = ["--config", str(CONFIG), "--devices", "2", *words]
    assert plan.main(command) == 0
    out = capsys.readouterr().out
    assert "2 x NVIDIA H100 80GB HBM3" in out
    assert "fits: 90% of 79.1 GiB are to be had" in out
    assert "all-reduce          over    2 devices of a host" in out
    small_card = dataclasses.replace(plan.TARGETS["h100"], memory=4 * 2**30)
    monkeypatch.setitem(plan.TARGETS, "h100", small_card)
    assert plan.main(command) == 1
    assert "DOES NOT FIT: 90% of 4.0 GiB" in capsys.readouterr().out
    monkeypatch.setitem(plan.TARGETS, "h100", dataclasses.replace(small_card, memory=12 * 2**30))
    assert plan.main([*command, "--search"]) == 0
    out = capsys.readouterr().out
    assert out.count("GiB  ") >= 3
    assert "the best: --config.mesh.fsdp=1 --config.mesh.tensor=2" in out
