"""Train and eval steps that are compiled once for all tests of a process that need the same program."""

import dataclasses
import functools
from typing import Any

from kdjax.training.layout import Layout
from kdjax.training.step import make_eval_step, make_train_step


def _without_paths(layout: Layout) -> Layout:
    """Returns the layout without what differs from test to test and does not matter to a step."""
    data = dataclasses.replace(layout.config.data, train=(), val=(), scratch_dir=None)
    return dataclasses.replace(layout, config=dataclasses.replace(layout.config, data=data))


_train_step, _eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)


def train_step(layout: Layout) -> Any:
    """Returns `make_train_step(layout)`."""
    return _train_step(_without_paths(layout))


def eval_step(layout: Layout) -> Any:
    """Returns `make_eval_step(layout)`."""
    return _eval_step(_without_paths(layout))
