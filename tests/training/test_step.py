"""The steps as pure functions: what the split may change (nothing) and what each knob must."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_problem as toy
from compiled_steps import eval_step, init_state, train_step

from kdjax.config import Config, MeshConfig
from kdjax.config.validate import resolve
from kdjax.data.dataset import open_dataset
from kdjax.data.loader import eval_batches, train_batches
from kdjax.losses import topk_kd_loss
from kdjax.model import bind, init_params
from kdjax.parallel import mesh as meshes
from kdjax.training.layout import Layout
from kdjax.training.optim import learning_rate, optimizer
from kdjax.training.state import TrainState
from kdjax.training.step import make_train_step
from kdjax.types import Batch, UserError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return resolve(toy.config(tmp_path))


def first_batch(config: Config) -> Batch:
    data = open_dataset(config.data.train, config.data, vocab_size=config.model.vocab_size)
    size = config.batch.global_size
    return next(train_batches(data, config.data, global_size=size, start_step=0, stop_step=1, rows=slice(0, size)))


def mesh_of(devices: int, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return meshes.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor).sizes, jax.devices()[:devices])


def one_step(config: Config, batch: Batch, *mesh_sizes: int) -> tuple[TrainState, dict[str, float]]:
    layout = Layout(config, mesh_of(*(mesh_sizes or (1,))))
    state, metrics = train_step(layout)(init_state(layout), meshes.put_rows(layout.mesh, batch))
    return state, {name: float(value) for name, value in metrics.items()}


def changed(config: Config, **groups: dict[str, Any]) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in groups.items()}
    )


def oracle(config: Config, batch: Batch) -> tuple[float, Any]:
    """Loss and gradient of the whole batch at once, by autodiff through the reference loss."""
    params = init_params(config.model, jax.random.key(config.train.seed))

    def loss(params: Any) -> jax.Array:
        logits = bind(config.model, params)(batch.tokens)
        per_token, _, _ = topk_kd_loss(
            logits,
            batch.topk_logits,
            batch.topk_token_ids,
            batch.labels,
            kd_loss_weight=1.0,
            sft_loss_weight=0.4,
            implementation="reference",
        )
        return jnp.where(batch.loss_mask > 0, per_token, 0).sum() / batch.loss_mask.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
def test_nemo_reduction_is_the_mean_of_microbatch_means(config: Config) -> None:
    batch = first_batch(config)
    means = []
    for row in range(0, 8, 2):
        part = jax.tree.map(lambda x, row=row: x[row : row + 2], batch)
        means.append(float(oracle(config, part)[0]))
    nemo = changed(config, loss={"reduction": "nemo"})
    for devices in (1, 4):
        np.testing.assert_allclose(one_step(nemo, batch, devices)[1]["loss"], np.mean(means), rtol=1e-6)
    assert abs(one_step(config, batch)[1]["loss"] - np.mean(means)) > 1e-4


def test_the_update_is_the_optimisers(config: Config) -> None:
    batch = first_batch(config)
    params = init_params(config.model, jax.random.key(0))
    tx = optimizer(config.optim)
    directions, _ = tx.update(oracle(config, batch)[1], tx.init(params), params)
    state, metrics = one_step(config, batch)
    lr = float(learning_rate(config.optim, config.train.steps)(0))
    assert metrics["lr"] == pytest.approx(lr)
    jax.tree.map(
        lambda p, d, q: np.testing.assert_allclose(p - lr * d, q, rtol=1e-4, atol=2e-6),
        params,
        directions,
        state.params,
    )
    assert int(state.step) == 1


def test_a_batch_without_tokens_changes_nothing_but_the_step(config: Config) -> None:
    batch = first_batch(config)
    empty = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    before = init_state(Layout(config, mesh_of(1)))
    state, metrics = one_step(config, empty)
    assert metrics["skipped"] == 1
    assert metrics["tokens"] == 0
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))


def test_a_non_finite_gradient_changes_nothing_but_the_step(config: Config) -> None:
    batch = first_batch(config)
    broken = batch.topk_logits.copy()
    broken[0, 2, 0] = np.nan  # an unmasked position
    before = init_state(Layout(config, mesh_of(2)))
    state, metrics = one_step(config, dataclasses.replace(batch, topk_logits=broken), 2)
    assert metrics["skipped"] == 1
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))


def test_nan_at_masked_positions_does_not_matter(config: Config) -> None:
    batch = first_batch(config)
    broken = np.where(batch.loss_mask[..., None] == 0, np.nan, batch.topk_logits)
    plain, found = one_step(config, batch), one_step(config, dataclasses.replace(batch, topk_logits=broken))
    assert found[1]["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, found[0].params, plain[0].params)


def test_fully_masked_rows_do_not_dilute(config: Config) -> None:
    batch = first_batch(config)
    mask = batch.loss_mask.copy()
    mask[4:] = 0
    masked = dataclasses.replace(batch, loss_mask=mask)
    half = jax.tree.map(lambda x: x[:4], batch)
    np.testing.assert_allclose(one_step(config, masked)[1]["loss"], oracle(config, half)[0], rtol=1e-6)


def evaluate(config: Config, devices: int, global_size: int) -> dict[str, float]:
    layout = Layout(config, mesh_of(devices))
    step, params = eval_step(layout), init_state(layout).params
    data = open_dataset(config.data.val, config.data, vocab_size=config.model.vocab_size)
    total: dict[str, Any] | None = None
    for batch in eval_batches(data, config.data, global_size=global_size, max_batches=None, rows=slice(0, global_size)):
        sums = step(params, meshes.put_rows(layout.mesh, batch))
        total = sums if total is None else {name: total[name] + sums[name] for name in sums}
    assert total is not None
    return {name: float(pair.mean) for name, pair in total.items()} | {"tokens": float(total["loss"].count)}


def test_validation_counts_every_token_once_whatever_the_batch(config: Config) -> None:
    """Eleven records in batches of 8, 4 or 2: the last batch is never full and never dropped."""
    expected = evaluate(config, 1, 2)
    assert expected["tokens"] == sum(sum(toy.record(1000 + i)["loss_mask"]) for i in range(11))
    for devices, size in ((1, 8), (4, 8), (2, 4)):
        found = evaluate(config, devices, size)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def test_packed_and_unpacked_agree(config: Config) -> None:
    """Short records in one row, kept apart, have the losses they have in rows of their own."""
    config = changed(config, data={"sequence_length": 40}, model={"init_std": 0.3})
    packed = changed(config, data={"pack": True})
    rows = open_dataset(packed.data.val, packed.data, vocab_size=packed.model.vocab_size).rows
    assert rows is not None
    assert len(rows) < 6  # eleven records of 5 to 12 tokens
    expected, found = evaluate(config, 1, 8), evaluate(packed, 1, 8)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


def test_validation_measures_terms_of_weight_zero(config: Config) -> None:
    both, kd_only = (evaluate(changed(config, loss={"sft_loss_weight": w}), 1, 8) for w in (0.4, 0.0))
    np.testing.assert_allclose(kd_only["sft_loss"], both["sft_loss"], rtol=1e-6)
    np.testing.assert_allclose(kd_only["loss"], both["kd_loss"], rtol=1e-6)
    np.testing.assert_allclose(both["loss"], both["kd_loss"] + 0.4 * both["sft_loss"], rtol=1e-6)


def test_teacher_statistics(config: Config) -> None:
    batch = first_batch(config)
    keep = batch.loss_mask > 0
    mass = np.exp(batch.topk_logits - batch.log_sum_exp_logits[..., None]).sum(axis=-1)[keep].mean()
    p = np.exp(batch.topk_logits)
    p /= p.sum(axis=-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=-1)[keep].mean()
    _, metrics = one_step(config, batch)
    np.testing.assert_allclose(metrics["teacher_topk_mass"], mass, rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher_entropy"], entropy, rtol=1e-5)
    assert 0 <= metrics["top1_agreement"] <= 1
    assert 0 < metrics["student_topk_mass"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"kd_loss": "bwd_kl"},
        {"kd_loss": "jsd"},
        {"kd_loss_weight": 0.5},
        {"sft_loss_weight": 0.1},
        {"logits_scale": 0.7},
        {"target_logits_scale": 0.7},
        {"cross_tokenizer": "rank_match"},
        {"tail": "ghost"},
        {"tail": "label"},
        {"reduction": "nemo"},
    ],
    ids=str,
)
def test_every_loss_knob_changes_the_loss(config: Config, change: dict[str, Any]) -> None:
    batch = first_batch(config)
    config = changed(config, model={"init_std": 0.3})
    base, found = one_step(config, batch)[1]["loss"], one_step(changed(config, loss=change), batch)[1]["loss"]
    assert np.isfinite(found)
    assert abs(found - base) > 1e-4


TWO_SHARDS = {"init_std": 0.3, "padded_vocab_size": 62}  # a vocabulary that two devices can split


def test_label_tail_trains_as_the_specification_says(config: Config) -> None:
    """On one device and with the vocabulary on two: the labels are read without an SFT term."""
    batch = first_batch(config)
    config = changed(config, model=TWO_SHARDS, loss={"sft_loss_weight": 0.0, "tail": "label"})
    params = init_params(config.model, jax.random.key(config.train.seed))
    logits = bind(config.model, params)(batch.tokens)[..., : config.model.vocab_size]
    t = np.exp(batch.topk_logits - batch.log_sum_exp_logits[..., None])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    kd = -(t * np.take_along_axis(log_p, batch.topk_token_ids, -1)).sum(-1)
    kd -= (1 - t.sum(-1)) * np.take_along_axis(log_p, batch.labels[..., None], -1)[..., 0]
    (state, metrics), (split, split_metrics) = one_step(config, batch), one_step(config, batch, 2, 1, 2)
    expected = (batch.loss_mask * kd).sum() / batch.loss_mask.sum()
    for found in (metrics, split_metrics):
        np.testing.assert_allclose(found["kd_loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    start = Layout(config, mesh_of(1)).init_state().params
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(*map(jax.tree.leaves, (state.params, start)), strict=True))
    for ours, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(split.params), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)


def test_sampled_targets_take_the_weights_of_the_batch(config: Config) -> None:
    """Through the pipeline's microbatches, in training and validation; the teacher's entropy is estimated alike."""
    batch = first_batch(config)
    weights = np.random.default_rng(5).uniform(0, 0.2, batch.topk_logits.shape).astype(np.float32)
    batch = dataclasses.replace(batch, topk_weights=weights)
    config = changed(config, model=TWO_SHARDS, loss={"targets": "sampled"})
    params = init_params(config.model, jax.random.key(config.train.seed))
    logits = bind(config.model, params)(batch.tokens)[..., : config.model.vocab_size]
    log_t = batch.topk_logits - batch.log_sum_exp_logits[..., None]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.topk_token_ids, -1)
    tokens = batch.loss_mask.sum()
    expected = {
        "kd_loss": (batch.loss_mask[..., None] * weights * (log_t - log_p)).sum() / tokens,
        "teacher_entropy": -(batch.loss_mask[..., None] * weights * log_t).sum() / tokens,
    }
    layout = Layout(config, mesh_of(1))
    judged = eval_step(layout)(layout.init_state().params, meshes.put_rows(layout.mesh, batch))
    _, metrics = one_step(config, batch, 2, 1, 2)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(float(judged[name].mean), value, rtol=1e-5, err_msg=name)
    assert "teacher_topk_mass" not in metrics
    shapes = layout.abstract_batch(batch.topk_logits.shape[-1])
    assert shapes.topk_weights.shape == weights.shape
    with pytest.raises(UserError, match="targets = 'sampled' needs topk_weights"):
        one_step(config, dataclasses.replace(batch, topk_weights=None))


def test_jsd_beta_and_implementation(config: Config) -> None:
    batch = first_batch(config)
    config = changed(config, model={"init_std": 0.3}, loss={"kd_loss": "jsd"})
    base = one_step(config, batch)[1]["loss"]
    assert abs(one_step(changed(config, loss={"jsd_beta": 0.2}), batch)[1]["loss"] - base) > 1e-4
    np.testing.assert_allclose(
        one_step(changed(config, loss={"implementation": "reference"}), batch)[1]["loss"], base, rtol=1e-5
    )


def test_gathered_rows_train_alike_and_leave_out_what_they_cannot_tell(config: Config) -> None:
    """Distillation alone; validation, which measures the SFT term, goes by way of all logits."""
    batch = first_batch(config)
    config = changed(config, model={"init_std": 0.3}, loss={"sft_loss_weight": 0.0, "tail": "renormalize"})
    dense, rows = (changed(config, loss={"implementation": name}) for name in ("xla", "gathered"))
    (expected_state, expected), (state, metrics) = one_step(dense, batch), one_step(rows, batch)
    assert expected.keys() - metrics.keys() == {"top1_agreement", "student_topk_mass"}
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    for ours, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)
    mesh = mesh_of(1)
    judged = eval_step(Layout(rows, mesh))(state.params, meshes.put_rows(mesh, batch))
    assert float(judged["sft_loss"].mean) > 0


def test_vocabulary_padding_counts_only_when_asked(config: Config) -> None:
    batch = first_batch(config)
    config = changed(config, model={"padded_vocab_size": 96, "init_std": 0.3})
    without, within = (one_step(changed(config, loss={"include_vocab_padding": x}), batch)[1] for x in (False, True))
    assert within["sft_loss"] > without["sft_loss"] + 0.1
    np.testing.assert_allclose(within["kd_loss"], without["kd_loss"], rtol=1e-5)


def test_a_batch_that_does_not_split_names_those_that_do(config: Config) -> None:
    with pytest.raises(UserError, match=r"global_size = 8 .* microbatch_size 2 x 3 replicas; set it to 6 or 12"):
        meshes.check_batch(mesh_of(3), config.batch.global_size, config.batch.microbatch_size)


def test_gradients_are_reduced_once_a_step(config: Config) -> None:
    """However many microbatches: one combined all-reduce, outside the loop."""
    mesh = mesh_of(2)
    config = changed(config, batch={"microbatch_size": 1})
    batch = meshes.put_rows(mesh, first_batch(config))
    text = make_train_step(Layout(config, mesh)).lower(init_state(Layout(config, mesh)), batch).compile().as_text()
    loops = [part for part in text.split("\n\n") if "region" in part.split("\n")[0] or "body" in part.split("\n")[0]]
    assert text.count(" all-reduce(") >= 1
    assert not any(" all-reduce(" in loop for loop in loops)


def test_each_device_holds_its_shards_of_the_state(config: Config) -> None:
    """Of the parameters a quarter, of the moments an eighth, each replica's; before and after a step."""
    config = changed(config, batch={"microbatch_size": 1})
    mesh, batch = mesh_of(8, fsdp=4), first_batch(config)
    state = init_state(Layout(config, mesh))
    assert config.optim.name == "adamw"
    for _ in range(2):
        for tree, share in ((state.params, 0.25), (state.opt_state, 0.125)):
            held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))
            whole = sum(leaf.size for leaf in jax.tree.leaves(tree))
            assert share * whole <= held < 1.1 * share * whole, (held, whole)
        state, _ = train_step(Layout(config, mesh))(state, meshes.put_rows(mesh, batch))


def test_parameters_are_gathered_once_a_step(config: Config) -> None:
    """However many microbatches: no collective in the loop; gradients are scattered, not reduced whole."""
    mesh = mesh_of(4, fsdp=4)
    config = changed(config, batch={"microbatch_size": 1})
    batch = meshes.put_rows(mesh, first_batch(config))
    text = make_train_step(Layout(config, mesh)).lower(init_state(Layout(config, mesh)), batch).compile().as_text()
    loops = [part for part in text.split("\n\n") if "region" in part.split("\n")[0] or "body" in part.split("\n")[0]]
    assert loops
    assert " all-gather(" in text
    assert " reduce-scatter(" in text
    for kind in (" all-gather(", " all-reduce(", " reduce-scatter("):
        assert not any(kind in loop for loop in loops), kind
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for shape in re.findall(r"\[([\d,]*)\]\{?[\d,]*\}? all-reduce", text)
    ]
    largest = max(leaf.size for leaf in jax.tree.leaves(init_params(config.model, 0)))
    assert max(sizes, default=0) < largest / 4
