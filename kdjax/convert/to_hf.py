"""Converts a kdjax model to a Hugging Face checkpoint, for transformers and the servers built on it.

IN is a model directory, a run directory (its best step, else its last) or one step of it (RUN/checkpoints/300). The
family (Llama, Qwen2, Qwen3, Mistral, GPT-2) follows from the architecture. Tokenizer files, generation_config.json and
the keys of config.json that are not architecture come from the checkpoint that the model was converted or distilled
from, if it is known.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax.checkpoint import read_model_config, run_config
from kdjax.config import Config, ModelConfig
from kdjax.convert.export import Export, add_export_arguments
from kdjax.convert.huggingface.companion_files import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    copy_files,
    find_files,
    read_json,
)
from kdjax.convert.huggingface.config_json import choose_family, write_architecture
from kdjax.convert.huggingface.rules import huggingface_rules
from kdjax.convert.huggingface.safetensors_files import SHARD_BYTES, SafetensorsWriter
from kdjax.convert.output_directory import output_directory, refuse_existing
from kdjax.types import UserError

MOST_ORIGINS = 8  # models that were distilled from each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_export_arguments(parser, "Hugging Face checkpoint")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="copy the tokenizer from DIR; default: from IN or its teacher"
    )
    length = "longest sequence to state in config.json; default: the source's, else the training data's"
    parser.add_argument("--max-positions", metavar="N", type=int, help=length)
    padding = "what to do with rows beyond the vocabulary; default: strip, but an error if they were trained"
    parser.add_argument("--vocab-padding", choices=("strip", "keep"), help=padding)
    parser.add_argument(
        "--max-shard-gb", metavar="GB", type=float, default=SHARD_BYTES / 1e9, help="largest file; default: %(default)g"
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads and checks the model and writes the checkpoint."""
    model, out = arguments.model, arguments.out.absolute()
    refuse_existing(out, arguments.force, CONFIG)
    trained = run_config(model)
    config = _with_padding(read_model_config(model), trained, model, arguments.vocab_padding)
    origins = _origins(model)
    inherited = _inherited_config(origins)
    family = choose_family(config, inherited.get("model_type"))
    export = Export.open(model, config, huggingface_rules(config, family), arguments.dtype)
    positions = _max_positions(arguments.max_positions, config, trained, inherited, model)
    stated = write_architecture(config, family, positions, export.dtype_name)
    if inherited.get("model_type") != family.model_type:
        inherited = {"bos_token_id": None, "eos_token_id": None}  # else transformers takes its class's, such as 50256
    tokenizer = _tokenizer_files(arguments.tokenizer, origins)
    generation = find_files([path / "huggingface" for path in origins], [GENERATION_CONFIG])
    with output_directory(out, export.nbytes, arguments.force) as directory:
        SafetensorsWriter(directory, export.tensors, int(arguments.max_shard_gb * 1e9)).write(export.arrays())
        (directory / CONFIG).write_text(json.dumps(inherited | stated, indent=2, sort_keys=True) + "\n")
        copy_files(tokenizer | generation, directory)
    size = f"{len(export.tensors)} tensors, {export.nbytes / 1e9:.2f} GB, {export.dtype_name}"
    print(f"wrote {out}: {family.architecture}, {size}")
    if not tokenizer:
        print("no tokenizer files were found for it; --tokenizer DIR copies them from DIR")


def _with_padding(config: ModelConfig, trained: Config | None, model: Path, choice: str | None) -> ModelConfig:
    """Returns the configuration with or without padded rows. Raises UserError if they were trained without a choice."""
    rows = config.vocab_rows
    if choice is None and trained is not None and trained.loss.include_vocab_padding and rows > config.vocab_size:
        raise UserError(
            f"{model} was trained with loss.include_vocab_padding: its softmax ran over {rows} rows, of which "
            f"{config.vocab_size} are the vocabulary. Pass --vocab-padding keep to write all of them, or "
            "--vocab-padding strip to leave out the padding"
        )
    if choice == "keep":
        return dataclasses.replace(config, vocab_size=rows, padded_vocab_size=rows)
    return dataclasses.replace(config, padded_vocab_size=config.vocab_size)


def _origins(model: Path) -> list[Path]:
    """Returns the model, the one that it was initialised from, and so on: where tokenizer files may be."""
    found: list[Path] = [model]
    while len(found) < MOST_ORIGINS:
        run = run_config(found[-1])
        if run is None or run.model.init_from is None:
            break
        found.append(Path(run.model.init_from))
    return found


def _inherited_config(origins: list[Path]) -> dict[str, Any]:
    """Returns the config.json that the model came with; empty if it never had one."""
    found = find_files([path / "huggingface" for path in origins], [CONFIG])
    return read_json(found[CONFIG]) if found else {}


def _tokenizer_files(given: Path | None, origins: list[Path]) -> dict[str, Path]:
    if given is None:
        return find_files([path / "tokenizer" for path in origins], TOKENIZER_FILES)
    found = find_files([given], TOKENIZER_FILES)
    if not found:
        raise UserError(f"--tokenizer {given}: it holds none of {', '.join(TOKENIZER_FILES)}")
    return found


def _max_positions(
    given: int | None, config: ModelConfig, trained: Config | None, inherited: Mapping[str, Any], model: Path
) -> int:
    """Returns the longest sequence: of learned positions, as given, the source's, else the training data's."""
    known = inherited.get("max_position_embeddings") or (trained.data.sequence_length if trained else None)
    if config.max_positions is not None or given is not None or known is not None:
        return config.max_positions or given or known or 0
    raise UserError(f"{model} does not state its longest sequence; give --max-positions N")
