"""Converts a kdjax model to a Megatron-LM checkpoint (torch_dist) that Megatron-Core loads at any parallelism.

IN is a model directory, a run directory (its best step, else its last) or one step of it (RUN/checkpoints/300).
OUT gets latest_checkpointed_iteration.txt ("release") and release/, all or nothing. Neither torch nor Megatron is
needed.

It holds the weights and Megatron's args of the architecture, which release/provenance.json shows in plain text, but no
optimizer state: Megatron starts from it at iteration 0. An architecture that Megatron's GPT does not have is an error
that names the value.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdjax.checkpoint import params_directory, read_model_config, run_config
from kdjax.config import Config, ModelConfig
from kdjax.convert.export import Export, add_export_arguments
from kdjax.convert.megatron.args_writer import to_args
from kdjax.convert.megatron.checkpoint import TRACKER
from kdjax.convert.megatron.dcp_writer import Shard, namespace, write_checkpoint
from kdjax.convert.megatron.rank_reader import LAYER
from kdjax.convert.megatron.rules import megatron_rules
from kdjax.convert.output_directory import output_directory, refuse_existing
from kdjax.convert.provenance import PROVENANCE, kdjax_version, write_provenance
from kdjax.convert.pytorch.pickle_writer import Global
from kdjax.types import UserError

RELEASE = "release"  # Megatron's word for weights without a training state
# Modules for which Transformer Engine keeps an `_extra_state` (FP8 scales). Megatron asks for each of them by name.
EXTRA_STATES = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_export_arguments(parser, "Megatron checkpoint")
    padding = "pad the vocabulary to a multiple of N (in Megatron 128 times tensor parallelism); default: as stored"
    parser.add_argument("--vocab-divisible-by", metavar="N", type=int, help=padding)


def run(arguments: argparse.Namespace) -> None:
    """Reads and checks the model and writes the checkpoint."""
    model, out = arguments.model, arguments.out.absolute()
    _refuse_training(out)
    refuse_existing(out, arguments.force, f"{RELEASE}/{PROVENANCE}")
    trained = run_config(model)
    config = _with_padding(read_model_config(model), trained, model, arguments.vocab_divisible_by)
    export = Export.open(model, config, megatron_rules(config), arguments.dtype)
    args = to_args(config, None if trained is None else trained.data.sequence_length)
    params = params_directory(model)
    step = int(params.parent.name) if params.parent.parent.name == "checkpoints" else 0
    with output_directory(out, export.nbytes, arguments.force) as directory:
        (directory / RELEASE).mkdir()
        common = _common(args, export.dtype_name, step)
        write_checkpoint(directory / RELEASE, _shards(export), _extra_states(config), common)
        provenance = {"kdjax_version": kdjax_version(), "source": model.resolve().name, "step": step, "args": args}
        write_provenance(directory / RELEASE, provenance)
        (directory / TRACKER).write_text(RELEASE)
    size = f"{len(export.tensors)} tensors, {export.nbytes / 1e9:.3f} GB, {export.dtype_name}"
    print(f"wrote {out}: torch_dist, {size}\nMegatron's args for it are also in {out / RELEASE / PROVENANCE}")


def _refuse_training(out: Path) -> None:
    """Raises UserError for a directory in which training went on: it holds more than this command wrote."""
    iterations = sorted(path.name for path in out.glob("iter_*"))
    if iterations:
        raise UserError(
            f"{out} holds {', '.join(iterations[:4])}, a training run's checkpoints; name another directory"
        )


def _with_padding(config: ModelConfig, trained: Config | None, model: Path, divisor: int | None) -> ModelConfig:
    """Returns the configuration with the rows to write. Raises UserError if that would change a trained softmax."""
    rows = config.vocab_rows
    if divisor is None:
        return config
    if divisor < 1:
        raise UserError(f"--vocab-divisible-by {divisor}: it must be at least 1, such as 128")
    wanted = math.ceil(config.vocab_size / divisor) * divisor
    if wanted != rows and trained is not None and trained.loss.include_vocab_padding:
        raise UserError(
            f"--vocab-divisible-by {divisor} makes {wanted} vocabulary rows, but {model} was trained with "
            f"loss.include_vocab_padding: its softmax ran over {rows} rows; omit the option to write all of them"
        )
    return dataclasses.replace(config, padded_vocab_size=wanted)


def _shards(export: Export) -> Iterator[Shard]:
    """Yields the tensors, each layer's as its part of a stack: how Megatron stores layers that are all alike."""
    for name, array in export.arrays():
        layer = LAYER.match(name)
        if layer is None:
            yield Shard(name, array.shape, (0,) * array.ndim, array)
        else:
            stack = (export.config.layers, *array.shape)
            offsets = (int(layer[1]), *[0] * array.ndim)
            yield Shard(LAYER.sub("decoder.layers.", name), stack, offsets, array[None])
        del array


def _extra_states(config: ModelConfig) -> dict[str, Any]:
    """Returns empty `_extra_state`s, as a run without FP8 writes."""
    modules = (*EXTRA_STATES, *(("self_attention.q_layernorm", "self_attention.k_layernorm") if config.qk_norm else ()))
    stacked = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{config.layers}": [None]
        for layer in range(config.layers)
        for module in modules
    }
    return stacked | {"decoder.final_layernorm._extra_state/shard_0_1": [None]}


def _common(args: dict[str, Any], dtype: str, step: int) -> dict[str, Any]:
    """Returns the content of common.pt."""
    arithmetic = {"params_dtype": Global("torch", dtype), "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    return {
        "args": namespace(**args, **arithmetic),
        "checkpoint_version": 3.0,  # queries, keys and values are ordered by query groups
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
