"""Converts a Megatron-LM, NeMo or Megatron-Bridge GPT checkpoint to a kdjax model directory.

IN is one of
  a directory with latest_checkpointed_iteration.txt, or one of its iter_XXXXXXX/ or release/ directories:
      torch_dist (stacked or per-layer), or torch (any tensor, pipeline and virtual pipeline parallelism);
  a .nemo file (read in place) or the directory it was unpacked to;
  a directory of Megatron-Bridge (run_config.yaml) or NeMo 2 (weights/, context/).
Neither torch nor Megatron is needed, and nothing in the checkpoint's pickles is run.

OUT gets model_config.json, params/ (an Orbax checkpoint) and provenance.json, all or nothing. Load it with
kdjax.checkpoint.load_model(OUT) or train from it with --config.model.init_from=OUT.

The architecture is read from the checkpoint and printed; every tensor must fit it, and none may be left over.
Values that the checkpoint does not state (often the true vocabulary) or states wrongly are given by --arch:

  python -m kdjax.convert from-megatron checkpoints/my_gpt my_gpt --arch vocab_size=50257
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, add_arch_argument, settle, table
from kdjax.convert.megatron import layout
from kdjax.convert.megatron.rules import SKIP, rules
from kdjax.convert.model_writer import refuse_existing, write_model
from kdjax.convert.rules import Plan, plan
from kdjax.convert.tensors import StoredTensor, equal
from kdjax.types import UserError

TIED_COPY = {"last pipeline stage's copy of the tied embedding": r"output_layer\.weight"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("source", metavar="IN", type=Path, help="the checkpoint: a directory or a .nemo file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the model directory to write")
    add_arch_argument(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory already")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    convert(arguments.source, arguments.out, arguments.arch, force=arguments.force)


def convert(source: Path, out: Path, arch: list[str] | tuple[str, ...] = (), *, force: bool = False) -> Plan:
    """Converts `source` to the model directory `out`; `arch` are words key=value. Returns what was written.

    Raises UserError, and leaves nothing behind, when the checkpoint is damaged or does not fit its architecture.
    """
    refuse_existing(out, force)
    checkpoint = layout.find(source)
    config, origins = settle(_with_vocabulary(checkpoint.stated), arch)
    print(f"{source}: {checkpoint.format}, iteration {checkpoint.iteration}\n{table(origins)}")
    tensors = checkpoint.read(config)
    fitted = plan(rules(config), tensors, config, SKIP | _tied_copy(tensors, config), str(source))
    provenance = {
        "source": source.resolve().name,
        "format": checkpoint.format,
        "iteration": checkpoint.iteration,
        "architecture_from": {key: found.by for key, found in origins.items()},
    }
    write_model(out, fitted, provenance, force=force)
    for kind, count in fitted.skipped.items():
        print(f"left out: {count} x {kind}")
    print(f"wrote {out}: {len(fitted.shapes)} leaves, {fitted.nbytes / 1e9:.3f} GB")
    return fitted


def _with_vocabulary(stated: Mapping[str, Stated]) -> dict[str, Stated]:
    """A true vocabulary that is not stated is taken to be the padded one, which trains but samples padding."""
    if "vocab_size" in stated or "padded_vocab_size" not in stated:
        return dict(stated)
    padded = stated["padded_vocab_size"].value
    return dict(stated) | {"vocab_size": Stated(padded, "NOT STATED: padded_vocab_size; give --arch vocab_size=...")}


def _tied_copy(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, str]:
    """Lets the last stage's copy of a tied embedding be left out, if it is one."""
    embedding, copy = tensors.get(layout.EMBEDDING), tensors.get("output_layer.weight")
    if not config.tied or embedding is None or copy is None:
        return {}
    if not equal(embedding, copy):
        raise UserError(
            f"output_layer.weight {copy.shape} in {copy.where} differs from {layout.EMBEDDING} {embedding.shape} in "
            f"{embedding.where}, and the architecture says that they are one; is it --arch tied=false?"
        )
    return TIED_COPY
