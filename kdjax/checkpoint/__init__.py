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

__all__ = [
    "RunCheckpoints",
    "adopt_architecture",
    "load_model",
    "load_params",
    "params_directory",
    "read_model_config",
    "run_config",
    "save_model",
]
