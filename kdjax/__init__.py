"""Knowledge distillation of GPT students from cached top-k teacher logits, on JAX.

The public names are imported when first used, so that `import kdjax` and `kdjax --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax.checkpoint import load_model, save_model
    from kdjax.config import Config, ModelConfig
    from kdjax.losses import LossSums, linear_topk_kd_loss, topk_kd_loss
    from kdjax.model import GPT, init_params
    from kdjax.types import UserError

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "Config",
    "LossSums",
    "ModelConfig",
    "UserError",
    "init_params",
    "linear_topk_kd_loss",
    "load_model",
    "save_model",
    "topk_kd_loss",
]

_MODULES = {
    "GPT": "kdjax.model",
    "Config": "kdjax.config",
    "LossSums": "kdjax.losses",
    "ModelConfig": "kdjax.config",
    "UserError": "kdjax.types",
    "init_params": "kdjax.model",
    "linear_topk_kd_loss": "kdjax.losses",
    "load_model": "kdjax.checkpoint",
    "save_model": "kdjax.checkpoint",
    "topk_kd_loss": "kdjax.losses",
}


if not TYPE_CHECKING:  # type checkers must not take every name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
