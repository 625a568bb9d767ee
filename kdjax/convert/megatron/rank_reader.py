"""Reads Megatron's `torch` checkpoints and NeMo's older ones: one file for each tensor- and pipeline-parallel rank.

Layers are numbered within a rank's file. With virtual pipeline stages a file holds several model chunks, and the
model's order goes through all pipeline ranks' first chunks, then through their second ones, and so on.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.checkpoint_files import ByteRange, Files
from kdjax.convert.megatron.parameter_names import by_name, canonical_name, merge_gate_and_up
from kdjax.convert.megatron.rules import EMBEDDING, SKIPPED
from kdjax.convert.pytorch import torch_file
from kdjax.convert.tensors import LazyTensor, Tensors, concatenate, placeholder, transform
from kdjax.types import UserError

log = logging.getLogger("kdjax")

RANK_FILES = (
    re.compile(r"mp_rank_(?P<tp>\d+)(?:_(?P<pp>\d+))?/(?:model_optim_rng\.pt|model_rng\.pt|model_weights\.ckpt)"),
    re.compile(r"tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)/(?:model_optim_rng\.pt|model_weights\.ckpt)"),
    re.compile(r"model_weights\.ckpt"),
)
EXPERT_RANK_FILE = re.compile(r"mp_rank_\d+_\d+_\d+/.*")  # tensor, pipeline, expert parallel
# How tensor parallelism splits [out, in]: along "out" for column-parallel maps, along "in" for row-parallel ones.
SPLIT_OUT = re.compile(
    r".*word_embeddings\.weight|output_layer\.(weight|bias)|.*\.linear_qkv\.(weight|bias)|"
    r".*\.linear_fc1(_2)?\.(weight|bias)(_[wv])?"
)
SPLIT_IN = re.compile(r".*\.(linear_proj|linear_fc2)\.weight")
GATE_AND_UP = re.compile(r".*\.linear_fc1\.(weight|bias)")
SEPARATE_GATE = re.compile(r".*\.linear_fc1(_2\.weight|\.weight_v)")
QKV = re.compile(r".*\.linear_qkv\.(weight|bias)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

Rank = tuple[int, int]  # tensor parallel, pipeline parallel


@dataclasses.dataclass(frozen=True)
class ModelChunk:
    """Consecutive layers of one pipeline rank: the tensors of each tensor-parallel rank, by canonical name."""

    label: str  # a file, for error messages
    ranks: tuple[Tensors, ...]


@dataclasses.dataclass(frozen=True)
class RankFiles:
    """A checkpoint of one file for each rank, its tensors unread."""

    label: str  # rank 0's file, for error messages
    content: Mapping[str, Any]  # the top level of rank 0's file
    tensor_parallel: int
    pipeline_parallel: int
    chunks: tuple[ModelChunk, ...]  # in the model's order

    @property
    def version(self) -> float:
        """Megatron's checkpoint version: below 2, queries, keys and values were interleaved in other orders."""
        # Megatron's files without a version have version 0; NeMo's never have one, and the newest order.
        return float(self.content.get("checkpoint_version", 0 if {"model", "model0"} & self.content.keys() else 3))

    @property
    def format(self) -> str:
        """The format with its parallelism, for provenance.json."""
        virtual = len(self.chunks) // self.pipeline_parallel
        stages = f", {virtual} virtual stages" if virtual > 1 else ""
        return (
            f"torch, tensor parallel {self.tensor_parallel}, pipeline parallel {self.pipeline_parallel}{stages}, "
            f"checkpoint version {self.version:g}"
        )

    @property
    def vocabulary_rows(self) -> int | None:
        """The embedding's rows over all tensor-parallel ranks; None if there is no embedding."""
        found = [rank[EMBEDDING] for rank in self.chunks[0].ranks if EMBEDDING in rank]
        return sum(tensor.shape[0] for tensor in found) or None

    def read_tensors(self, config: ModelConfig) -> dict[str, LazyTensor]:
        """Returns one tensor for each name, joined over the ranks and unread, with layers numbered in the model."""
        found: list[tuple[str, LazyTensor]] = []
        skipped: dict[str, LazyTensor] = {}  # apart, because several chunks may have the same name
        first_layer = 0
        for chunk in self.chunks:
            numbers = {int(match[1]) for name in chunk.ranks[0] if (match := LAYER.match(name))}
            if numbers != set(range(len(numbers))):
                raise UserError(f"{chunk.label}: its layers are {sorted(numbers)}; a rank numbers its layers from 0")
            separate = any(SEPARATE_GATE.fullmatch(name) for name in chunk.ranks[0])
            for name in dict.fromkeys(name for rank in chunk.ranks for name in rank):
                model_name = _renumber(name, first_layer)
                if SKIPPED.fullmatch(name):
                    skipped[model_name] = placeholder(chunk.label, name)
                    continue
                if any(name not in rank for rank in chunk.ranks):
                    raise UserError(f"{chunk.label}: {name} is not in the files of all tensor-parallel ranks")
                shards = [rank[name] for rank in chunk.ranks]
                if self.version < 2 and QKV.fullmatch(name):
                    shards = [_reorder_qkv(shard, config, self.version) for shard in shards]
                gated = config.activation == "swiglu" and not separate
                found.append((model_name, _join_ranks(name, shards, gated)))
            first_layer += len(numbers)
        return skipped | merge_gate_and_up(by_name(found))


def open_rank_files(files: Files) -> RankFiles | None:
    """Opens the rank files in a directory; returns None if it has none.

    Raises UserError for a missing or damaged file, and for files of expert-parallel ranks.
    """
    found = _find_rank_files(files)
    if not found:
        return None
    contents = {rank: torch_file.load(file) for rank, file in sorted(found.items())}
    for rank, content in contents.items():
        if not isinstance(content, dict):
            raise UserError(f"{found[rank].label}: holds a {type(content).__name__}, not a checkpoint's dict")
    tensor_parallel, pipeline_parallel = (1 + max(rank[axis] for rank in found) for axis in (0, 1))
    keys = [key for key in contents[0, 0] if re.fullmatch(r"model\d*", key)]
    keys.sort(key=lambda key: int(key.removeprefix("model") or 0))
    chunks = []
    for key in keys or [None]:
        for pp in range(pipeline_parallel):
            label, ranks = found[0, pp].label, [contents[tp, pp] for tp in range(tensor_parallel)]
            if key is not None and any(key not in rank for rank in ranks):
                raise UserError(f"{label}: {key!r} is missing; the ranks disagree about the virtual stages")
            flat = tuple(_flatten(rank if key is None else rank[key], label) for rank in ranks)
            chunks.append(ModelChunk(label, flat))
    return RankFiles(found[0, 0].label, contents[0, 0], tensor_parallel, pipeline_parallel, tuple(chunks))


def _find_rank_files(files: Files) -> dict[Rank, ByteRange]:
    """Returns each rank's file. Raises UserError when one is missing, and for files of expert-parallel ranks."""
    found: dict[Rank, ByteRange] = {}
    for name, file in files.items():
        if EXPERT_RANK_FILE.fullmatch(name):
            raise UserError(f"{file.label}: belongs to an expert-parallel rank; kdjax has no mixture of experts")
        for pattern in RANK_FILES:
            if (match := pattern.fullmatch(name)) is not None:
                parts = match.groupdict()
                found[int(parts.get("tp") or 0), int(parts.get("pp") or 0)] = file
    tensor, pipeline = (1 + max((rank[axis] for rank in found), default=-1) for axis in (0, 1))
    missing = [(tp, pp) for tp in range(tensor) for pp in range(pipeline) if (tp, pp) not in found]
    if missing:
        listed = ", ".join(f"tensor rank {tp} of pipeline rank {pp}" for tp, pp in missing[:8])
        raise UserError(f"{next(iter(found.values())).label}: the file of {listed} is missing beside it; copy it there")
    return found


def _flatten(tree: Mapping[str, Any], label: str) -> dict[str, LazyTensor]:
    """Returns nested dicts as one, by canonical name; entries without a tensor (`_extra_state`) become empty ones."""
    return by_name(
        (
            canonical_name(name),
            dataclasses.replace(value, name=name) if isinstance(value, LazyTensor) else placeholder(label, name),
        )
        for name, value in _entries(tree, "")
    )


def _entries(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict):
            yield from _entries(value, name)
        else:
            yield name, value


def _renumber(name: str, first_layer: int) -> str:
    return LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)


def _join_ranks(name: str, shards: list[LazyTensor], gated: bool) -> LazyTensor:
    """Returns the whole tensor from the shards of the tensor-parallel ranks."""
    if len(shards) == 1:
        return shards[0]
    if gated and GATE_AND_UP.fullmatch(name):  # every rank holds its part of the gate, then of the up projection
        halves = [shard.shape[0] // 2 for shard in shards]
        gates = [shard.slice(0, half) for shard, half in zip(shards, halves, strict=True)]
        ups = [shard.slice(half, shard.shape[0]) for shard, half in zip(shards, halves, strict=True)]
        return concatenate([*gates, *ups], axis=0)
    if SPLIT_OUT.fullmatch(name):
        return concatenate(shards, axis=0)
    if SPLIT_IN.fullmatch(name):
        return concatenate(shards, axis=1)
    return _replicated(name, shards)


def _replicated(name: str, copies: list[LazyTensor]) -> LazyTensor:
    """Returns rank 0's copy, which Megatron itself uses, and warns when it is read if the others differ."""
    first, *others = copies

    def rows(start: int, stop: int) -> np.ndarray:
        array = first.rows(start, stop)
        for other in others:
            if other.shape != first.shape or other.rows(start, stop).tobytes() != array.tobytes():
                log.warning("%s differs between %s and %s; the first is used", name, first.label, other.label)
        return array

    return dataclasses.replace(first, rows=rows)


def _reorder_qkv(tensor: LazyTensor, config: ModelConfig, version: float) -> LazyTensor:
    """Returns [3, N, H] (version 0) or [N, H, 3] (version 1) rows as [N, 3, H].

    The same as Megatron's fix_query_key_value_ordering.
    """
    H, rest = config.head_width, tensor.shape[1:]

    def change(array: np.ndarray) -> np.ndarray:
        if version < 1:
            return array.reshape(3, -1, H, *rest).swapaxes(0, 1)
        return np.moveaxis(array.reshape(-1, H, 3, *rest), 2, 1)

    return transform(tensor, tensor.shape, change)
