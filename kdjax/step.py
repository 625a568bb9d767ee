"""The pure steps: make a state, train on a global batch, evaluate one. Jitted once each.

A step sees the whole global batch. Every device gathers the parameters of which it holds a shard (the whole without
`mesh.fsdp`) and scans over its microbatches, adding up gradients and sums; then one sum over the devices, which leaves
each with its shard of the gradients, one division, one update.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from kdjax import mesh as meshes
from kdjax.config import Config
from kdjax.losses import LossSums, linear_topk_kd_loss
from kdjax.model import Params, bind, init_params, param_shapes, tensor_axes
from kdjax.optim import optimizer, schedule
from kdjax.types import Batch, SumCount

Metrics = dict[str, jax.Array]
Sums = dict[str, SumCount]
Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step, and all that a checkpoint needs besides the configuration."""

    step: jax.Array  # int32 scalar: updates made or left out so far = position in the data
    params: Params
    opt_state: optax.OptState


def init_state(config: Config, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A fresh state on the mesh, from `params` or newly drawn from `train.seed`."""

    def make(key: Array, params: Params | None) -> TrainState:
        params = init_params(config.model, key) if params is None else params
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config.optim).init(params))

    return jax.jit(make, out_shardings=state_shardings(config, mesh))(jax.random.key(config.train.seed), params)


def state_shardings(config: Config, mesh: Mesh) -> Any:
    """Where each array of the state lies, as a `TrainState` of shardings."""
    tx, whole = optimizer(config.optim), meshes.replicated(mesh)
    params = param_shardings(config, mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, param_shapes(config.model)),
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(cast(Any, whole), params, opt_state)


def abstract_state(config: Config, mesh: Mesh) -> Any:
    """A state's shapes and where they lie, to compile with."""

    def shape(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = param_shapes(config.model)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.eval_shape(optimizer(config.optim).init, params))
    return jax.tree.map(shape, state, state_shardings(config, mesh))


def param_shardings(config: Config, mesh: Mesh) -> Params:
    """Where each parameter lies."""
    return meshes.shardings(mesh, _specs(config, mesh))


def _specs(config: Config, mesh: Mesh) -> Any:
    return meshes.param_specs(mesh, param_shapes(config.model), tensor_axes(config.model))


def make_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update. Its metrics are device scalars, means in nats per token where they are losses.

    A step whose gradient is not finite, or whose batch holds no unmasked token, changes nothing but the step number
    and reports `skipped` = 1. The state is donated.
    """
    tx, rate = optimizer(config.optim), schedule(config.optim, config.train.steps)
    specs = _specs(config, mesh)

    def gradient(params: Params, batch: Batch) -> tuple[Params, Sums]:
        params = meshes.gather_params(params, specs)
        microbatches = _split(batch, config.batch.microbatch_size)
        differentiate = jax.grad(functools.partial(_objective, config, mesh), has_aux=True)
        grads, sums = _scan_sum(functools.partial(differentiate, params), microbatches)
        return meshes.sum_to_shards(grads, specs), meshes.sum_over_batch_axes(sums)

    gradient = meshes.per_device(gradient, mesh, (specs, meshes.ROWS), (specs, meshes.REPLICATED))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = gradient(state.params, batch)
        grads = jax.tree.map(lambda g: SumCount(g, sums["loss"].count).mean, grads)
        grad_norm, lr = optax.tree.norm(grads), rate(state.step)
        directions, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - (lr * d).astype(p.dtype), state.params, directions)
        tokens = sums["teacher_entropy"].count
        sound = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"].sum) & (tokens > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {name: pair.mean for name, pair in sums.items()}
        metrics |= {
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "skipped": 1 - sound.astype(jnp.int32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings(config, mesh), meshes.replicated(mesh)))


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Params, Batch], Sums]:
    """The jitted evaluation of one global batch: sums and counts a metric, to be added up over batches.

    Both terms are measured whatever their weights, and always as means over tokens.
    """
    weights = config.loss.kd_loss_weight, config.loss.sft_loss_weight
    specs = _specs(config, mesh)

    def one(params: Params, microbatch: Batch) -> Sums:
        sums = _loss_sums(config, mesh, params, microbatch, (1.0, 1.0))
        sums = sums._replace(loss=weights[0] * sums.kd_loss + weights[1] * sums.sft_loss)
        return _by_token(config, sums, microbatch)

    def evaluate(params: Params, batch: Batch) -> Sums:
        params = meshes.gather_params(params, specs)
        microbatches = _split(batch, config.batch.microbatch_size)
        return meshes.sum_over_batch_axes(_scan_sum(functools.partial(one, params), microbatches))

    return jax.jit(meshes.per_device(evaluate, mesh, (specs, meshes.ROWS), meshes.REPLICATED))


def _objective(config: Config, mesh: Mesh, params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    """A microbatch's share of what is minimised, before the one division by the summed count of "loss"."""
    sums = _loss_sums(config, mesh, params, batch, (config.loss.kd_loss_weight, config.loss.sft_loss_weight))
    metrics = _by_token(config, sums, batch)
    if config.loss.reduction == "nemo":  # every microbatch counts as one, however many tokens it holds
        for name in ("loss", "kd_loss", "sft_loss"):
            metrics[name] = SumCount(metrics[name].sum / jnp.maximum(sums.tokens, 1), jnp.ones(()))
    return metrics["loss"].sum, metrics


def _loss_sums(config: Config, mesh: Mesh, params: Params, batch: Batch, weights: tuple[float, float]) -> LossSums:
    loss, shards = config.loss, meshes.shards(mesh)
    model = bind(config.model, params, shards)
    # Validation measures what K rows cannot tell; the choice for it is open then.
    implementation = None if loss.implementation == "gathered" and weights[1] != 0 else loss.implementation
    hidden_BxTxD = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    return linear_topk_kd_loss(
        hidden_BxTxD,
        model.unembedding().astype(hidden_BxTxD.dtype),
        batch.topk_logits,
        batch.topk_token_ids,
        batch.labels,
        batch.loss_mask,
        kd_loss=loss.kd_loss,
        kd_loss_weight=weights[0],
        sft_loss_weight=weights[1],
        logits_scale=loss.logits_scale,
        target_logits_scale=loss.target_logits_scale,
        cross_tokenizer=loss.cross_tokenizer,
        tail=loss.tail,
        log_sum_exp_logits=batch.log_sum_exp_logits,
        jsd_beta=loss.jsd_beta,
        axis_name=meshes.VOCABULARY_AXES if shards > 1 else None,
        vocab_size=None if loss.include_vocab_padding else config.model.vocab_size,
        implementation=implementation,
    )


def _by_token(config: Config, sums: LossSums, batch: Batch) -> Sums:
    """The loss sums and the teacher's statistics, each over the microbatch's tokens."""
    log_p_BxTxK = jax.nn.log_softmax(config.loss.target_logits_scale * batch.topk_logits.astype(jnp.float32))
    totals = {name: total for name, total in sums._asdict().items() if total is not None}
    tokens = totals.pop("tokens")
    totals["teacher_entropy"] = _masked_sum(batch, -jnp.sum(_xlogx(log_p_BxTxK), axis=-1))
    if batch.log_sum_exp_logits is not None:
        log_mass_BxT = jax.nn.logsumexp(batch.topk_logits, axis=-1) - batch.log_sum_exp_logits
        totals["teacher_topk_mass"] = _masked_sum(batch, jnp.exp(log_mass_BxT))
    return {name: SumCount(total, tokens) for name, total in totals.items()}


def _xlogx(log_x: jax.Array) -> jax.Array:
    """x log x from log x, 0 for x = 0."""
    return jnp.where(jnp.isneginf(log_x), 0, jnp.exp(log_x) * log_x)


def _masked_sum(batch: Batch, values_BxT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(batch.loss_mask > 0, batch.loss_mask * values_BxT, 0))


def _split(batch: Batch, microbatch_size: int) -> Batch:
    """[B, ...] leaves as [M, B/M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)


def _scan_sum(f: Callable[[Batch], Tree], microbatches: Batch) -> Tree:
    """The sum of `f` over the leading axis, one microbatch in memory at a time."""
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, first))
    total, _ = jax.lax.scan(lambda total, mb: (jax.tree.map(jnp.add, total, f(mb)), None), zeros, microbatches)
    return total
