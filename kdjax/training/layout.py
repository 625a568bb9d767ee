"""How a run lies on its mesh: every partition spec, every sharding and the pipeline's schedule, computed once."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from kdjax.config import Config
from kdjax.model import Params, param_axes, param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.parallel import pipeline, sharding
from kdjax.parallel.axes import BATCH_AXES, FSDP, PIPE, STATE_AXES
from kdjax.training.optim import optimizer
from kdjax.training.state import TrainState, first_state
from kdjax.types import Batch

Rows = TypeVar("Rows")  # a batch, or another tree of arrays with one row for each of its rows


def pipeline_schedule(config: Config, mesh_shape: Mapping[str, int]) -> pipeline.Schedule:
    """Returns the schedule of a step on a mesh of this shape; with one stage, microbatches run one after the other."""
    replicas = math.prod(mesh_shape[axis] for axis in BATCH_AXES)
    microbatches = config.batch.global_size // (replicas * config.batch.microbatch_size)
    return pipeline.Schedule(mesh_shape[PIPE], config.mesh.interleave, microbatches)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A resolved configuration on a mesh. "Stage" specs are those of parameters viewed by pipeline stage."""

    config: Config
    mesh: Mesh
    teacher: "Layout | None" = None  # of `teacher.checkpoint`: its model with the run's rows, on the same mesh

    @property
    def shards(self) -> meshes.Shards:
        """How many devices split each layer and the vocabulary."""
        return meshes.shards(self.mesh)

    @functools.cached_property
    def param_specs(self) -> Params:
        """Partition specs of the parameters."""
        return self._specs(FSDP)

    @functools.cached_property
    def state_specs(self) -> Params:
        """Partition specs of the gradients and of the optimiser's state."""
        return self._specs(*STATE_AXES)

    @functools.cached_property
    def gathered_specs(self) -> Params:
        """Partition specs of the parameters as a step computes with them, gathered over `mesh.fsdp`."""
        return self._specs()

    def _specs(self, *over: str) -> Params:
        model = self.config.model
        return sharding.param_specs(self.mesh, param_shapes(model), param_axes(model), over)

    @functools.cached_property
    def stage_param_specs(self) -> Params:
        """`param_specs` by stage."""
        return sharding.stage_specs(self.param_specs)

    @functools.cached_property
    def stage_state_specs(self) -> Params:
        """`state_specs` by stage."""
        return sharding.stage_specs(self.state_specs)

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds in full."""
        return meshes.replicated(self.mesh)

    @functools.cached_property
    def params(self) -> Params:
        """Shardings of the parameters."""
        return sharding.shardings(self.mesh, self.param_specs)

    @functools.cached_property
    def update(self) -> Params:
        """Shardings of the gradients, and of the parameters while they are updated."""
        return sharding.shardings(self.mesh, self.state_specs)

    @functools.cached_property
    def state(self) -> TrainState:
        """A `TrainState` of shardings."""
        tx = optimizer(self.config.optim)
        opt_state = optax.tree.map_params(
            tx,
            lambda _, sharding: sharding,
            jax.eval_shape(tx.init, param_shapes(self.config.model)),
            self.update,
            transform_non_params=lambda _: self.replicated,
        )
        return TrainState(cast(Any, self.replicated), self.params, opt_state)

    def init_state(self, params: Params | None = None) -> TrainState:
        """Returns a fresh state on the mesh, from `params` or drawn from `train.seed`."""
        make = jax.jit(functools.partial(first_state, self.config), out_shardings=self.state)
        return make(jax.random.key(self.config.train.seed), params)

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes, dtypes and shardings, to compile or restore with."""
        shapes = jax.eval_shape(functools.partial(first_state, self.config), jax.random.key(0))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, self.state
        )

    def abstract_params(self) -> Params:
        """Returns the shapes, dtypes and shardings of the parameters alone."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            param_shapes(self.config.model),
            self.params,
        )

    def abstract_batch(self, top_k: int) -> Batch:
        """Returns a global batch's shapes, dtypes and shardings, to compile with.

        With a teacher on the mesh there are no entries, whatever `top_k`.
        """
        data, rows = self.config.data, NamedSharding(self.mesh, meshes.ROWS)
        top_k = top_k if self.teacher is None else 0

        def shape(dtype: Any, *rest: int) -> Any:
            size = (self.config.batch.global_size, data.sequence_length, *rest)
            return jax.ShapeDtypeStruct(size, dtype, sharding=rows)

        return Batch(
            tokens=shape(jnp.int32),
            labels=shape(jnp.int32),
            loss_mask=shape(jnp.float32),
            topk_logits=shape(jnp.float32, top_k),
            topk_token_ids=shape(jnp.int32, top_k),
            log_sum_exp_logits=shape(jnp.float32) if self.teacher is None else None,
            positions=shape(jnp.int32) if data.pack else None,
            segment_ids=shape(jnp.int32) if data.pack else None,
            topk_weights=shape(jnp.float32, top_k) if self.config.loss.targets == "sampled" else None,
        )

    def by_stage(self, params: Params) -> Params:
        """Views the stacked layers [L, ...] by pipeline stage, [v, P, L/(vP), ...]."""
        layers = pipeline.by_stage(params["layers"], self.mesh.shape[PIPE], self.config.mesh.interleave)
        return params | {"layers": layers}

    def microbatches(self, rows: Rows) -> tuple[pipeline.Schedule, Rows]:
        """Splits one device's rows [B, ...] into microbatches [M, B/M, ...]; returns their schedule too."""
        size = self.config.batch.microbatch_size
        split = jax.tree.map(lambda x: x.reshape(len(x) // size, size, *x.shape[1:]), rows)
        schedule = pipeline.Schedule(self.mesh.shape[PIPE], self.config.mesh.interleave, len(jax.tree.leaves(split)[0]))
        return schedule, split
