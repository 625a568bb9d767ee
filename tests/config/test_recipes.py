"""Every shipped configuration loads, validates and has a train step whose shapes fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kdjax import config as configs
from kdjax.config import Config, command_line
from kdjax.config.validate import resolve, validate
from kdjax.model import param_shapes
from kdjax.parallel import mesh
from kdjax.plan.compile import make_plan
from kdjax.training.optim import optimizer
from kdjax.training.step import TrainState, make_train_step
from kdjax.types import Batch

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.py"))
PARAMETERS = {
    "gpt2b_nemotron8b": 2.25e9,
    "llama8b_8xh100": 8.03e9,
    "llama8b_64xh100": 8.03e9,
    "nemotron15b_64xh100": 15.6e9,
    "llama70b_512xh100": 70.6e9,
    "parity_nemo": 238_144,
    "quickstart": 7_275_648,
}
# H100s that a configuration is made for.
MACHINES = {
    "gpt2b_nemotron8b": 8,
    "llama8b_8xh100": 8,
    "llama8b_64xh100": 64,
    "nemotron15b_64xh100": 64,
    "llama70b_512xh100": 512,
}


def batch_shapes(config: Config, top_k: int) -> Batch:
    rows, length = config.batch.global_size, config.data.sequence_length
    ints, floats = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(
        tokens=ints,
        labels=ints,
        loss_mask=floats,
        topk_logits=jax.ShapeDtypeStruct((rows, length, top_k), jnp.float32),
        topk_token_ids=jax.ShapeDtypeStruct((rows, length, top_k), jnp.int32),
        log_sum_exp_logits=floats,
    )


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_validates_and_steps(path: Path) -> None:
    config = resolve(configs.build(command_line.load(path)))
    validate(config)
    shapes = param_shapes(config.model)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(PARAMETERS[path.stem], rel=0.01)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer(config.optim).init, shapes)
    )
    step = make_train_step(config, mesh.make_mesh(configs.MeshConfig(), jax.devices()[:1]))
    new_state, metrics = jax.eval_shape(step, state, batch_shapes(config, top_k=4))
    assert shapes_of(new_state) == shapes_of(state)
    assert metrics["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.usefixtures("compiler", "uncached")
def test_fits_the_machine_it_is_made_for(name: str) -> None:
    """Compiled for it: nine tenths of each card's memory are enough. On two cores that takes ten seconds or so."""
    path = next(path for path in CONFIGS if path.stem == name)
    config = configs.replace(configs.build(command_line.load(path)), model__attention="xla")
    assert config.data.sequence_length == 4096
    assert config.batch.global_size >= 128
    made = make_plan(resolve(config), "h100", MACHINES[name])
    assert made.fits, made.memory
    assert made.compile_s < 60


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_like_a_lab_notebook(path: Path) -> None:
    text = path.read_text()
    for heading in ("Purpose", "Source", "Hardware", "Time", "Expect", "Run"):
        assert f"\n{heading} " in text, heading
    assert command_line.load(path).is_locked


def test_the_tutorial_is_nemo_aligners() -> None:
    config = configs.build(command_line.load(next(path for path in CONFIGS if path.stem == "gpt2b_nemotron8b")))
    assert (config.batch.global_size, config.optim.lr, config.data.sequence_length) == (128, 1e-5, 4096)
    assert (config.loss.kd_loss_weight, config.loss.sft_loss_weight, config.loss.kd_loss) == (1.0, 0.4, "fwd_kl")
