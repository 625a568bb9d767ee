"""Converts a Megatron-LM, NeMo or Megatron-Bridge GPT checkpoint to a kdjax model directory.

IN is one of
  a directory with latest_checkpointed_iteration.txt, or one of its iter_XXXXXXX/ or release/ directories:
      torch_dist (stacked or per-layer), or torch (any tensor, pipeline and virtual pipeline parallelism);
  a .nemo file (read in place) or the directory it was unpacked to;
  a directory of Megatron-Bridge (run_config.yaml) or NeMo 2 (weights/, context/).
Neither torch nor Megatron is needed, and nothing in the checkpoint's pickles is run.

OUT gets model_config.json, params/ (an Orbax checkpoint) and provenance.json, all or nothing. Load it with
kdjax.checkpoint.load_model(OUT) or train from it with --config.model.init_from=OUT.

The architecture is read from the checkpoint and printed. Every tensor must fit it, and none may be left over.
--arch gives values that the checkpoint does not state (often the true vocabulary) or states wrongly:

  python -m kdjax.convert from-megatron checkpoints/my_gpt my_gpt --arch vocab_size=50257
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdjax.checkpoint.model_directory import MODEL_CONFIG
from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, add_import_arguments, format_table, resolve
from kdjax.convert.conversion import Conversion, match_tensors
from kdjax.convert.megatron.checkpoint import open_checkpoint
from kdjax.convert.megatron.rules import EMBEDDING, SKIP, UNEMBEDDING, megatron_rules
from kdjax.convert.model_writer import write_model
from kdjax.convert.output_directory import refuse_existing
from kdjax.convert.tensors import Tensors, same_bits
from kdjax.types import UserError

TIED_COPY = {"last pipeline stage's copy of the tied embedding": UNEMBEDDING.replace(".", r"\.")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_import_arguments(parser, "the checkpoint: a directory or a .nemo file")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    convert(arguments.source, arguments.out, arguments.arch, force=arguments.force)


def convert(source: Path, out: Path, arch: Sequence[str] = (), *, force: bool = False) -> Conversion:
    """Converts `source` to the model directory `out` and returns what was converted.

    `arch` overrides values of the architecture, as "key=value". Raises UserError, and leaves nothing behind, when the
    checkpoint is damaged or does not fit its architecture.
    """
    refuse_existing(out, force, MODEL_CONFIG)
    checkpoint = open_checkpoint(source)
    config, values = resolve(_with_vocabulary(checkpoint.stated), arch)
    print(f"{source}: {checkpoint.format}, iteration {checkpoint.iteration}\n{format_table(values)}")
    tensors = checkpoint.read_tensors(config)
    skip = SKIP | _tied_copy(tensors, config)
    conversion = match_tensors(megatron_rules(config), tensors, config, skip, str(source))
    provenance = {
        "source": source.resolve().name,
        "format": checkpoint.format,
        "iteration": checkpoint.iteration,
        "architecture_from": {key: found.origin for key, found in values.items()},
    }
    write_model(out, conversion, provenance, force=force)
    for kind, count in conversion.skipped.items():
        print(f"skipped: {count} x {kind}")
    print(f"wrote {out}: {len(conversion.shapes)} parameter arrays, {conversion.nbytes / 1e9:.3f} GB")
    return conversion


def _with_vocabulary(stated: Mapping[str, Stated]) -> dict[str, Stated]:
    """Takes the padded vocabulary for the true one if nothing states that. The model then can sample padding."""
    if "vocab_size" in stated or "padded_vocab_size" not in stated:
        return dict(stated)
    padded = stated["padded_vocab_size"].value
    return dict(stated) | {"vocab_size": Stated(padded, "NOT STATED: padded_vocab_size; give --arch vocab_size=...")}


def _tied_copy(tensors: Tensors, config: ModelConfig) -> dict[str, str]:
    """Returns what to skip for a tied embedding: the last pipeline stage's copy. Raises UserError if it differs."""
    embedding, copy = tensors.get(EMBEDDING), tensors.get(UNEMBEDDING)
    if not config.tied or embedding is None or copy is None:
        return {}
    if not same_bits(embedding, copy):
        raise UserError(
            f"{UNEMBEDDING} {copy.shape} in {copy.label} differs from {EMBEDDING} {embedding.shape} in "
            f"{embedding.label}, but the architecture says that they are tied; try --arch tied=false"
        )
    return TIED_COPY
