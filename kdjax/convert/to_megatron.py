"""A kdjax model as a Megatron-LM checkpoint (torch_dist) that Megatron-Core loads at any parallelism.

IN is a model directory, a run directory (its best step, else its last) or one step of it (RUN/checkpoints/300).
OUT gets latest_checkpointed_iteration.txt ("release") and release/, all or nothing. Neither torch nor Megatron is
needed.

It holds the weights and Megatron's args of the architecture, which release/provenance.json shows in plain text, but no
optimizer state: Megatron starts from it at iteration 0. An architecture that Megatron's GPT does not have is an error
that names the value.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdjax.checkpoint import params_directory, read_model_config, run_config
from kdjax.checkpoint.arrays import open_leaves
from kdjax.config import ModelConfig
from kdjax.convert.export import DTYPES, Export, add_export_arguments
from kdjax.convert.megatron.dcp_writer import Shard, namespace, write
from kdjax.convert.megatron.layout import TRACKER
from kdjax.convert.megatron.ranks import LAYER
from kdjax.convert.megatron.rules import rules
from kdjax.convert.megatron.to_args import to_args
from kdjax.convert.model_writer import (
    PROVENANCE,
    appearing,
    disk_errors,
    kdjax_version,
    refuse_existing,
    refuse_full_disk,
)
from kdjax.convert.pytorch.pickle_writer import Global
from kdjax.types import UserError

RELEASE = "release"  # Megatron's word for weights without a training state
# Modules that Transformer Engine keeps an `_extra_state` of (FP8 scales). Loading asks for each of them by name.
EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_export_arguments(parser, "Megatron checkpoint")
    parser.add_argument(
        "--vocab-divisible-by",
        metavar="N",
        type=int,
        help="pad the vocabulary to a multiple of N (128 times tensor parallelism is Megatron's); default: as stored",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads, checks, converts."""
    model, out = arguments.model, arguments.out.absolute()
    _refuse_training(out)
    refuse_existing(out, arguments.force, f"{RELEASE}/{PROVENANCE}")
    config = _vocabulary(read_model_config(model), model, arguments.vocab_divisible_by)
    params = params_directory(model)
    export = Export(config, rules(config), open_leaves(params), DTYPES.get(arguments.dtype))
    args = to_args(config, _sequence_length(model))
    step = int(params.parent.name) if params.parent.parent.name == "checkpoints" else 0
    nbytes = export.nbytes
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(out, nbytes)
    with appearing(out, arguments.force) as directory, disk_errors(out, nbytes):
        (directory / RELEASE).mkdir()
        write(directory / RELEASE, _shards(export), _extra_states(config), _common(args, export.dtype_name, step))
        told = {"kdjax_version": kdjax_version(), "source": model.resolve().name, "step": step, "args": args}
        (directory / RELEASE / PROVENANCE).write_text(json.dumps(told, indent=2) + "\n")
        (directory / TRACKER).write_text(RELEASE)
    print(f"{out}: torch_dist, {len(export.tensors)} tensors, {nbytes / 1e9:.3f} GB, {export.dtype_name}")
    print(f"Megatron's args for it are also in {out / RELEASE / PROVENANCE}")


def _refuse_training(out: Path) -> None:
    """A directory that training went on in holds more than this command wrote."""
    iterations = sorted(path.name for path in out.glob("iter_*"))
    if iterations:
        raise UserError(
            f"{out} holds {', '.join(iterations[:4])}, a training run's checkpoints; name another directory"
        )


def _vocabulary(config: ModelConfig, model: Path, divisor: int | None) -> ModelConfig:
    """The configuration with the rows that are to be written. Raises UserError where that changes what was trained."""
    rows = config.vocab_rows
    if divisor is None:
        return config
    if divisor < 1:
        raise UserError(f"--vocab-divisible-by {divisor}: give a number from 1, such as 128")
    wanted = math.ceil(config.vocab_size / divisor) * divisor
    run = run_config(model)
    if wanted != rows and run is not None and run.loss.include_vocab_padding:
        raise UserError(
            f"--vocab-divisible-by {divisor} makes {wanted} rows of the vocabulary, and {model} was trained with "
            f"loss.include_vocab_padding: its softmax ran over {rows}; leave the option out, so that all are written"
        )
    return dataclasses.replace(config, padded_vocab_size=wanted)


def _sequence_length(model: Path) -> int | None:
    """Of the records that the run was trained on."""
    run = run_config(model)
    return None if run is None else run.data.sequence_length


def _shards(export: Export) -> Iterator[Shard]:
    """The tensors, those of the layers as parts of stacks: Megatron's layout of layers that are all alike."""
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
    """Empty ones, as a run without FP8 has."""
    modules = (*EXTRA_STATES, *(("self_attention.q_layernorm", "self_attention.k_layernorm") if config.qk_norm else ()))
    stacked = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{config.layers}": [None]
        for layer in range(config.layers)
        for module in modules
    }
    return stacked | {"decoder.final_layernorm._extra_state/shard_0_1": [None]}


def _common(args: dict[str, Any], dtype: str, step: int) -> dict[str, Any]:
    """What common.pt holds."""
    arithmetic = {"params_dtype": Global("torch", dtype), "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    return {
        "args": namespace(**args, **arithmetic),
        "checkpoint_version": 3.0,  # queries, keys and values are ordered by groups
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
