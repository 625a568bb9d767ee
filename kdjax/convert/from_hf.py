"""Converts a Hugging Face checkpoint (Llama, SmolLM2, Qwen2, Qwen3, Mistral, GPT-2) to a kdjax model directory.

IN is a directory with config.json and safetensors files, single or sharded, as `save_pretrained` writes and
`hf download NAME --local-dir IN` fetches. Tokenizer files are copied to OUT/tokenizer/, config.json and
generation_config.json to OUT/huggingface/, so that `to-hf` can restore them.
"""

import argparse
import hashlib

from kdjax.checkpoint.model_directory import MODEL_CONFIG
from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, add_import_arguments, format_table, resolve
from kdjax.convert.conversion import Conversion, match_tensors
from kdjax.convert.huggingface.companion_files import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, find_files, read_json
from kdjax.convert.huggingface.config_json import read_architecture
from kdjax.convert.huggingface.families import Family, family_of
from kdjax.convert.huggingface.rules import SKIP, UNEMBEDDING, embedding_name, huggingface_rules, prefix
from kdjax.convert.huggingface.safetensors_files import read_tensors
from kdjax.convert.model_writer import write_model
from kdjax.convert.output_directory import refuse_existing
from kdjax.convert.tensors import Tensors, same_bits
from kdjax.types import UserError

TIED_COPY = {"copies of the embedding": UNEMBEDDING.replace(".", r"\.")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_import_arguments(parser, "the checkpoint: a directory with config.json and safetensors files")
    parser.add_argument(
        "--full-attention",
        action="store_true",
        help="accept sliding-window attention but attend to all earlier tokens",
    )


def run(arguments: argparse.Namespace) -> None:
    """Reads and checks the checkpoint, prints its architecture and writes the model directory."""
    directory, out = arguments.source, arguments.out
    refuse_existing(out, arguments.force, MODEL_CONFIG)
    tensors = read_tensors(directory)
    settings, source = read_json(directory / CONFIG), str(directory / CONFIG)
    family = family_of(settings, source)
    stated = read_architecture(settings, family, source, full_attention=arguments.full_attention)
    tokenizer = find_files([directory], TOKENIZER_FILES)
    if "tokenizer.json" in tokenizer:
        digest = hashlib.sha256(tokenizer["tokenizer.json"].read_bytes()).hexdigest()
        stated["tokenizer_sha256"] = Stated(digest, "tokenizer.json")
    config, values = resolve(stated, arguments.arch)
    print(f"{directory}: {family.architecture}\n{format_table(values)}")
    conversion = _match(tensors, config, family, f"{directory} ({family.architecture})")
    provenance = {"format": "huggingface", "source": directory.resolve().name, "architecture": family.architecture}
    files = {f"tokenizer/{name}": path for name, path in tokenizer.items()}
    configs = find_files([directory], (CONFIG, GENERATION_CONFIG))
    files |= {f"huggingface/{name}": path for name, path in configs.items()}
    write_model(out, conversion, provenance, files=files, force=arguments.force)
    print(f"wrote {out}: {conversion.nbytes / 1e9:.2f} GB of parameters, {len(files)} other files")


def _match(tensors: Tensors, config: ModelConfig, family: Family, checkpoint: str) -> Conversion:
    """Matches the tensors with the architecture. Raises UserError when they do not fit."""
    tensors, skip = _with_prefix(tensors, prefix(family)), dict(SKIP)
    embedding = embedding_name(family)
    if config.tied and UNEMBEDDING in tensors:
        if embedding in tensors and not same_bits(tensors[UNEMBEDDING], tensors[embedding]):
            raise UserError(
                f"{checkpoint}: tie_word_embeddings is true, but {UNEMBEDDING} differs from {embedding}; to use it, "
                "convert with --arch tied=False"
            )
        skip |= TIED_COPY
    return match_tensors(huggingface_rules(config, family), tensors, config, skip, checkpoint)


def _with_prefix(tensors: Tensors, start: str) -> Tensors:
    """Returns the tensors under the names of the causal LM, if they were saved from the base model."""
    if any(name.startswith(start) for name in tensors):
        return tensors
    return {name if name == UNEMBEDDING else start + name: tensor for name, tensor in tensors.items()}
