"""A Hugging Face checkpoint (Llama, Qwen2, Qwen3, Mistral, GPT-2; SmolLM2 is a Llama) as a kdjax model directory.

IN is a directory with config.json and safetensors files, single or sharded, as `save_pretrained` writes and
`hf download NAME --local-dir IN` fetches. Tokenizer files go to OUT/tokenizer/, config.json and generation_config.json
to OUT/huggingface/, so that `to-hf` can give them back.
"""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path

from kdjax.config import ModelConfig
from kdjax.convert import rules
from kdjax.convert.architecture import Stated, add_arch_argument, settle, table
from kdjax.convert.huggingface import files
from kdjax.convert.huggingface.families import Family, family_of, stated
from kdjax.convert.huggingface.rules import SKIPPED, prefix
from kdjax.convert.huggingface.rules import rules as family_rules
from kdjax.convert.model_writer import refuse_existing, write_model
from kdjax.convert.tensors import Source, StoredTensor, equal
from kdjax.types import UserError

HEAD, TIED_HEAD = "lm_head.weight", "copies of the embedding"
EMBEDDING = {"gpt2": "transformer.wte.weight"}
BESIDE = (files.CONFIG, "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("checkpoint", metavar="IN", type=Path, help="directory with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="model directory to be written")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")
    parser.add_argument(
        "--full-attention", action="store_true", help="take a sliding window for attention to everything before"
    )
    add_arch_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads, checks, prints the architecture, converts."""
    directory, out = arguments.checkpoint, arguments.out
    refuse_existing(out, arguments.force)
    source = files.read_checkpoint(directory)
    where = str(directory / files.CONFIG)
    settings = files.read_json(directory / files.CONFIG)
    family = family_of(settings, where)
    said = stated(settings, family, where, full_attention=arguments.full_attention)
    tokenizer = files.copied([directory], files.TOKENIZER_FILES)
    if "tokenizer.json" in tokenizer:
        digest = hashlib.sha256(tokenizer["tokenizer.json"].read_bytes()).hexdigest()
        said["tokenizer_sha256"] = Stated(digest, "tokenizer.json")
    config, origins = settle(said, arguments.arch)
    print(f"{directory}: {family.architecture}\n{table(origins)}")
    what = f"{directory} ({family.architecture})"
    plan = plan_of(source, config, family, what)
    provenance = {"format": "huggingface", "source": directory.resolve().name, "architecture": family.architecture}
    along = {f"tokenizer/{name}": path for name, path in tokenizer.items()}
    along |= {f"huggingface/{name}": path for name, path in files.copied([directory], BESIDE).items()}
    write_model(out, plan, provenance, files=along, force=arguments.force)
    print(f"{out}: {plan.nbytes / 1e9:.2f} GB of parameters, {len(along)} other files")


def plan_of(source: Source, config: ModelConfig, family: Family, what: str) -> rules.Plan:
    """The checked plan of a conversion. Raises UserError where the checkpoint does not fit the architecture."""
    source = _prefixed(source, prefix(family))
    skip = dict(SKIPPED)
    if config.tied and HEAD in source:
        _check_copy(source, EMBEDDING.get(family.model_type, "model.embed_tokens.weight"), what)
        skip[TIED_HEAD] = HEAD.replace(".", r"\.")
    return rules.plan(family_rules(config, family), source, config, skip, what)


def _prefixed(source: Source, start: str) -> Source:
    """The tensors under the names of the model with its head, where the base model's were stored."""
    if any(name.startswith(start) for name in source):
        return source
    return {name if name == HEAD else start + name: tensor for name, tensor in source.items()}


def _check_copy(source: Mapping[str, StoredTensor], embedding: str, what: str) -> None:
    """Raises UserError unless the stored head is the embedding that it is tied to, to the bit."""
    if embedding not in source:
        return  # which `plan` will tell
    if not equal(source[HEAD], source[embedding]):
        raise UserError(
            f"{what}: tie_word_embeddings is true, but {HEAD} differs from {embedding}; if the head is to be used, "
            "convert with --arch tied=False"
        )
