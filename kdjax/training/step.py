"""The train and eval steps: pure functions of a state and a global batch, jitted once each.

On each device a step gathers the parameters it holds shards of, runs its microbatches (one after the other, or several
at once through the stages of a pipeline), and adds up gradients and sums. Then come one sum over the devices, which
leaves each with its shard of the gradients, one division by the token count, and one update of that shard.

With a teacher on the mesh (`layout.teacher`), its forward pass over all microbatches comes first, and the student's
head gets its hidden states of the microbatch. Both steps then take its parameters as a last argument.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from kdjax.model import Params, bind, in_compute_dtype
from kdjax.parallel import pipeline
from kdjax.parallel.collectives import after, per_device, sum_over_batch_axes
from kdjax.parallel.mesh import REPLICATED, ROWS
from kdjax.parallel.sharding import gather_params, sum_to_shards
from kdjax.training.head import Head, Sums
from kdjax.training.layout import Layout
from kdjax.training.optim import learning_rate, optimizer
from kdjax.training.state import TrainState
from kdjax.types import Batch, SumCount

Metrics = dict[str, jax.Array]


def make_train_step(layout: Layout) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted update. Its metrics are device scalars; losses are means in nats per token.

    A step whose gradient is not finite, or whose batch holds no unmasked token, changes only the step number and
    reports `skipped` = 1. The state is donated.
    """
    config = layout.config
    tx, rate = optimizer(config.optim), learning_rate(config.optim, config.train.steps)
    gradient = _make_gradient(layout)

    def train_step(state: TrainState, batch: Batch, teacher: Params | None = None) -> tuple[TrainState, Metrics]:
        grads, sums = gradient(state.params, batch, teacher)
        grads = jax.tree.map(lambda g: SumCount(g, sums["loss"].count).mean, grads)
        grad_norm, lr = optax.tree.norm(grads), rate(state.step)
        # Each device updates the part that it keeps optimiser state of; the result is gathered to the params' shards.
        old = jax.lax.with_sharding_constraint(state.params, layout.update)
        directions, opt_state = tx.update(grads, state.opt_state, old)
        params = jax.tree.map(lambda p, d: p - (lr * d).astype(p.dtype), old, directions)
        tokens = sums["teacher_entropy"].count
        sound = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss"].sum) & (tokens > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (params, opt_state), (old, state.opt_state)
        )
        metrics = {name: pair.mean for name, pair in sums.items()}
        metrics |= {"grad_norm": grad_norm, "lr": lr, "tokens": tokens, "skipped": 1 - sound.astype(jnp.int32)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(layout.state, layout.replicated))


def make_eval_step(layout: Layout) -> Callable[..., Sums]:
    """Returns the jitted evaluation of one global batch: a sum and a count for each metric, to add up over batches."""
    specs = layout.stage_param_specs

    def evaluate(params: Params, rows: Batch, teacher: Params | None) -> Sums:
        params, head, schedule, microbatches = _lessons(layout, params, rows, teacher)
        parts = parts_of(layout, head.evaluate)
        _, sums = pipeline.losses(parts, schedule, *gathered(layout, params, specs), microbatches)
        return sum_over_batch_axes(sums)

    local = per_device(evaluate, layout.mesh, (specs, ROWS, _teacher_specs(layout)), REPLICATED)

    def of_stacked(params: Params, batch: Batch, teacher: Params | None = None) -> Sums:
        return local(layout.by_stage(params), batch, _teacher_by_stage(layout, teacher))

    return jax.jit(of_stacked)


def _make_gradient(layout: Layout) -> Callable[[Params, Batch, Params | None], tuple[Params, Sums]]:
    """Returns the function (parameters, global batch, teacher's parameters) -> gradient of the summed loss, sums."""
    specs, grad_specs = layout.stage_param_specs, layout.stage_state_specs
    differentiate = {"1f1b": pipeline.gradients, "gpipe": pipeline.gpipe_gradients}[layout.config.mesh.schedule]

    def gradient(params: Params, rows: Batch, teacher: Params | None) -> tuple[Params, Sums]:
        params, head, schedule, microbatches = _lessons(layout, params, rows, teacher)
        parts = parts_of(layout, head.train)
        grads, chunk_grads, sums = differentiate(parts, schedule, *gathered(layout, params, specs), microbatches)
        grads["layers"] = jax.tree.map(lambda g: jnp.expand_dims(g, 1), chunk_grads)
        return sum_to_shards(grads, grad_specs), sum_over_batch_axes(sums)

    local = per_device(gradient, layout.mesh, (specs, ROWS, _teacher_specs(layout)), (grad_specs, REPLICATED))

    def of_stacked(params: Params, batch: Batch, teacher: Params | None) -> tuple[Params, Sums]:
        grads, sums = local(layout.by_stage(params), batch, _teacher_by_stage(layout, teacher))
        return grads | {"layers": pipeline.stacked(grads["layers"])}, sums

    return of_stacked


def _teacher_specs(layout: Layout) -> Any:
    return REPLICATED if layout.teacher is None else layout.teacher.stage_param_specs


def _teacher_by_stage(layout: Layout, teacher: Params | None) -> Params | None:
    if layout.teacher is None:
        return None
    assert teacher is not None, "this step takes the teacher's parameters as its last argument"
    return layout.teacher.by_stage(teacher)


def _lessons(
    layout: Layout, params: Params, rows: Batch, teacher: Params | None
) -> tuple[Params, Head, pipeline.Schedule, Batch]:
    """Returns parameters, head, schedule and microbatches, with what a teacher on the mesh says of each microbatch.

    The student's parameters wait for the teacher to finish, so that those of both are never gathered at the same time.
    """
    schedule, microbatches = layout.microbatches(rows)
    if layout.teacher is None or teacher is None:
        return params, Head(layout), schedule, microbatches
    hidden_MxBxTxE, unembed_WxE = _teacher_states(layout.teacher, teacher, rows)
    params, hidden_MxBxTxE = jax.lax.optimization_barrier((params, hidden_MxBxTxE))
    tokens = after(hidden_MxBxTxE, microbatches.tokens)
    taught = dataclasses.replace(microbatches, tokens=tokens, teacher_hidden=hidden_MxBxTxE)
    return params, Head(layout, unembed_WxE), schedule, taught


def _teacher_states(layout: Layout, params: Params, rows: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns a teacher's hidden states after its final norm, on all stages, and this device's rows of its unembedding.

    `layout` is the teacher's.
    """
    shared, layers = gathered(layout, params, layout.stage_param_specs)
    model = bind(layout.config.model, shared, layout.shards)
    parts = parts_of(layout, lambda shared, y, batch: (model.final_norm(y), None))
    schedule, microbatches = layout.microbatches(rows)
    return pipeline.outputs(parts, schedule, shared, layers, microbatches), model.unembedding()


def gathered(layout: Layout, params: Params, specs: dict[str, PartitionSpec]) -> tuple[Params, Params]:
    """Returns what all stages share and this stage's layers [v, L/(vP), ...], gathered, in the dtype of the compute."""
    params = gather_params(in_compute_dtype(layout.config.model, params), specs)
    return params, jax.tree.map(lambda x: jnp.squeeze(x, 1), params.pop("layers"))


def parts_of(layout: Layout, leave: Callable[[Params, jax.Array, Any], tuple[Any, Any]]) -> pipeline.Parts:
    """Returns the model cut in three for the pipeline: embedding, layers, and `leave`, the head."""
    model, shards = layout.config.model, layout.shards

    def enter(shared: Params, batch: Any) -> jax.Array:
        return bind(model, shared, shards).enter(batch.tokens, batch.positions)

    def run(layers: Params, x: jax.Array, batch: Any) -> jax.Array:
        return bind(model, {"layers": layers}, shards).through(x, batch.positions, batch.segment_ids)

    return pipeline.Parts(enter, run, leave)
