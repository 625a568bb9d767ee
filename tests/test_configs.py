"""Every shipped configuration loads, validates and has a train step whose shapes fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kdjax import cli, mesh
from kdjax import config as configs
from kdjax.config import Config
from kdjax.model import param_shapes
from kdjax.optim import optimizer
from kdjax.step import TrainState, make_train_step
from kdjax.types import Batch
from kdjax.validate import resolve, validate

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
PARAMETERS = {"gpt2b_nemotron8b": 2.25e9, "parity_nemo": 238_144, "quickstart": 7_275_648}


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
    config = resolve(configs.build(cli.load(path)))
    validate(config)
    shapes = param_shapes(config.model)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(PARAMETERS[path.stem], rel=0.01)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer(config.optim).init, shapes)
    )
    step = make_train_step(config, mesh.make_mesh(config.mesh, jax.devices()[:1]))
    new_state, metrics = jax.eval_shape(step, state, batch_shapes(config, top_k=4))
    assert shapes_of(new_state) == shapes_of(state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_like_a_lab_notebook(path: Path) -> None:
    text = path.read_text()
    for heading in ("Purpose", "Source", "Hardware", "Time", "Expect", "Run"):
        assert f"\n{heading} " in text, heading
    assert cli.load(path).is_locked


def test_the_tutorial_is_nemo_aligners() -> None:
    config = configs.build(cli.load(next(path for path in CONFIGS if path.stem == "gpt2b_nemotron8b")))
    assert (config.batch.global_size, config.optim.lr, config.data.sequence_length) == (128, 1e-5, 4096)
    assert (config.loss.kd_loss_weight, config.loss.sft_loss_weight, config.loss.kd_loss) == (1.0, 0.4, "fwd_kl")
