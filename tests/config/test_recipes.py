"""Every shipped recipe loads, validates and has a train step whose shapes fit."""

import sys
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
from kdjax.training.layout import Layout
from kdjax.training.optim import optimizer
from kdjax.training.state import TrainState
from kdjax.training.step import make_train_step
from kdjax.types import Batch, UserError

RECIPES = command_line.recipes()
PARAMETERS = {
    "gpt2b_nemotron8b": 2.25e9,
    "llama8b_8xh100": 8.03e9,
    "llama8b_64xh100": 8.03e9,
    "nemotron15b_64xh100": 15.6e9,
    "llama70b_512xh100": 70.6e9,
    "parity_nemo": 238_144,
    "quickstart": 7_275_648,
}
# The number of H100s that a recipe is made for.
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


def load(name: str) -> Config:
    return configs.build(command_line.load(Path(name)))


def test_recipes_are_those_of_the_checkout() -> None:
    assert set(RECIPES) == set(PARAMETERS)
    assert {path.parent for path in RECIPES.values()} == {Path(__file__).parents[2] / "configs"}


@pytest.mark.parametrize("name", RECIPES)
def test_loads_validates_and_steps(name: str) -> None:
    config = resolve(load(name))
    validate(config)
    shapes = param_shapes(config.model)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == pytest.approx(PARAMETERS[name], rel=0.01)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(optimizer(config.optim).init, shapes)
    )
    step = make_train_step(Layout(config, mesh.make_mesh(configs.MeshConfig().sizes, jax.devices()[:1])))
    new_state, metrics = jax.eval_shape(step, state, batch_shapes(config, top_k=4))
    assert shapes_of(new_state) == shapes_of(state)
    assert metrics["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.usefixtures("compiler", "uncached")
def test_fits_the_machine_it_is_made_for(name: str) -> None:
    """The compiled step needs at most nine tenths of each GPU's memory. Compiling takes about ten seconds."""
    config = configs.replace(load(name), model__attention="xla")
    assert config.data.sequence_length == 4096
    assert config.batch.global_size >= 128
    made = make_plan(resolve(config), "h100", MACHINES[name])
    assert made.fits, made.memory
    assert made.compile_s < 60


@pytest.mark.parametrize("name", RECIPES)
def test_opens_like_a_lab_notebook(name: str) -> None:
    text = RECIPES[name].read_text()
    for heading in ("Purpose", "Source", "Hardware", "Time", "Expect", "Run"):
        assert f"\n{heading} " in text, heading
    assert f"--config {name} " in text, "its Run line must start this recipe"
    recipe = command_line.load(Path(name))
    assert all(group.is_locked for group in [recipe, *recipe.values()])


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("llama8b_64xh100", "batch.microbatch_size mesh.fsdp"),
        (
            "llama70b_512xh100",
            "model.layers model.d_model model.n_heads model.d_ff data.train data.val batch.global_size "
            "batch.microbatch_size optim.lr optim.min_lr mesh.pipe mesh.fsdp mesh.tensor mesh.interleave",
        ),
        (
            "nemotron15b_64xh100",
            "model.d_model model.n_heads model.d_ff model.vocab_size model.rope_theta model.rope_fraction "
            "model.rope_llama3 model.norm model.activation data.train data.val optim.lr optim.min_lr "
            "mesh.fsdp mesh.tensor",
        ),
    ],
)
def test_a_derived_recipe_changes_these_knobs_only(name: str, knobs: str) -> None:
    derived = load(name)
    changed = {key for key, _, _ in configs.differences(load("llama8b_8xh100"), derived)}
    assert changed == set(knobs.split())
    if name.startswith("nemotron"):  # nothing of Llama's rotary positions is left
        assert (derived.model.rope_llama3, derived.model.rope_theta) == (None, 1e4)


def test_the_tutorial_is_nemo_aligners() -> None:
    config = load("gpt2b_nemotron8b")
    assert (config.batch.global_size, config.optim.lr, config.data.sequence_length) == (128, 1e-5, 4096)
    assert (config.loss.kd_loss_weight, config.loss.sft_loss_weight, config.loss.kd_loss) == (1.0, 0.4, "fwd_kl")


BASE = """from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"optim": {"lr": %s}})
"""
DERIVED = """import base
from ml_collections import ConfigDict
def get_config():
    import llama8b_8xh100
    config = base.get_config()
    config.model = llama8b_8xh100.get_config().model
    return config
"""


def test_a_recipe_imports_siblings_and_shipped_recipes(tmp_path: Path) -> None:
    """Each directory's own `base.py`, even where the sibling is imported late; nothing of it stays behind."""
    path_before, modules_before = list(sys.path), set(sys.modules)
    for lr in (0.25, 0.5):
        directory = tmp_path / str(lr)
        directory.mkdir()
        (directory / "base.py").write_text(BASE % lr)
        (directory / "derived.py").write_text(DERIVED)
        config = configs.build(command_line.load(directory / "derived.py"))
        assert (config.optim.lr, config.model.d_model) == (lr, 4096)
    assert sys.path == path_before
    assert not {"base", "derived", "llama8b_8xh100"} & (sys.modules.keys() - modules_before)


def test_a_name_is_the_shipped_recipes_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # such as a run directory
    assert configs.to_json(load("quickstart")) == configs.to_json(
        configs.build(command_line.load(RECIPES["quickstart"]))
    )
    (tmp_path / "quickstart.py").write_text(BASE % 0.5)
    assert load("quickstart.py").optim.lr == 0.5
    with pytest.raises(UserError, match=r"configs/quickstart.py: .* for a shipped recipe write --config quickstart$"):
        load("configs/quickstart.py")


def test_the_path_is_restored_when_a_recipe_fails(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    before = list(sys.path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        command_line.load(tmp_path / "broken.py")
    assert sys.path == before
