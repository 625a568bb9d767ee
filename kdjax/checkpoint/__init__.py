"""Checkpoints: a run's steps, and models on their own."""

from kdjax.checkpoint.model_directory import (
    adopt_architecture,
    load_model,
    load_params,
    params_directory,
    read_model_config,
    run_config,
    save_model,
)
from kdjax.checkpoint.run import RunCheckpoints
from kdjax.checkpoint.teacher import lay_out, load_teacher, read_teacher

__all__ = [
    "RunCheckpoints",
    "adopt_architecture",
    "lay_out",
    "load_model",
    "load_params",
    "load_teacher",
    "params_directory",
    "read_model_config",
    "read_teacher",
    "run_config",
    "save_model",
]
