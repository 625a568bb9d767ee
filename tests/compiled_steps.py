"""Programs that are compiled once for all tests of a process that need the same: first state, train and eval step."""

import dataclasses
import functools
from typing import Any

import jax

from kdjax import config as configs
from kdjax.model import Params
from kdjax.training.layout import Layout
from kdjax.training.state import TrainState, first_state
from kdjax.training.step import make_eval_step, make_train_step


def _without(layout: Layout, **changes: Any) -> Layout:
    """Returns the layout without what differs from test to test and does not matter to a program."""
    config = layout.config
    data = configs.DataConfig(sequence_length=config.data.sequence_length, pack=config.data.pack)
    changes = {
        "data": data,
        "model": dataclasses.replace(config.model, init_from=None),
        "train": configs.TrainConfig(steps=config.train.steps),
        "checkpoint": configs.CheckpointConfig(),
        "resume": configs.ResumeConfig(),
    } | changes
    return dataclasses.replace(layout, config=dataclasses.replace(config, **changes))


_train_step, _eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)


@functools.cache
def _first_state(layout: Layout) -> Any:
    return jax.jit(functools.partial(first_state, layout.config), out_shardings=layout.state)


def train_step(layout: Layout) -> Any:
    """Returns `make_train_step(layout)`."""
    return _train_step(_without(layout))


def eval_step(layout: Layout) -> Any:
    """Returns `make_eval_step(layout)`."""
    return _eval_step(_without(layout, optim=configs.OptimConfig(), train=configs.TrainConfig()))


def init_state(layout: Layout, params: Params | None = None) -> TrainState:
    """Returns `layout.init_state(params)`."""
    seed = layout.config.train.seed
    return _first_state(_without(layout))(jax.random.key(seed), params)


def optimised_train_step(layout: Layout, top_k: int) -> Any:
    """Returns `make_train_step(layout)`, compiled with the optimisations of LLVM that `conftest.py` turns off."""
    step: Any = make_train_step(layout)

    @functools.cache
    def compiled() -> Any:
        arguments = layout.abstract_state(), layout.abstract_batch(top_k)
        return step.lower(*arguments).compile({"xla_backend_optimization_level": 1})

    return lambda state, batch: compiled()(state, batch)
