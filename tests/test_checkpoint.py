"""Model directories: written, read, and what is told when they are not what they should be."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from kdjax import config as configs
from kdjax.checkpoint import RunCheckpoints, adopt_architecture, load_model, load_params, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.mesh import make_mesh, replicated
from kdjax.model import bind, init_params
from kdjax.step import TrainState
from kdjax.types import UserError

MODEL = ModelConfig(
    layers=2,
    d_model=16,
    n_heads=4,
    n_groups=2,
    d_ff=24,
    vocab_size=61,
    padded_vocab_size=64,
    tied=False,
    norm="layernorm",
    dtype="float32",
)
TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", MODEL, init_params(MODEL, 0))
    return tmp_path / "model"


def test_round_trip(saved: Path) -> None:
    model = load_model(saved)
    expected = bind(MODEL, init_params(MODEL, 0))(TOKENS)
    np.testing.assert_array_equal(model(TOKENS), expected)
    assert expected.shape == (2, 6, 61)


def test_restores_into_any_sharding(saved: Path) -> None:
    sharding = replicated(make_mesh(configs.MeshConfig()))
    params = load_params(saved, MODEL, sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))


def test_its_architecture_rules_and_the_arithmetic_stays(saved: Path) -> None:
    mine = configs.replace(
        configs.Config(), model__init_from=str(saved), model__layers=9, model__dtype="bfloat16", model__remat="dots"
    )
    model = adopt_architecture(mine).model
    assert (model.layers, model.norm, model.padded_vocab_size) == (2, "layernorm", 64)
    assert (model.dtype, model.remat, model.init_from) == ("bfloat16", "dots", str(saved))


def test_training_starts_from_it(saved: Path, tmp_path: Path) -> None:
    from kdjax.train import run

    toy_config = toy.config(tmp_path, model__init_from=str(saved), optim__lr=1e-12, optim__min_lr=0.0)
    outcome = run(configs.replace(toy_config, train__steps=3), tmp_path / "run", devices=jax.devices()[:1])
    np.testing.assert_allclose(outcome.state.params["embed"], init_params(MODEL, 0)["embed"], atol=1e-9)


def test_keeps_the_newest_and_the_best_by_the_chosen_metric(tmp_path: Path) -> None:
    """Losses as they fall and rise again; the metric that decides is the configured one."""
    losses, sft_losses = [5.0, 1.0, 3.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    for metric, last, best, kept in (("loss", 1, 1, {2, 5}), ("sft_loss", 1, 2, {1, 2, 5}), ("loss", 2, 0, {4, 5})):
        config = configs.replace(
            configs.Config(),
            data__val=("val.jsonl",),
            checkpoint__best_metric=metric,
            checkpoint__keep_last=last,
            checkpoint__keep_best=best,
        )
        workdir = tmp_path / f"{metric}{last}{best}"
        checkpoints = RunCheckpoints(workdir, config)
        for step, (loss, sft_loss) in enumerate(zip(losses, sft_losses, strict=True), 1):
            state = TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {"m": jnp.ones(2)})
            checkpoints.save(state, {"data": ""}, {"loss": loss, "sft_loss": sft_loss})
        checkpoints.wait()
        assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == kept
        checkpoints.close()


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model_config.json nor a run's config.json"):
        read_model_config(tmp_path)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(configs.to_json(configs.replace(configs.Config(), model__layers=1)))
    with pytest.raises(UserError, match=r"checkpoints holds no complete checkpoint yet"):
        load_model(tmp_path)


def test_parameters_of_another_shape(saved: Path) -> None:
    with pytest.raises(
        UserError, match=r"do not fit the architecture(.|\n)*up/kernel: \(2, 16, 24\) stored, \(2, 16, 25\)"
    ):
        load_params(saved, dataclasses.replace(MODEL, d_ff=25))
    with pytest.raises(UserError, match=r"mlp/gate/kernel: \(2, 16, 24\) stored, nothing wanted"):
        load_params(saved, dataclasses.replace(MODEL, activation="gelu"))
