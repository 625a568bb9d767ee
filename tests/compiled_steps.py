"""Programs that are compiled once for all tests of a process that need the same: first state, train and eval step."""

import dataclasses
import functools
from typing import Any

import jax

from kdjax.model import Params
from kdjax.training.layout import Layout
from kdjax.training.state import TrainState, first_state
from kdjax.training.step import make_eval_step, make_train_step


def _without_paths(layout: Layout) -> Layout:
    """Returns the layout without what differs from test to test and does not matter to a program."""
    data = dataclasses.replace(layout.config.data, train=(), val=(), scratch_dir=None)
    model = dataclasses.replace(layout.config.model, init_from=None)
    return Layout(dataclasses.replace(layout.config, data=data, model=model), layout.mesh)


_train_step, _eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)


@functools.cache
def _first_state(layout: Layout) -> Any:
    return jax.jit(functools.partial(first_state, layout.config), out_shardings=layout.state)


def train_step(layout: Layout) -> Any:
    """Returns `make_train_step(layout)`."""
    return _train_step(_without_paths(layout))


def eval_step(layout: Layout) -> Any:
    """Returns `make_eval_step(layout)`."""
    return _eval_step(_without_paths(layout))


def init_state(layout: Layout, params: Params | None = None) -> TrainState:
    """Returns `layout.init_state(params)`."""
    seed = layout.config.train.seed
    return _first_state(_without_paths(layout))(jax.random.key(seed), params)
