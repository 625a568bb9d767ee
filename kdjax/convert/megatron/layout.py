"""What lies in a directory or .nemo file: which format, which iteration, what it says of its architecture."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated
from kdjax.convert.files import Files, Region, below, files_of
from kdjax.convert.megatron import dcp_reader, from_args, ranks
from kdjax.convert.pytorch import file as torch_file
from kdjax.convert.pytorch.unpickle import Inert
from kdjax.convert.tensors import StoredTensor
from kdjax.types import UserError

TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, its tensors unread. `read` needs the architecture to put ranks together."""

    where: str
    format: str
    iteration: int | str | None  # None: the format does not say
    stated: Mapping[str, Stated]
    read: Callable[[ModelConfig], dict[str, StoredTensor]]


def find(path: Path) -> Checkpoint:
    """The checkpoint in `path`: an iteration's directory, the directory of several with its tracker file, a .nemo file,
    or an unpacked one. Raises UserError when there is none, or none that can be read.
    """
    top = files_of(path)
    files = below(top, _iteration_directory(path, top))
    nemo = _yaml(files, "model_config.yaml")
    for directory in ("", "model_weights", "weights"):
        inner = below(files, directory)
        _refuse_other_backends(inner)
        if ".metadata" in inner:
            return _distributed(str(path), inner, files, top, nemo)
    regions = ranks.rank_files(files) or ranks.rank_files(below(files, "model_weights"))
    if regions:
        return _ranked(str(path), regions, nemo)
    raise UserError(
        f"{path}: no Megatron checkpoint was found in it; looked for .metadata (torch_dist), mp_rank_*/ and "
        f"tp_rank_*_pp_rank_*/ (torch), model_weights.ckpt and model_weights/ (NeMo), weights/ (NeMo 2), {TRACKER}"
    )


def _distributed(where: str, files: Files, around: Files, top: Files, nemo: Mapping[str, Any] | None) -> Checkpoint:
    tensors = dcp_reader.read(files)
    common = torch_file.load(files["common.pt"]) if "common.pt" in files else {}
    if not isinstance(common, dict):
        raise UserError(f"{files['common.pt'].label}: holds a {type(common).__name__}, not a checkpoint's dict")
    args = _attributes(common.get("args"))
    iteration = common.get("iteration")
    if args is not None:
        stated = from_args.from_args(args, f"{where} (common.pt)")
    elif nemo is not None:
        stated = from_args.from_nemo(nemo, f"{where} (model_config.yaml)")
    else:
        stated = _from_provider(where, around, top)
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    return Checkpoint(where, "torch_dist", iteration, _with_rows(stated, rows), lambda config: dict(tensors))


def _ranked(where: str, regions: Mapping[tuple[int, int], Any], nemo: Mapping[str, Any] | None) -> Checkpoint:
    loaded = ranks.load(regions)
    first = loaded[0, 0]
    args = _attributes(first.get("args"))
    if args is not None:
        stated = from_args.from_args(args, regions[0, 0].label)
        for axis, name in enumerate(("tensor_model_parallel_size", "pipeline_model_parallel_size")):
            found = 1 + max(rank[axis] for rank in regions)
            if args.get(name) not in (None, found):
                raise UserError(f"{where}: args.{name} is {args[name]}, but there are files of {found} such ranks")
    else:
        stated = from_args.from_nemo(nemo, f"{where} (model_config.yaml)") if nemo is not None else {}
    found_stages = ranks.stages(regions, loaded)
    # Megatron writes the version; a file of its own without one is of version 0. NeMo's have the newest order.
    version = float(first.get("checkpoint_version", 0 if "model" in first or "model0" in first else 3))
    tensor, pipeline = (1 + max(rank[axis] for rank in regions) for axis in (0, 1))
    chunks = len(found_stages) // pipeline
    kind = f"torch, tensor parallel {tensor}, pipeline parallel {pipeline}" + (
        f", {chunks} virtual stages" if chunks > 1 else ""
    )
    return Checkpoint(
        where,
        f"{kind}, checkpoint version {version:g}",
        first.get("iteration"),
        _with_rows(stated, ranks.embedding_rows(found_stages)),
        lambda config: ranks.read(found_stages, config, version),
    )


def _with_rows(stated: Mapping[str, Stated], rows: int | None) -> dict[str, Stated]:
    """The padded vocabulary is what is stored, where nothing states it."""
    by_rows = {} if rows is None else {"padded_vocab_size": Stated(rows, f"rows of {EMBEDDING}")}
    return by_rows | dict(stated)


def _attributes(args: Any) -> dict[str, Any] | None:
    return args.attributes if isinstance(args, Inert) else args if isinstance(args, dict) else None


def _from_provider(where: str, around: Files, top: Files) -> dict[str, Stated]:
    for files in (around, top):
        run_config = _yaml(files, "run_config.yaml")
        if run_config is not None and isinstance(run_config.get("model"), Mapping):
            return from_args.from_provider(run_config["model"], "run_config.yaml", f"{where} (run_config.yaml)")
        context = _yaml(files, "context/model.yaml")
        if context is not None:
            model = context.get("config", context)
            return from_args.from_provider(model, "context/model.yaml", f"{where} (context/model.yaml)")
    return {}


def _iteration_directory(path: Path, files: Files) -> str:
    """The directory of the latest iteration, relative to `path`; "" when `path` is a checkpoint itself."""
    directories = sorted({name.split("/")[0] for name in files if re.match(r"(iter_\d+|release)/", name)})
    for tracker in (TRACKER, BRIDGE_TRACKER):
        if tracker in files:
            latest = _tracked(files[tracker])
            if latest not in directories:
                told = f"there are {', '.join(directories)}" if directories else "there is no other"
                raise UserError(f"{files[tracker].label}: points to {latest}, which is missing; {told}")
            return latest
    if len(directories) > 1:
        raise UserError(f"{path}: holds {', '.join(directories)} and no {TRACKER}; name one of them")
    return directories[0] if directories else ""


def _tracked(tracker: Region) -> str:
    """The directory that a tracker file points to."""
    if tracker.path.name == BRIDGE_TRACKER:
        step = torch_file.load(tracker).get("step")
        text = str(int(step.read()) if isinstance(step, StoredTensor) else step)
    else:
        text = tracker.read().decode(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise UserError(f"{tracker.label}: says {text!r}; it must hold an iteration's number or 'release'")
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


def _yaml(files: Files, name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        found = yaml.safe_load(files[name].read())
    except yaml.YAMLError as error:
        raise UserError(f"{files[name].label}: it is no plain YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{files[name].label}: it must hold keys and values; it holds {found!r:.80}")
    return found
