"""The pure steps: make a state, train on a global batch, evaluate one. Jitted once each.

A step sees the whole global batch. Every device gathers the parameters of which it holds a shard (the whole without
`mesh.fsdp`) and takes its microbatches one after the other, or several at once through the stages of a pipeline, adding
up gradients and sums; then one sum over the devices, which leaves each with its shard of the gradients, one division,
one update of that shard.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from kdjax.config import Config
from kdjax.losses import LossSums, linear_topk_kd_loss
from kdjax.model import Params, bind, in_compute_dtype, init_params, param_axes, param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.parallel import pipeline
from kdjax.training.optim import optimizer, schedule
from kdjax.types import Batch, SumCount

Metrics = dict[str, jax.Array]
Sums = dict[str, SumCount]


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
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, param_shapes(config.model)),
        meshes.shardings(mesh, _state_specs(config, mesh)),
        transform_non_params=lambda _: whole,
    )
    return TrainState(cast(Any, whole), param_shardings(config, mesh), opt_state)


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
    """Of the parameters."""
    return meshes.param_specs(mesh, param_shapes(config.model), param_axes(config.model))


def _state_specs(config: Config, mesh: Mesh) -> Any:
    """Of the gradients, and of what the optimiser keeps."""
    return meshes.param_specs(mesh, param_shapes(config.model), param_axes(config.model), meshes.STATE_AXES)


def make_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update. Its metrics are device scalars, means in nats per token where they are losses.

    A step whose gradient is not finite, or whose batch holds no unmasked token, changes nothing but the step number
    and reports `skipped` = 1. The state is donated.
    """
    tx, rate = optimizer(config.optim), schedule(config.optim, config.train.steps)
    gradient, updated = _make_gradient(config, mesh), meshes.shardings(mesh, _state_specs(config, mesh))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = gradient(state.params, batch)
        grads = jax.tree.map(lambda g: SumCount(g, sums["loss"].count).mean, grads)
        grad_norm, lr = optax.tree.norm(grads), rate(state.step)
        # Each device updates what it keeps optimiser state of; what comes out is gathered to where parameters lie.
        old = jax.lax.with_sharding_constraint(state.params, updated)
        directions, opt_state = tx.update(grads, state.opt_state, old)
        params = jax.tree.map(lambda p, d: p - (lr * d).astype(p.dtype), old, directions)
        tokens = sums["teacher_entropy"].count
        sound = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"].sum) & (tokens > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (params, opt_state), (old, state.opt_state)
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
    specs = meshes.stage_specs(_specs(config, mesh))

    def leave(shared: Params, y: jax.Array, microbatch: Batch) -> tuple[jax.Array, Sums]:
        sums = _loss_sums(config, mesh, shared, y, microbatch, (1.0, 1.0))
        sums = sums._replace(loss=weights[0] * sums.kd_loss + weights[1] * sums.sft_loss)
        return sums.loss, _by_token(config, sums, microbatch)

    parts = _parts(config, mesh, leave)

    def evaluate(params: Params, batch: Batch) -> Sums:
        schedule, microbatches = _schedule(config, mesh, batch)
        _, sums = pipeline.losses(parts, schedule, *_gathered(config, params, specs), microbatches)
        return meshes.sum_over_batch_axes(sums)

    local = meshes.per_device(evaluate, mesh, (specs, meshes.ROWS), meshes.REPLICATED)
    return jax.jit(lambda params, batch: local(_by_stage(config, mesh, params), batch))


def _make_gradient(config: Config, mesh: Mesh) -> Callable[[Params, Batch], tuple[Params, Sums]]:
    """(parameters, global batch) to the gradient of the loss summed over the batch, and the sums."""
    specs, grad_specs = meshes.stage_specs(_specs(config, mesh)), meshes.stage_specs(_state_specs(config, mesh))
    parts = _parts(config, mesh, functools.partial(_objective, config, mesh))
    differentiate = {"1f1b": pipeline.gradients, "gpipe": pipeline.gpipe_gradients}[config.mesh.schedule]

    def gradient(params: Params, batch: Batch) -> tuple[Params, Sums]:
        schedule, microbatches = _schedule(config, mesh, batch)
        grads, chunk_grads, sums = differentiate(parts, schedule, *_gathered(config, params, specs), microbatches)
        grads["layers"] = jax.tree.map(lambda g: jnp.expand_dims(g, 1), chunk_grads)
        return meshes.sum_to_shards(grads, grad_specs), meshes.sum_over_batch_axes(sums)

    local = meshes.per_device(gradient, mesh, (specs, meshes.ROWS), (grad_specs, meshes.REPLICATED))

    def of_stacked(params: Params, batch: Batch) -> tuple[Params, Sums]:
        grads, sums = local(_by_stage(config, mesh, params), batch)
        return grads | {"layers": pipeline.stacked(grads["layers"])}, sums

    return of_stacked


def _schedule(config: Config, mesh: Mesh, batch: Batch) -> tuple[pipeline.Schedule, Batch]:
    """A device's rows as microbatches, [B, ...] as [M, B/M, ...], and their way through the stages."""
    microbatches = jax.tree.map(lambda x: x.reshape(-1, config.batch.microbatch_size, *x.shape[1:]), batch)
    return pipeline.Schedule(mesh.shape["pipe"], config.mesh.interleave, len(microbatches.tokens)), microbatches


def _by_stage(config: Config, mesh: Mesh, params: Params) -> Params:
    return params | {"layers": pipeline.by_stage(params["layers"], mesh.shape["pipe"], config.mesh.interleave)}


def _gathered(config: Config, params: Params, specs: Any) -> tuple[Params, Params]:
    """What all stages share and this stage's layers [v, L/(vP), ...], whole, ready to compute with."""
    params = meshes.gather_params(in_compute_dtype(config.model, params), specs)
    return params, jax.tree.map(lambda x: jnp.squeeze(x, 1), params.pop("layers"))


Leave = Callable[[Params, jax.Array, Batch], tuple[jax.Array, Sums]]


def _parts(config: Config, mesh: Mesh, leave: Leave) -> pipeline.Parts:
    """The student cut in three."""
    bound = functools.partial(bind, config.model, shards=meshes.shards(mesh))

    def enter(shared: Params, batch: Batch) -> jax.Array:
        return bound(shared).enter(batch.tokens, batch.positions)

    def run(layers: Params, x: jax.Array, batch: Batch) -> jax.Array:
        return bound({"layers": layers}).through(x, batch.positions, batch.segment_ids)

    return pipeline.Parts(enter, run, leave)


def _objective(config: Config, mesh: Mesh, shared: Params, y: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
    """A microbatch's share of what is minimised, before the one division by the summed count of "loss"."""
    weights = config.loss.kd_loss_weight, config.loss.sft_loss_weight
    sums = _loss_sums(config, mesh, shared, y, batch, weights)
    metrics = _by_token(config, sums, batch)
    if config.loss.reduction == "nemo":  # every microbatch counts as one, however many tokens it holds
        for name in ("loss", "kd_loss", "sft_loss"):
            metrics[name] = SumCount(metrics[name].sum / jnp.maximum(sums.tokens, 1), jnp.ones(()))
    return metrics["loss"].sum, metrics


def _loss_sums(
    config: Config, mesh: Mesh, shared: Params, y: jax.Array, batch: Batch, weights: tuple[float, float]
) -> LossSums:
    """Of the residual stream after the last layer."""
    loss, shards = config.loss, meshes.shards(mesh)
    model = bind(config.model, shared, shards)
    # Validation measures what K rows cannot tell; the choice for it is open then.
    implementation = None if loss.implementation == "gathered" and weights[1] != 0 else loss.implementation
    hidden_BxTxD = model.final_norm(y)
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
        axis_name=meshes.VOCABULARY_AXES if shards.vocabulary > 1 else None,
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
