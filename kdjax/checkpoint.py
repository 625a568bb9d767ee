"""Orbax checkpoints: a training run's steps, and models on their own.

A model is a directory with `model_config.json` (the architecture) and `params/` (Orbax, canonical layout: a nested
dict whose "layers" leaves have a leading axis L). A run's step holds `params`, `opt_state` and `meta` apart, so that
a model can be read without the optimiser.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from kdjax import metrics
from kdjax.config import Config, ModelConfig, build, from_json
from kdjax.model import GPT, Params, bind, param_shapes
from kdjax.step import TrainState
from kdjax.types import UserError

log = logging.getLogger("kdjax")

MODEL_CONFIG = "model_config.json"
# Arithmetic, not architecture: the user's choice also when a checkpoint rules the rest.
FREE_KEYS = ("init_from", "dtype", "param_dtype", "remat", "attention", "init_std", "scaled_init")


class RunCheckpoints:
    """RUN/checkpoints: asynchronous saves; the newest and the best are kept."""

    def __init__(self, workdir: Path, config: Config):
        best, policies = config.checkpoint.best_metric, [keep.LatestN(config.checkpoint.keep_last)]
        judges = config.checkpoint.keep_best > 0 and bool(config.data.val)
        if judges:
            lowest = keep.BestN(
                get_metric_fn=lambda judged: judged[best],
                reverse=True,
                n=config.checkpoint.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(lowest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=(lambda judged: judged[best]) if judges else None,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._directory = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, state: TrainState, meta: Mapping[str, Any], judged: Mapping[str, float] | None) -> None:
        """Starts saving, with the validation's means if there are any; the state may be donated at once."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        self._manager.save(int(state.step), args=items, metrics=None if judged is None else dict(judged), force=True)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest step that can be read, in `like`'s shapes and shardings, with its meta; None if there is none.

        A step that cannot be read is named loudly and the one before it is tried; nothing is deleted.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            items = ocp.args.Composite(
                params=ocp.args.StandardRestore(shapes.params),
                opt_state=ocp.args.StandardRestore(shapes.opt_state),
                meta=ocp.args.JsonRestore(),
            )
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:  # Orbax raises many kinds for a damaged step
                log.warning(
                    "CHECKPOINT %s CANNOT BE READ, trying the one before: %s",
                    self._directory / str(step),
                    error,
                )
                continue
            number = jax.device_put(like.step * 0 + step, like.step.sharding)
            return dataclasses.replace(like, step=number, params=found.params, opt_state=found.opt_state), found.meta
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._directory} can be read; move it away to start afresh"
            )
        return None

    def wait(self) -> None:
        """Until the last save is complete. Raises what it failed of."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def save_model(path: Path | str, config: ModelConfig, params: Params) -> None:
    """Writes a model directory that `load_model` and `model.init_from` read."""
    path = Path(path).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params, force=True)
    architecture = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_KEYS}
    (path / MODEL_CONFIG).write_text(json.dumps(architecture, indent=2) + "\n")


def load_model(path: Path | str, *, dtype: str = "float32") -> GPT:
    """The model of a converted checkpoint, of a run directory (its best step, else its last), or of one step of it.

    `dtype` is the dtype of the computation. Raises UserError when the path holds no model.
    """
    config = dataclasses.replace(read_model_config(path), dtype=dtype)
    return bind(config, load_params(path, config))


def load_params(path: Path | str, config: ModelConfig, sharding: jax.sharding.Sharding | None = None) -> Params:
    """A model's parameters in `config.param_dtype`, restored directly into `sharding` (default: the first device)."""
    source = _params_directory(Path(path))
    where = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), param_shapes(config))
    with ocp.StandardCheckpointer() as checkpointer:
        _compare_shapes(
            source, _shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(source)).tree), _shapes(like)
        )
        return checkpointer.restore(source, like)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def _compare_shapes(source: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    lines = [
        f"  {name}: {stored.get(name, 'nothing')} stored, {wanted.get(name, 'nothing')} wanted"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if lines:
        raise UserError(f"the parameters in {source} do not fit the architecture beside them:\n" + "\n".join(lines))


def read_model_config(path: Path | str) -> ModelConfig:
    """The architecture of a model directory or run."""
    path = Path(path)
    if (path / MODEL_CONFIG).exists():
        return build({"model": json.loads((path / MODEL_CONFIG).read_text())}).model
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if (run / "config.json").exists():
        return from_json((run / "config.json").read_text()).model
    raise UserError(
        f"model.init_from = {str(path)!r} holds neither {MODEL_CONFIG} nor a run's config.json; "
        "give a converted checkpoint or a run directory"
    )


def adopt_architecture(config: Config) -> Config:
    """The configuration with `model.init_from`'s architecture in place of its own."""
    if config.model.init_from is None:
        return config
    found = read_model_config(config.model.init_from)
    free = {key: getattr(config.model, key) for key in FREE_KEYS}
    return dataclasses.replace(config, model=dataclasses.replace(found, **free))


def _params_directory(path: Path) -> Path:
    path = path.absolute()
    if (path / MODEL_CONFIG).exists() or path.parent.name == "checkpoints":
        return path / "params"
    kept = ocp.utils.checkpoint_steps(epath.Path(path / "checkpoints")) if (path / "checkpoints").exists() else []
    best_metric = from_json((path / "config.json").read_text()).checkpoint.best_metric
    judged = {line["step"]: line[best_metric] for line in metrics.read(path, "val") if line["step"] in kept}
    step = min(judged, key=lambda step: judged[step]) if judged else max(kept, default=None)
    if step is None:
        raise UserError(f"{path / 'checkpoints'} holds no complete checkpoint yet")
    return path / "checkpoints" / str(step) / "params"
