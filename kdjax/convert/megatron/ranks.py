"""Megatron's `torch` checkpoints and NeMo's older ones: a file for each tensor- and pipeline-parallel rank.

Layer numbers are those of a rank's own layers. With virtual stages a file holds several chunks of layers, and the
model's order runs through the stages chunk by chunk.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.files import Files, Region
from kdjax.convert.megatron.names import by_name, canonical, join_split_maps
from kdjax.convert.megatron.rules import SKIPPED
from kdjax.convert.pytorch import file as torch_file
from kdjax.convert.tensors import StoredTensor, concatenated, in_memory, transformed
from kdjax.types import UserError

log = logging.getLogger("kdjax")

RANK = (
    re.compile(r"mp_rank_(?P<tp>\d+)(?:_(?P<pp>\d+))?/(?:model_optim_rng\.pt|model_rng\.pt|model_weights\.ckpt)"),
    re.compile(r"tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)/(?:model_optim_rng\.pt|model_weights\.ckpt)"),
    re.compile(r"model_weights\.ckpt"),
)
EXPERT_RANK = re.compile(r"mp_rank_\d+_\d+_\d+/.*")  # tensor, pipeline, expert parallel
# How tensor parallelism cuts: [out, in] along "out" where a map widens, along "in" where it comes back.
CUT_BY_ROWS = re.compile(
    r".*word_embeddings\.weight|output_layer\.(weight|bias)|.*\.linear_qkv\.(weight|bias)|"
    r".*\.linear_fc1(_2)?\.(weight|bias)(_[wv])?"
)
CUT_BY_COLUMNS = re.compile(r".*\.(linear_proj|linear_fc2)\.weight")
FUSED_GATE = re.compile(r".*\.linear_fc1\.(weight|bias)")
QKV = re.compile(r".*\.linear_qkv\.(weight|bias)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

Tensors = dict[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The tensors of one chunk of layers of one pipeline stage, a dict for each tensor-parallel rank."""

    label: str
    ranks: tuple[Tensors, ...]


def rank_files(files: Files) -> dict[tuple[int, int], Region]:
    """(tensor rank, pipeline rank) -> file; {} when there are none at all.

    Raises UserError when one is missing, and for the files of experts.
    """
    found: dict[tuple[int, int], Region] = {}
    for name, region in files.items():
        if EXPERT_RANK.fullmatch(name):
            raise UserError(f"{region.label}: of an expert-parallel rank; kdjax's model has no mixtures of experts")
        for pattern in RANK:
            if (match := pattern.fullmatch(name)) is not None:
                parts = match.groupdict()
                found[int(parts.get("tp") or 0), int(parts.get("pp") or 0)] = region
    tensor, pipeline = (1 + max((rank[axis] for rank in found), default=-1) for axis in (0, 1))
    missing = [(tp, pp) for tp in range(tensor) for pp in range(pipeline) if (tp, pp) not in found]
    if missing:
        told = ", ".join(f"tensor rank {tp} of pipeline stage {pp}" for tp, pp in missing[:8])
        raise UserError(f"{next(iter(found.values())).label}: beside it the file of {told} is missing; copy it there")
    return found


def load(regions: Mapping[tuple[int, int], Region]) -> dict[tuple[int, int], dict[str, Any]]:
    """Each rank's file: its top level, with tensors unread."""
    loaded = {rank: torch_file.load(region) for rank, region in sorted(regions.items())}
    for rank, content in loaded.items():
        if not isinstance(content, dict):
            raise UserError(f"{regions[rank].label}: holds a {type(content).__name__}, not a checkpoint's dict")
    return loaded


def stages(regions: Mapping[tuple[int, int], Region], loaded: Mapping[tuple[int, int], dict[str, Any]]) -> list[Stage]:
    """The chunks of layers in the model's order: all stages' first chunks, then all stages' second ones."""
    keys = [key for key in loaded[0, 0] if re.fullmatch(r"model\d*", key)]
    chunks: list[str | None] = [*sorted(keys, key=lambda key: int(key.removeprefix("model") or 0))] or [None]
    tensor, pipeline = (1 + max(rank[axis] for rank in loaded) for axis in (0, 1))
    found = []
    for chunk in chunks:
        for pp in range(pipeline):
            contents = [loaded[tp, pp] for tp in range(tensor)]
            label = regions[0, pp].label
            if chunk is not None and any(chunk not in content for content in contents):
                raise UserError(f"{label}: {chunk!r} is missing; the ranks disagree about the virtual stages")
            flat = [flatten(content if chunk is None else content[chunk], label) for content in contents]
            found.append(Stage(label, tuple(flat)))
    return found


def flatten(tree: Mapping[str, Any], label: str) -> Tensors:
    """Nested dicts as one, by canonical name; entries without a tensor (`_extra_state`) as empty tensors."""
    empty = in_memory(np.zeros(0, np.uint8), label)
    return by_name(
        (canonical(name), dataclasses.replace(value if isinstance(value, StoredTensor) else empty, name=name))
        for name, value in _leaves(tree, "")
    )


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def read(stages: list[Stage], config: ModelConfig, version: float) -> Tensors:
    """One tensor a name, over all ranks and with the layers numbered through.

    `version` is the checkpoint's: below 2, queries, keys and values were interleaved in other orders.
    """
    found: list[tuple[str, StoredTensor]] = []
    skipped: Tensors = {}  # which several stages may have under one name
    first_layer = 0
    for stage in stages:
        numbers = {int(match[1]) for name in stage.ranks[0] if (match := LAYER.match(name))}
        if numbers != set(range(len(numbers))):
            raise UserError(f"{stage.label}: its layers are {sorted(numbers)}; a stage counts its own from 0")
        gated = config.activation == "swiglu" and not _split(stage)
        for name in dict.fromkeys(name for rank in stage.ranks for name in rank):
            if SKIPPED.fullmatch(name):
                skipped[_renumbered(name, first_layer)] = in_memory(np.zeros(0, np.uint8), stage.label, name)
                continue
            if any(name not in rank for rank in stage.ranks):
                raise UserError(f"{stage.label}: {name} is not in the files of all tensor-parallel ranks")
            tensors = [rank[name] for rank in stage.ranks]
            if version < 2 and QKV.fullmatch(name):
                tensors = [_reordered(tensor, config, version) for tensor in tensors]
            found.append((_renumbered(name, first_layer), _over_ranks(name, tensors, gated)))
        first_layer += len(numbers)
    return skipped | join_split_maps(by_name(found))


def _renumbered(name: str, first_layer: int) -> str:
    return LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)


def _split(stage: Stage) -> bool:
    """Whether gate and up map are stored apart, so that neither holds halves of both."""
    return any(re.fullmatch(r".*\.linear_fc1(_2\.weight|\.weight_v)", name) for name in stage.ranks[0])


def _over_ranks(name: str, tensors: list[StoredTensor], gated: bool) -> StoredTensor:
    """The whole tensor from its shards."""
    if len(tensors) == 1:
        return tensors[0]
    if gated and FUSED_GATE.fullmatch(name):  # every rank holds [its gates; its ups]
        halves = [tensor.shape[0] // 2 for tensor in tensors]
        gates = [tensor.slice(0, half) for tensor, half in zip(tensors, halves, strict=True)]
        ups = [tensor.slice(half, tensor.shape[0]) for tensor, half in zip(tensors, halves, strict=True)]
        return concatenated([*gates, *ups], axis=0)
    if CUT_BY_ROWS.fullmatch(name):
        return concatenated(tensors, axis=0)
    if CUT_BY_COLUMNS.fullmatch(name):
        return concatenated(tensors, axis=1)
    return _replicated(name, tensors)


def _replicated(name: str, tensors: list[StoredTensor]) -> StoredTensor:
    """Rank 0's copy, as Megatron itself takes it; a warning where the others differ."""
    first, *others = tensors

    def rows(start: int, stop: int) -> np.ndarray:
        array = first.rows(start, stop)
        for other in others:
            if other.shape != first.shape or other.rows(start, stop).tobytes() != array.tobytes():
                log.warning("%s differs between %s and %s; the first is taken", name, first.where, other.where)
        return array

    return dataclasses.replace(first, rows=rows)


def _reordered(tensor: StoredTensor, config: ModelConfig, version: float) -> StoredTensor:
    """[3, N, H] (version 0) or [N, H, 3] (version 1) rows as [N, 3, H] (fix_query_key_value_ordering in Megatron)."""
    H, rest = config.head_width, tensor.shape[1:]

    def change(array: np.ndarray) -> np.ndarray:
        if version < 1:
            return array.reshape(3, -1, H, *rest).swapaxes(0, 1)
        return np.moveaxis(array.reshape(-1, H, 3, *rest), 2, 1)

    return transformed(tensor, tensor.shape, change)


def embedding_rows(stages: list[Stage]) -> int | None:
    """Rows of the embedding over all tensor-parallel ranks."""
    found = [rank.get("embedding.word_embeddings.weight") for rank in stages[0].ranks]
    return sum(tensor.shape[0] for tensor in found if tensor is not None) or None
