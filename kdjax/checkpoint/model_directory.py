"""Model directories: `model_config.json` (the architecture) and `params/` (Orbax).

`params` has the canonical layout, a nested dict whose "layers" leaves have a leading axis L. A run directory and
each of its steps can be read as a model too.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kdjax.checkpoint.arrays import StoredArray, open_arrays
from kdjax.config import Config, ModelConfig, build, from_json
from kdjax.model import GPT, Params, bind, named_shapes, param_name, param_shapes
from kdjax.training import metrics
from kdjax.types import UserError

MODEL_CONFIG = "model_config.json"
# Arithmetic and initialisation, not architecture: the configuration decides these even with model.init_from.
FREE_KEYS = ("init_from", "keep_layers", "dtype", "param_dtype", "remat", "attention", "init_std", "scaled_init")


def save_model(path: Path | str, config: ModelConfig, params: Params) -> None:
    """Writes a model directory, which `load_model` and `model.init_from` read."""
    path = Path(path).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params, save_args=save_in_layers(params), force=True)
    write_model_config(path, config)


def write_model_config(directory: Path, config: ModelConfig) -> None:
    """Writes model_config.json: the architecture, without the user's choices in `FREE_KEYS`."""
    architecture = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_KEYS}
    (directory / MODEL_CONFIG).write_text(json.dumps(architecture, indent=2) + "\n")


def save_in_layers(params: Params) -> Any:
    """Returns Orbax's save arguments that store stacked arrays layer by layer, so that each layer can be read alone."""

    def save_args(path: Any, _: jax.Array) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if param_name(path).startswith("layers/") else ())

    return jax.tree_util.tree_map_with_path(save_args, params)


def load_model(path: Path | str, *, dtype: str = "float32") -> GPT:
    """Loads the model of a converted checkpoint, of a run directory (its best step, else its last) or of one step.

    `dtype` is the dtype of the computation. Raises UserError when the path holds no model.
    """
    config = dataclasses.replace(read_model_config(path), dtype=dtype)
    return bind(config, load_params(path, config))


def load_params(
    path: Path | str, config: ModelConfig, sharding: Any = None, keep_layers: Sequence[int] | None = None
) -> Params:
    """Restores a model's parameters in `config.param_dtype`, each process only the shards of its own devices.

    Args:
        sharding: one for all parameters, or a tree (or tree prefix) of them; default: the first device.
        keep_layers: the layers to read, in this order; `config.layers` is their number.

    Cuts off rows of vocabulary padding, or adds rows of zeros, to reach `config.padded_vocab_size`.
    """
    source = params_directory(path)
    stored, shapes = open_arrays(source), param_shapes(config)
    _compare_shapes(source, stored, config, keep_layers)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.broadcast(default if sharding is None else sharding, shapes)
    whole = shapes if keep_layers is None else {name: leaf for name, leaf in shapes.items() if name != "layers"}
    params = _restore(source, whole, {name: shardings[name] for name in whole})
    if keep_layers is not None:
        pick = functools.partial(_pick_layers, stored, keep_layers)
        params["layers"] = jax.tree_util.tree_map_with_path(pick, shapes["layers"], shardings["layers"])
    return params


def _restore(source: Path, shapes: Params, shardings: Params) -> Params:
    """Restores the arrays of these names from an Orbax directory; rows that are not stored become zero."""
    arguments = jax.tree.map(
        lambda leaf, sharding: ocp.ArrayRestoreArgs(
            dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape, strict=False
        ),
        shapes,
        shardings,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        wanted = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True)
        try:
            return checkpointer.restore(source, args=wanted)
        except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
            raise UserError(f"the parameters in {source} are damaged or incomplete: {error}") from error


def _pick_layers(
    stored: Mapping[str, StoredArray],
    keep_layers: Sequence[int],
    path: Any,
    like: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Reads some layers of a stacked array, which Orbax would only restore as a whole."""
    array = stored[f"layers/{param_name(path)}"]
    pieces: dict[str, np.ndarray] = {}  # devices that hold the same shard share one read

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        key = str(index)
        if key not in pieces:
            pieces[key] = array.read(index or (), keep_layers).astype(like.dtype)
        return pieces[key]

    return jax.make_array_from_callback(like.shape, sharding, piece)


VOCABULARY_LEAVES = ("embed", "unembed")  # their first axis holds the vocabulary with its padding


def _compare_shapes(
    source: Path, stored: Mapping[str, StoredArray], config: ModelConfig, keep_layers: Sequence[int] | None
) -> None:
    wanted = named_shapes(config)
    lines = []
    for name in sorted(stored.keys() | wanted.keys()):
        found, fits = stored[name].shape if name in stored else None, wanted.get(name)
        if found is not None and fits is not None:
            if name in VOCABULARY_LEAVES and found[0] >= config.vocab_size:
                found = fits[:1] + found[1:]
            if name.startswith("layers/") and keep_layers is not None and max(keep_layers) < found[0]:
                found = (len(keep_layers), *found[1:])
        if found != fits:
            told = stored[name].shape if name in stored else "nothing"
            lines.append(f"  {name}: {told} stored, {fits or 'nothing'} wanted")
    if lines:
        raise UserError(f"the parameters in {source} do not fit the architecture beside them:\n" + "\n".join(lines))


def read_model_config(path: Path | str, key: str = "model.init_from") -> ModelConfig:
    """Returns the architecture of a model directory or run, without `init_from` and `keep_layers`.

    `key` names the knob that holds the path, for messages.
    """
    path = Path(path)
    if (path / MODEL_CONFIG).exists():
        return build({"model": json.loads((path / MODEL_CONFIG).read_text())}).model
    if (path / "config.json").exists() and "architectures" in json.loads((path / "config.json").read_text()):
        raise UserError(
            f"{path} is a Hugging Face checkpoint; convert it first: python -m kdjax.convert from-hf {path} OUT"
        )
    run = run_config(path)
    if run is not None:
        return dataclasses.replace(run.model, init_from=None, keep_layers=None)
    raise UserError(
        f"{key} = {str(path)!r} holds neither {MODEL_CONFIG} nor a run's config.json; "
        "give a converted checkpoint or a run directory"
    )


def run_config(path: Path | str) -> Config | None:
    """Returns the configuration of a run directory or of the run that a step belongs to; None for other paths."""
    path = Path(path).absolute()
    file = (path.parent.parent if path.parent.name == "checkpoints" else path) / "config.json"
    return from_json(file.read_text()) if file.exists() else None


def adopt_architecture(config: Config) -> Config:
    """Returns the configuration with the architecture of `model.init_from` in place of its own.

    `model.keep_layers` sets the number of layers, and `model.padded_vocab_size` may set another padding.
    """
    model = config.model
    if model.init_from is None:
        return config
    found = read_model_config(model.init_from)
    changes = {key: getattr(model, key) for key in FREE_KEYS}
    if model.keep_layers is not None:
        changes["layers"] = _count(model.keep_layers, found.layers)
    stored_rows = found.vocab_rows
    if model.padded_vocab_size is not None:
        changes["padded_vocab_size"] = model.padded_vocab_size
        if config.loss.include_vocab_padding and model.padded_vocab_size != stored_rows:
            raise UserError(
                f"model.padded_vocab_size = {model.padded_vocab_size}: loss.include_vocab_padding lets the padded rows "
                f"into the softmax, and {model.init_from} has {stored_rows} rows; leave one of the two unset"
            )
    return dataclasses.replace(config, model=dataclasses.replace(found, **changes))


def _count(keep_layers: Sequence[int], layers: int) -> int:
    """Returns the number of layers kept. Raises UserError unless they all exist and differ from each other."""
    absent = [layer for layer in keep_layers if not 0 <= layer < layers]
    twice = sorted({layer for layer in keep_layers if keep_layers.count(layer) > 1})
    if absent or twice or not keep_layers:
        reason = (
            f"there is no layer {absent[0]}" if absent else f"layer {twice[0]} is repeated" if twice else "it is empty"
        )
        raise UserError(
            f"model.keep_layers = {tuple(keep_layers)}: {reason}; model.init_from has {layers} layers, so give "
            f"different numbers from 0 to {layers - 1}"
        )
    return len(keep_layers)


def params_directory(path: Path | str) -> Path:
    """Returns the directory of the parameters of a model, of a run (its best step, else its last) or of a step."""
    path = Path(path).absolute()
    if (path / MODEL_CONFIG).exists() or path.parent.name == "checkpoints":
        return path / "params"
    kept = ocp.utils.checkpoint_steps(epath.Path(path / "checkpoints")) if (path / "checkpoints").exists() else []
    best_metric = from_json((path / "config.json").read_text()).checkpoint.best_metric
    lines = (line for line in metrics.read(path, "val") if line["step"] in kept)
    measured = {line["step"]: metrics.as_rank(line[best_metric]) for line in lines}
    step = min(measured, key=lambda step: measured[step]) if measured else max(kept, default=None)
    if step is None:
        raise UserError(f"{path / 'checkpoints'} holds no complete checkpoint yet")
    return path / "checkpoints" / str(step) / "params"
