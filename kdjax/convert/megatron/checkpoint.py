"""Opens a Megatron or NeMo checkpoint: finds its format and iteration, and reads what it states of its architecture."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated
from kdjax.convert.checkpoint_files import ByteRange, Files, list_files, subdirectory
from kdjax.convert.megatron import args_reader, dcp_reader
from kdjax.convert.megatron.rank_reader import RankFiles, open_rank_files
from kdjax.convert.megatron.rules import EMBEDDING
from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_reader import Inert
from kdjax.convert.tensors import LazyTensor
from kdjax.types import UserError

TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are unread. `read_tensors` needs the architecture to join the ranks' shards."""

    format: str
    iteration: int | str | None  # None: the format does not say
    stated: Mapping[str, Stated]  # of the architecture
    read_tensors: Callable[[ModelConfig], dict[str, LazyTensor]]


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the checkpoint in `path`: a directory with a tracker file, an iteration's directory, or a NeMo checkpoint.

    NeMo checkpoints are .nemo files or unpacked ones. Raises UserError when there is no checkpoint that can be read.
    """
    top = list_files(path)
    files = subdirectory(top, _iteration_directory(path, top))
    nemo = _read_yaml(files, "model_config.yaml")
    for directory in ("", "model_weights", "weights"):
        weights = subdirectory(files, directory)
        _refuse_other_backends(weights)
        if ".metadata" in weights:
            return _open_torch_dist(path, weights, nemo, files, top)
    ranks = open_rank_files(files) or open_rank_files(subdirectory(files, "model_weights"))
    if ranks is not None:
        return _open_ranks(path, ranks, nemo)
    raise UserError(
        f"{path}: no Megatron checkpoint was found in it; looked for .metadata (torch_dist), mp_rank_*/ and "
        f"tp_rank_*_pp_rank_*/ (torch), model_weights.ckpt and model_weights/ (NeMo), weights/ (NeMo 2), {TRACKER}"
    )


def _open_torch_dist(path: Path, weights: Files, nemo: Mapping[str, Any] | None, *around: Files) -> Checkpoint:
    """Opens a `torch_dist` checkpoint; `around` are the directories in which Bridge and NeMo 2 put configurations."""
    tensors = dcp_reader.read_tensors(weights)
    common = torch_file.load(weights["common.pt"]) if "common.pt" in weights else {}
    if not isinstance(common, dict):
        raise UserError(f"{weights['common.pt'].label}: holds a {type(common).__name__}, not a checkpoint's dict")
    stated = _read_architecture(path, _attributes(common.get("args")), f"{path} (common.pt)", nemo, *around)
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    return Checkpoint("torch_dist", common.get("iteration"), _with_rows(stated, rows), lambda config: dict(tensors))


def _open_ranks(path: Path, ranks: RankFiles, nemo: Mapping[str, Any] | None) -> Checkpoint:
    args = _attributes(ranks.content.get("args"))
    sizes = {
        "tensor_model_parallel_size": ranks.tensor_parallel,
        "pipeline_model_parallel_size": ranks.pipeline_parallel,
    }
    for key, found in sizes.items():
        if args is not None and args.get(key) not in (None, found):
            raise UserError(f"{path}: args.{key} is {args[key]}, but there are files of {found} such ranks")
    stated = _with_rows(_read_architecture(path, args, ranks.label, nemo), ranks.vocabulary_rows)
    return Checkpoint(ranks.format, ranks.content.get("iteration"), stated, ranks.read_tensors)


def _attributes(args: Any) -> dict[str, Any] | None:
    return args.attributes if isinstance(args, Inert) else args if isinstance(args, dict) else None


def _read_architecture(
    path: Path, args: dict[str, Any] | None, args_label: str, nemo: Mapping[str, Any] | None, *around: Files
) -> dict[str, Stated]:
    """Returns what args state, else NeMo's model_config.yaml, else the configurations of Bridge and NeMo 2."""
    if args is not None:
        return args_reader.from_args(args, args_label)
    if nemo is not None:
        return args_reader.from_nemo(nemo, f"{path} (model_config.yaml)")
    for files in around:
        bridge = _read_yaml(files, "run_config.yaml")
        if bridge is not None and isinstance(bridge.get("model"), Mapping):
            return args_reader.from_provider(bridge["model"], "run_config.yaml", f"{path} (run_config.yaml)")
        nemo2 = _read_yaml(files, "context/model.yaml")
        if nemo2 is not None:
            model = nemo2.get("config", nemo2)
            return args_reader.from_provider(model, "context/model.yaml", f"{path} (context/model.yaml)")
    return {}


def _with_rows(stated: Mapping[str, Stated], rows: int | None) -> dict[str, Stated]:
    """Adds the padded vocabulary if nothing states it: the embedding's rows."""
    by_rows = {} if rows is None else {"padded_vocab_size": Stated(rows, f"rows of {EMBEDDING}")}
    return by_rows | dict(stated)


def _iteration_directory(path: Path, files: Files) -> str:
    """Returns the latest iteration's directory, relative to `path`; "" if `path` is a checkpoint itself."""
    directories = sorted({name.split("/")[0] for name in files if re.match(r"(iter_\d+|release)/", name)})
    for tracker in (TRACKER, BRIDGE_TRACKER):
        if tracker in files:
            latest = _tracked_directory(files[tracker])
            if latest not in directories:
                others = f"there are {', '.join(directories)}" if directories else "there is no other"
                raise UserError(f"{files[tracker].label}: points to {latest}, which is missing; {others}")
            return latest
    if len(directories) > 1:
        raise UserError(f"{path}: holds {', '.join(directories)} and no {TRACKER}; name one of them")
    return directories[0] if directories else ""


def _tracked_directory(tracker: ByteRange) -> str:
    """Returns the directory that a tracker file points to."""
    if tracker.path.name == BRIDGE_TRACKER:
        step = torch_file.load(tracker).get("step")
        text = str(int(step.read()) if isinstance(step, LazyTensor) else step)
    else:
        text = tracker.read().decode(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise UserError(f"{tracker.label}: holds {text!r}; it must hold the number of an iteration, or 'release'")
    return text if text == "release" else f"iter_{int(text):07d}"


def _refuse_other_backends(files: Files) -> None:
    if "metadata.json" not in files:
        return
    try:
        backend = json.loads(files["metadata.json"].read())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{files['metadata.json'].label}: it names no sharded_backend ({error})") from error
    if backend != "torch_dist":
        raise UserError(
            f"{files['metadata.json'].label}: the tensors are stored as {backend!r}; only 'torch_dist' can be read. "
            "Load it in Megatron and save it with --ckpt-format torch_dist"
        )


def _read_yaml(files: Files, name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        found = yaml.safe_load(files[name].read())
    except yaml.YAMLError as error:
        raise UserError(f"{files[name].label} is not plain YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{files[name].label} must hold keys and values; it holds {found!r:.80}")
    return found
