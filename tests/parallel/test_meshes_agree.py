"""One step's loss and gradient, whatever the mesh and the microbatches, beside autodiff of one row after another."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_problem as toy

from kdjax import config as configs
from kdjax.config import Config, MeshConfig
from kdjax.config.validate import resolve, validate_split
from kdjax.losses import topk_kd_loss
from kdjax.model import bind, init_params
from kdjax.parallel import mesh as meshes
from kdjax.training.layout import Layout
from kdjax.training.step import make_eval_step, make_train_step
from kdjax.types import Batch

pytestmark = pytest.mark.slow

T, K, VOCAB = 7, 5, 61  # in 64 stored rows, so that one shard of eight holds padding

LLAMA = {"layers": 16, "n_heads": 8, "n_groups": 8, "head_dim": 4, "padded_vocab_size": 64, "vocab_size": VOCAB}
FLAVOURS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"model__n_groups": 4, "model__tied": False, "loss__kd_loss": "bwd_kl"},
    "gpt2": {
        "model__bias": True,
        "model__norm": "layernorm",
        "model__position": "learned",
        "model__max_positions": T,
        "model__activation": "gelu",
        "loss__tail": "ghost",
    },
    "qwen": {
        "model__qk_norm": True,
        "model__qkv_bias": True,
        "model__tied": False,
        "loss__kd_loss": "jsd",
        "loss__sft_loss_weight": 0.0,
    },
    "ranked": {"loss__cross_tokenizer": "rank_match"},
    "gathered": {"loss__implementation": "gathered", "loss__sft_loss_weight": 0.0},
    "packed": {"data__pack": True, "model__remat": "layer", "loss__logits_scale": 0.7},
}


class Case(NamedTuple):
    """A mesh, and what goes through it."""

    mesh: tuple[int, int, int, int]  # pipe, data, fsdp, tensor
    microbatches: int
    interleave: int = 1
    flavour: str = "llama"
    rows: int = 1  # of a microbatch
    schedule: str = "1f1b"

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        return f"{mesh}-M{self.microbatches}-v{self.interleave}-{self.flavour}-{self.rows}-{self.schedule}"


CASES = [
    # Rows alone, then with the state, then the layers split.
    Case((1, 1, 1, 1), 1, rows=8),
    Case((1, 8, 1, 1), 1),
    Case((1, 8, 1, 1), 4, 1, "packed"),
    Case((1, 1, 8, 1), 1, 1, "grouped"),
    Case((1, 2, 2, 1), 3, 1, "gpt2", 2),
    Case((1, 1, 1, 8), 1),
    Case((1, 1, 1, 8), 4, 1, "ranked"),
    Case((1, 2, 2, 2), 1, 1, "qwen"),
    Case((1, 2, 2, 2), 5, 1, "gathered"),
    # Stages: fewer microbatches than stages, as many, one more, four times as many.
    Case((4, 2, 1, 1), 1),
    Case((4, 2, 1, 1), 4, 2, "packed"),
    Case((4, 2, 1, 1), 5, 1, "gpt2"),
    Case((4, 2, 1, 1), 16, 2, "grouped"),
    Case((2, 2, 1, 2), 1, 2, "gpt2"),
    Case((2, 2, 1, 2), 2, 1, "ranked", 2),
    Case((2, 2, 1, 2), 3, 2, "qwen"),
    Case((2, 2, 1, 2), 8, 1, "packed"),
    Case((4, 1, 1, 2), 5, 2, "gathered"),
    Case((4, 1, 1, 2), 16, 1, "grouped"),
    Case((2, 1, 4, 1), 8, 2, "ranked"),
    Case((8, 1, 1, 1), 1, 2, "packed"),
    Case((8, 1, 1, 1), 9, 2, "gpt2"),
    Case((8, 1, 1, 1), 32, 1, "qwen"),
    # GPipe, JAX's own differentiation of the forward pipeline.
    Case((4, 2, 1, 1), 5, 1, "packed", 1, "gpipe"),
    Case((2, 1, 2, 2), 4, 2, "gpt2", 1, "gpipe"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_whatever_the_split(case: Case, tmp_path: Path) -> None:
    """Rows carry unequal numbers of tokens, so only sums divided once can agree."""
    config, mesh = the_config(tmp_path, case), the_mesh(case)
    validate_split(config, mesh.shape)
    batch = made_batch(case.microbatches * case.rows * meshes.replicas(mesh), config.data.pack)
    expected_loss, expected_gradient = serial(config, batch)

    state, on_mesh = Layout(config, mesh).init_state(), meshes.put_rows(mesh, batch)
    judged = make_eval_step(Layout(config, mesh))(state.params, on_mesh)
    state, metrics = make_train_step(Layout(config, mesh))(state, on_mesh)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=2e-6)
    np.testing.assert_allclose(judged["loss"].mean, expected_loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected_gradient), rtol=2e-6)
    # Descent with momentum 0 keeps the gradient itself as its state.
    found = dict(jax.tree.leaves_with_path(optax.tree.get(state.opt_state, "trace")))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    for path, expected in jax.tree.leaves_with_path(expected_gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Softmax takes no notice of a bias on the keys: what gradient it gets is rounding.
        scale = largest if name == "layers/attn/k/bias" and not config.model.qk_norm else np.abs(expected).max()
        assert np.abs(found[path] - expected).max() < 1e-5 * scale, name


def the_mesh(case: Case) -> jax.sharding.Mesh:
    sizes = MeshConfig(*case.mesh).sizes
    return meshes.make_mesh(sizes, jax.devices()[: int(np.prod(case.mesh))])


def the_config(directory: Path, case: Case) -> Config:
    changes: dict[str, Any] = {f"model__{name}": value for name, value in LLAMA.items()}
    changes |= {"optim__name": "sgd", "optim__b1": 0.0, "optim__weight_decay": 0.0, "optim__clip_norm": None}
    changes |= {"mesh__interleave": case.interleave, "mesh__schedule": case.schedule, "data__sequence_length": T}
    rows = case.microbatches * case.rows * case.mesh[1] * case.mesh[2]
    changes |= {"batch__global_size": rows, "batch__microbatch_size": case.rows}
    return resolve(toy.config(directory, **changes | FLAVOURS[case.flavour]))


@functools.cache
def made_batch(rows: int, packed: bool) -> Batch:
    """Rows with masked positions, some more than others; packed: of two documents each, of different lengths."""
    rng = np.random.default_rng(rows)
    logits = rng.normal(size=(rows, T, VOCAB)).astype(np.float32) * 2
    ids = np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)
    cut = rng.integers(1, T - 1, size=(rows, 1))
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    second = places >= cut
    mask = (rng.uniform(size=(rows, T)) < 0.7).astype(np.float32)
    mask[0] = 1
    return Batch(
        tokens=rng.integers(VOCAB, size=(rows, T)).astype(np.int32),
        labels=rng.integers(VOCAB, size=(rows, T)).astype(np.int32),
        loss_mask=mask,
        topk_logits=np.take_along_axis(logits, ids, axis=-1),
        topk_token_ids=ids,
        log_sum_exp_logits=np.log(np.exp(logits).sum(axis=-1)),
        positions=np.where(second, places - cut, places).astype(np.int32) if packed else None,
        segment_ids=second.astype(np.int32) if packed else None,
    )


def serial(config: Config, batch: Batch) -> tuple[float, Any]:
    """Loss and gradient by JAX's own differentiation of the reference loss, a row at a time, summed in float64."""
    key = dataclasses.replace(config.loss, implementation=None), config.model
    params = init_params(config.model, jax.random.key(config.train.seed))
    total, count = (0.0, jax.tree.map(lambda x: np.zeros(x.shape), params)), batch.loss_mask.sum()
    for row in range(len(batch.tokens)):
        found = _differentiated(*key)(params, jax.tree.map(lambda x, row=row: x[row : row + 1], batch))
        total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, found)
    loss, gradient = jax.tree.map(lambda x: x / count, total)
    return float(loss), gradient


@functools.cache
def _differentiated(loss: configs.LossConfig, model: configs.ModelConfig) -> Any:
    def total(params: Any, row: Batch) -> jax.Array:
        per_token, _, _ = topk_kd_loss(
            bind(model, params)(row.tokens, row.positions, row.segment_ids),
            row.topk_logits,
            row.topk_token_ids,
            row.labels,
            kd_loss=loss.kd_loss,
            kd_loss_weight=loss.kd_loss_weight,
            sft_loss_weight=loss.sft_loss_weight,
            logits_scale=loss.logits_scale,
            cross_tokenizer=loss.cross_tokenizer,
            tail=loss.tail,
            log_sum_exp_logits=row.log_sum_exp_logits,
            implementation="reference",
        )
        return jnp.where(row.loss_mask > 0, row.loss_mask * per_token, 0).sum()

    return jax.jit(jax.value_and_grad(total))
