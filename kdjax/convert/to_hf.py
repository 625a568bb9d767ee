"""A kdjax model as a Hugging Face checkpoint that transformers and the servers built on it load.

IN is a model directory, a run directory (its best step, else its last) or one step of it (RUN/checkpoints/300). The
family (Llama, Qwen2, Qwen3, Mistral, GPT-2) follows from the architecture. Tokenizer files and the keys of config.json
that are no architecture come from the checkpoint that the model was converted or distilled from, where they are known.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax.checkpoint import params_directory, read_model_config, run_config
from kdjax.checkpoint.arrays import open_leaves
from kdjax.config import ModelConfig
from kdjax.convert.export import DTYPES, Export, add_export_arguments
from kdjax.convert.huggingface import files
from kdjax.convert.huggingface.families import choose, settings
from kdjax.convert.huggingface.rules import rules
from kdjax.convert.model_writer import appearing, disk_errors, refuse_existing, refuse_full_disk
from kdjax.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_export_arguments(parser, "Hugging Face checkpoint")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        help="take the tokenizer's files from here; default: IN's or its teacher's",
    )
    parser.add_argument(
        "--max-positions",
        metavar="N",
        type=int,
        help="longest sequence, for servers; default: the source's or the data's",
    )
    parser.add_argument(
        "--vocab-padding",
        choices=("strip", "keep"),
        help="rows beyond the vocabulary; default: strip, and an error where training let them into the softmax",
    )
    parser.add_argument(
        "--max-shard-gb", metavar="GB", type=float, default=files.SHARD_BYTES / 1e9, help="5 by default"
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads, checks, converts."""
    model, out = arguments.model, arguments.out.absolute()
    refuse_existing(out, arguments.force, files.CONFIG)
    config = _padding(read_model_config(model), model, arguments.vocab_padding)
    origins = _origins(model)
    carried = _carried(origins)
    family = choose(config, carried.get("model_type"))
    leaves = open_leaves(params_directory(model))
    export = Export(config, rules(config, family), leaves, DTYPES.get(arguments.dtype))
    said = settings(config, family, _max_positions(arguments.max_positions, config, model, carried), export.dtype_name)
    unknown = {"bos_token_id": None, "eos_token_id": None}  # else transformers takes its class's, such as 50256
    said = (carried if carried.get("model_type") == family.model_type else unknown) | said
    tokenizer = _tokenizer(arguments.tokenizer, origins)
    beside = files.copied([path / "huggingface" for path in origins], ["generation_config.json"])
    tensors, nbytes = export.tensors, export.nbytes
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(out, nbytes)
    with appearing(out, arguments.force) as directory, disk_errors(out, nbytes):
        files.Writer(directory, tensors, int(arguments.max_shard_gb * 1e9)).write(export.arrays())
        (directory / files.CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        files.copy_into(directory, tokenizer | beside)
    print(f"{out}: {family.architecture}, {len(tensors)} tensors, {nbytes / 1e9:.2f} GB, {export.dtype_name}")
    if not tokenizer:
        print("no tokenizer files are known for it; --tokenizer DIR copies them from there")


def _padding(config: ModelConfig, model: Path, choice: str | None) -> ModelConfig:
    """The configuration with or without the padded rows. Raises UserError where that changes what was trained."""
    rows = config.vocab_rows
    run = run_config(model)
    if choice is None and run is not None and run.loss.include_vocab_padding and rows > config.vocab_size:
        raise UserError(
            f"{model} was trained with loss.include_vocab_padding: its softmax ran over {rows} rows, of which "
            f"{config.vocab_size} are the vocabulary. --vocab-padding keep writes them all, --vocab-padding strip "
            "leaves the others out"
        )
    if choice == "keep":
        return dataclasses.replace(config, vocab_size=rows, padded_vocab_size=rows)
    return dataclasses.replace(config, padded_vocab_size=config.vocab_size)


def _origins(model: Path) -> list[Path]:
    """The model, what it was distilled from, what that was: where files that travel along may lie."""
    found: list[Path] = [model]
    while len(found) < 8:
        run = run_config(found[-1])
        if run is None or run.model.init_from is None:
            break
        found.append(Path(run.model.init_from))
    return found


def _carried(origins: list[Path]) -> dict[str, Any]:
    """The config.json that the model came with; empty if it never had one."""
    found = files.copied([path / "huggingface" for path in origins], [files.CONFIG])
    return files.read_json(found[files.CONFIG]) if found else {}


def _tokenizer(given: Path | None, origins: list[Path]) -> dict[str, Path]:
    if given is None:
        return files.copied([path / "tokenizer" for path in origins], files.TOKENIZER_FILES)
    found = files.copied([given], files.TOKENIZER_FILES)
    if not found:
        raise UserError(f"--tokenizer {given}: none of {', '.join(files.TOKENIZER_FILES)} is there")
    return found


def _max_positions(given: int | None, config: ModelConfig, model: Path, carried: Mapping[str, Any]) -> int:
    """What config.json gives as the longest sequence: learned positions, the source's, else the data's."""
    run = run_config(model)
    known = carried.get("max_position_embeddings") or (run.data.sequence_length if run else None)
    if config.max_positions is not None or given is not None or known is not None:
        return config.max_positions or given or known or 0
    raise UserError(f"{model} does not say how long its sequences may be; give --max-positions N")
