"""What training carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from kdjax.config import Config
from kdjax.model import Params, init_params
from kdjax.training.optim import optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint needs besides the configuration."""

    step: jax.Array  # int32 scalar: updates made or skipped so far, which is also the position in the data
    params: Params
    opt_state: optax.OptState


def first_state(config: Config, key: jax.Array, params: Params | None = None) -> TrainState:
    """Returns the state before the first step, from `params` or from parameters drawn with `key`."""
    params = init_params(config.model, key) if params is None else params
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config.optim).init(params))
