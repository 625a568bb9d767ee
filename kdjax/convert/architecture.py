"""The architecture of a checkpoint: what states each value, what the user overrides, and a table to print."""

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.checkpoint.model_directory import FREE_KEYS
from kdjax.config import ModelConfig, build
from kdjax.config.validate import resolve_model, validate_model
from kdjax.types import UserError

KEYS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in FREE_KEYS)
REQUIRED = ("layers", "d_model", "n_heads", "d_ff", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Stated:
    """A value and what states it, such as "args: num_layers 4"."""

    value: Any
    origin: str


def add_import_arguments(parser: argparse.ArgumentParser, source_help: str) -> None:
    """Adds the arguments of every command that writes a model directory."""
    parser.add_argument("source", metavar="IN", type=Path, help=source_help)
    parser.add_argument("out", metavar="OUT", type=Path, help="the model directory to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the checkpoint's architecture, e.g. --arch vocab_size=50257; may be repeated. "
        f"Keys: {', '.join(KEYS)}",
    )


def resolve(stated: Mapping[str, Stated], overrides: Sequence[str]) -> tuple[ModelConfig, dict[str, Stated]]:
    """Returns the architecture that a checkpoint states and "key=value" overrides change, and each value's origin.

    Raises UserError for an override that is no known key=value and for values that contradict each other.
    """
    changes = dict(_parse(override) for override in overrides)
    kept = {key: found for key, found in stated.items() if key not in changes}
    unstated = [key for key in REQUIRED if key not in kept and key not in changes]
    if unstated:
        raise UserError(f"the checkpoint does not state {', '.join(unstated)}; give --arch {unstated[0]}=... and so on")
    try:
        built = build(
            {"model": {key: found.value for key, found in kept.items()}},
            {f"model.{key}": text for key, text in changes.items()},
        )
        model = resolve_model(built.model)
        validate_model(model)
    except UserError as error:
        raise UserError(f"the architecture is invalid: {error}. Correct it with --arch KEY=VALUE") from error
    origins = dict.fromkeys(KEYS, "default") | {key: found.origin for key, found in kept.items()}
    origins |= {key: f"--arch {key}={text}" for key, text in changes.items()}
    return model, {key: Stated(getattr(model, key), origin) for key, origin in origins.items()}


def _parse(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--arch {override}: write --arch KEY=VALUE; keys are {', '.join(KEYS)}")
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--arch {override}: there is no such key; {hint}Keys are {', '.join(KEYS)}")
    return key, text


def format_table(values: Mapping[str, Stated]) -> str:
    """Returns one line for each value: key, value and origin."""
    rows = [(key, str(found.value), found.origin) for key, found in values.items()]
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows)
