"""The configuration: its knobs, how it is read, and what is refused."""

from kdjax.config.build import build, from_json
from kdjax.config.schema import (
    KNOBS,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ResumeConfig,
    TeacherConfig,
    TrainConfig,
    differences,
    flatten,
    replace,
    to_json,
)

__all__ = [
    "KNOBS",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "ResumeConfig",
    "TeacherConfig",
    "TrainConfig",
    "build",
    "differences",
    "flatten",
    "from_json",
    "replace",
    "to_json",
]
