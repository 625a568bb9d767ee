"""Model directories: written, read, and what is told when they are not what they should be."""

import dataclasses
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_problem as toy

from kdjax import config as configs
from kdjax.checkpoint import (
    RunCheckpoints,
    adopt_architecture,
    load_model,
    load_params,
    params_directory,
    read_model_config,
    run_config,
    save_model,
)
from kdjax.checkpoint.arrays import open_arrays
from kdjax.config import ModelConfig
from kdjax.model import bind, init_params, param_shapes
from kdjax.parallel.mesh import make_mesh, replicated
from kdjax.training import metrics
from kdjax.training.state import TrainState
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
    sharding = replicated(make_mesh(configs.MeshConfig().sizes))
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


@pytest.mark.slow
def test_any_split_of_the_state_goes_on_from_any_other(tmp_path: Path) -> None:
    """From shards over two of four devices to one device, and the other way round."""
    from kdjax.train import run

    base = configs.replace(toy.config(tmp_path), train__steps=4, train__save_every=2, train__val_every=2)

    def losses(workdir: Path, *stages: tuple[int, int, int]) -> list[float]:
        for steps, devices, fsdp in stages:
            config = configs.replace(base, mesh__data=-1, mesh__fsdp=fsdp, batch__microbatch_size=1)
            stop = threading.Event() if steps == 4 else AfterSteps(steps)
            run(config, workdir, stop=stop, devices=jax.devices()[:devices])
        return [line["loss"] for line in metrics.read(workdir, "train")]

    expected = losses(tmp_path / "one", (4, 1, 1))
    np.testing.assert_allclose(losses(tmp_path / "gather", (2, 4, 2), (4, 1, 1)), expected, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "scatter", (2, 1, 1), (4, 4, 2)), expected, rtol=1e-5)


class AfterSteps(threading.Event):
    """Set once it has been asked so many times, which the loop does once a step."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_keeps_the_newest_and_the_best_by_the_chosen_metric(tmp_path: Path) -> None:
    """Losses as they fall and rise again; the metric that decides is the configured one."""
    losses, sft_losses = [5.0, 1.0, 3.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    cases = ("loss", 1, 1, {2, 5}, 2), ("sft_loss", 1, 2, {1, 2, 5}, 1), ("loss", 2, 0, {4, 5}, 5)
    for metric, last, best, kept, chosen in cases:
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
        (workdir / "config.json").write_text(configs.to_json(config))
        assert params_directory(workdir) == workdir / "checkpoints" / "5" / "params", "no validation: the last step"
        with (workdir / "metrics.jsonl").open("w") as file:
            for step, (loss, sft_loss) in enumerate(zip(losses, sft_losses, strict=True), 1):
                file.write(json.dumps({"step": step, "split": "val", "loss": loss, "sft_loss": sft_loss}) + "\n")
                file.write(json.dumps({"step": step, "split": "train", "loss": -step, "sft_loss": -step}) + "\n")
        assert params_directory(workdir) == workdir / "checkpoints" / str(chosen) / "params", "the best that is kept"
        assert params_directory(workdir / "checkpoints" / "5") == workdir / "checkpoints" / "5" / "params"


def test_a_validation_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    """It deletes no better step, and the step before it remains the model of the run."""
    config = configs.replace(
        configs.Config(), data__val=("v",), checkpoint__best_metric="loss", checkpoint__keep_last=1
    )
    checkpoints = RunCheckpoints(tmp_path, config)
    (tmp_path / "config.json").write_text(configs.to_json(config))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate((float("nan"), 2.0, float("nan"), float("inf")), 1):
            state = TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {"m": jnp.ones(2)})
            checkpoints.save(state, {"data": ""}, {"loss": loss})
            stored = loss if np.isfinite(loss) else None
            file.write(json.dumps({"step": step, "split": "val", "loss": stored}) + "\n")
    checkpoints.wait()
    checkpoints.close()
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {2, 4}
    assert params_directory(tmp_path) == tmp_path / "checkpoints" / "2" / "params"


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither model_config.json nor a run's config.json"):
        read_model_config(tmp_path)


def test_a_hugging_face_checkpoint_is_sent_to_its_converter() -> None:
    with pytest.raises(UserError, match=r"is a Hugging Face checkpoint; .*python -m kdjax.convert from-hf"):
        read_model_config(Path(__file__).parent.parent / "fixtures" / "hf" / "llama")


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


def specs(params: dict) -> dict:
    """For each leaf another way to lie on 8 devices: its last axis that 4 or 2 divides over some of them."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 4), ("x", "y"))

    def spec(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        axes: list[str | None] = [None] * leaf.ndim
        for name, size in (("y", 4), ("x", 2)):
            free = [axis for axis in range(leaf.ndim) if axes[axis] is None and leaf.shape[axis] % size == 0]
            if free:
                axes[free[-1]] = name
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    return jax.tree.map(spec, params)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep_layers", [None, (1, 0)])
def test_restores_into_a_tree_of_shardings(tmp_path: Path, tied: bool, keep_layers: tuple[int, ...] | None) -> None:
    config = dataclasses.replace(MODEL, tied=tied)
    params = init_params(config, 0)
    save_model(tmp_path / "model", config, params)
    shardings = specs(param_shapes(config))
    restored = load_params(tmp_path / "model", config, shardings, keep_layers)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, restored, shardings))
    assert len({str(leaf.sharding.spec) for leaf in jax.tree.leaves(restored)}) > 3
    params["layers"] = jax.tree.map(lambda x: x[np.asarray(keep_layers or (0, 1))], params["layers"])
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_a_layer_is_stored_on_its_own(saved: Path) -> None:
    """So that a student of some layers reads these only, and an export holds one at a time."""
    for name, leaf in open_arrays(saved / "params").items():
        chunk = leaf.store.chunk_layout.read_chunk.shape
        assert chunk == ((1, *leaf.shape[1:]) if name.startswith("layers/") else leaf.shape), name


def test_layers_left_out_are_not_read(saved: Path) -> None:
    """Their chunks may even be gone."""
    kept = load_params(saved, dataclasses.replace(MODEL, layers=1), keep_layers=(1,))
    params = init_params(MODEL, 0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1:]), kept["layers"], params["layers"])
    np.testing.assert_array_equal(kept["embed"], params["embed"])


def test_stored_dtypes_are_cast(saved: Path) -> None:
    params = load_params(saved, dataclasses.replace(MODEL, param_dtype="bfloat16"))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(MODEL, 0))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("rows", [61, 62, 64, 80])
def test_vocabulary_padding_is_cut_off_or_added(saved: Path, rows: int) -> None:
    shardings = specs(param_shapes(dataclasses.replace(MODEL, padded_vocab_size=rows)))
    restored = load_params(saved, dataclasses.replace(MODEL, padded_vocab_size=rows), shardings)
    for name, stored in init_params(MODEL, 0).items():
        if name in ("embed", "unembed"):
            assert restored[name].shape == (rows, 16)
            np.testing.assert_array_equal(restored[name][:64], stored[:rows])
            assert not np.any(restored[name][64:])


def test_padding_that_counts_stays(saved: Path) -> None:
    padded = configs.replace(configs.Config(), model__init_from=str(saved), model__padded_vocab_size=61)
    assert adopt_architecture(padded).model.padded_vocab_size == 61
    with pytest.raises(UserError, match=r"padded_vocab_size = 61: loss.include_vocab_padding .* has 64 rows"):
        adopt_architecture(configs.replace(padded, loss__include_vocab_padding=True))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 2), r"keep_layers = \(0, 2\): there is no layer 2; model.init_from has 2 layers, .* from 0 to 1"),
        ((-1,), r"there is no layer -1"),
        ((0, 0), r"layer 0 is repeated"),
        ((), r"it is empty"),
    ],
)
def test_layers_that_cannot_be_kept(saved: Path, kept: tuple[int, ...], message: str) -> None:
    config = configs.replace(configs.Config(), model__init_from=str(saved), model__keep_layers=kept)
    with pytest.raises(UserError, match=message):
        adopt_architecture(config)


def test_training_starts_from_some_layers(saved: Path, tmp_path: Path) -> None:
    """And what it saves is a model of that depth, for `load_model` and for another run's init_from."""
    from kdjax.train import run

    toy_config = toy.config(tmp_path, model__init_from=str(saved), model__keep_layers=(1,))
    toy_config = configs.replace(toy_config, train__steps=3, optim__lr=1e-12, optim__min_lr=0.0)
    outcome = run(toy_config, tmp_path / "run", devices=jax.devices()[:1])
    expected = jax.tree.map(lambda x: x[1:], init_params(MODEL, 0)["layers"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), outcome.state.params["layers"], expected)
    model = load_model(tmp_path / "run")
    assert (model.config.layers, model.config.keep_layers) == (1, None)
    again = configs.replace(configs.Config(), model__init_from=str(tmp_path / "run"))
    assert adopt_architecture(again).model.layers == 1


def test_a_damaged_array_is_named(saved: Path) -> None:
    for path in (saved / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"params( is not a complete|: \S+ cannot be)(.|\n)*\bbyte range"):
        load_params(saved, MODEL)
    with pytest.raises(UserError, match=r"is not a complete Orbax checkpoint"):
        open_arrays(saved)


def test_model_config_json_holds_the_architecture_only(saved: Path) -> None:
    stored = json.loads((saved / "model_config.json").read_text())
    choices = {
        "init_from", "keep_layers", "dtype", "param_dtype", "remat", "attention", "init_std", "scaled_init",
    }  # fmt: skip
    assert stored.keys() == {field.name for field in dataclasses.fields(ModelConfig)} - choices
    assert {key: stored[key] for key in ("layers", "vocab_size", "norm")} == {
        "layers": 2, "vocab_size": 61, "norm": "layernorm",
    }  # fmt: skip


def test_the_dtype_of_the_computation_is_the_callers(saved: Path) -> None:
    assert load_model(saved).config.dtype == "float32"
    assert load_model(saved, dtype="bfloat16")(TOKENS).dtype == load_model(saved)(TOKENS).dtype
    assert np.any(load_model(saved, dtype="bfloat16")(TOKENS) != load_model(saved)(TOKENS))


def test_parameters_lie_on_the_first_device_unless_told_otherwise(saved: Path) -> None:
    for leaf in jax.tree.leaves(load_params(saved, MODEL)):
        assert leaf.devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65, "padded_vocab_size": 65}, r"  embed: \(64, 16\) stored, \(65, 16\) wanted"),
        ({"qk_norm": True}, r"  layers/attn/k_norm/scale: nothing stored, \(2, 4\) wanted"),
        ({"layers": 3}, r"  layers/attn/k/kernel: \(2, .*\) stored, \(3, .*\) wanted"),
        ({"tied": True}, r"  unembed: \(64, 16\) stored, nothing wanted"),
    ],
)
def test_parameters_that_do_not_fit(saved: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_params(saved, dataclasses.replace(MODEL, **changes))


def test_an_unembedding_that_is_not_stored(tmp_path: Path) -> None:
    tied = dataclasses.replace(MODEL, tied=True)
    save_model(tmp_path / "model", tied, init_params(tied, 0))
    with pytest.raises(UserError, match=r"  unembed: nothing stored, \(64, 16\) wanted"):
        load_params(tmp_path / "model", MODEL)


def test_all_that_does_not_fit_is_listed_by_name(saved: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_params(saved, dataclasses.replace(MODEL, d_ff=25, qk_norm=True, n_groups=1))
    names = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    attention, mlp = ("k/kernel", "k_norm/scale", "q_norm/scale", "v/kernel"), ("down", "gate", "up")
    assert names == [f"layers/attn/{name}" for name in attention] + [f"layers/mlp/{name}/kernel" for name in mlp]


def test_a_layer_that_is_not_stored(saved: Path) -> None:
    with pytest.raises(UserError, match=r"  layers/attn/k/kernel: \(2, .*\) stored, \(3, .*\) wanted"):
        load_params(saved, dataclasses.replace(MODEL, layers=3), keep_layers=(0, 2, 1))


def test_a_model_may_be_saved_over_another(saved: Path) -> None:
    save_model(saved, MODEL, init_params(MODEL, 1))
    jax.tree.map(np.testing.assert_array_equal, load_params(saved, MODEL), init_params(MODEL, 1))


def test_a_vocabulary_may_take_all_stored_rows(saved: Path) -> None:
    restored = load_params(saved, dataclasses.replace(MODEL, vocab_size=64, padded_vocab_size=None))
    np.testing.assert_array_equal(restored["embed"], init_params(MODEL, 0)["embed"])


def test_a_run_and_its_steps_are_models(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, init_from="elsewhere", keep_layers=(1, 2))
    config = dataclasses.replace(configs.Config(), model=model)
    checkpoints = RunCheckpoints(tmp_path, config)
    for step in (4, 6):
        checkpoints.save(TrainState(jnp.int32(step), init_params(MODEL, step), {"m": jnp.ones(1)}), {"data": ""}, None)
    checkpoints.wait()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    for path, step in (tmp_path, 6), (tmp_path / "checkpoints" / "6", 6), (tmp_path / "checkpoints" / "4", 4):
        assert run_config(path) == config
        assert read_model_config(path) == MODEL
        assert params_directory(path) == tmp_path / "checkpoints" / str(step) / "params"
        np.testing.assert_array_equal(load_model(path)(TOKENS), bind(MODEL, init_params(MODEL, step))(TOKENS))
    assert run_config(tmp_path / "checkpoints") is None


def test_a_configuration_without_init_from_is_left_alone() -> None:
    config = configs.Config()
    assert adopt_architecture(config) is config


def test_padding_may_count_when_it_is_as_stored(saved: Path) -> None:
    base = configs.replace(configs.Config(), model__init_from=str(saved), loss__include_vocab_padding=True)
    for padded in (None, 64):
        assert adopt_architecture(configs.replace(base, model__padded_vocab_size=padded)).model.vocab_rows == 64
