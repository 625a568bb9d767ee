"""The architecture of a checkpoint: where each value came from, what the user changed, and a table that shows it."""

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.checkpoint.model_directory import FREE_KEYS
from kdjax.config import ModelConfig, build
from kdjax.config.validate import resolve_model, validate_model
from kdjax.types import UserError

KEYS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name not in FREE_KEYS)
NEEDED = ("layers", "d_model", "n_heads", "d_ff", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Stated:
    """A value and what states it, such as "args.num_layers"."""

    value: Any
    by: str


def add_arch_argument(parser: argparse.ArgumentParser) -> None:
    """`--arch key=value`, any number of times."""
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="state a value of the architecture in place of the checkpoint's, e.g. --arch vocab_size=50257; "
        f"may be given again and again. Keys: {', '.join(KEYS)}",
    )


def settle(stated: Mapping[str, Stated], words: Sequence[str]) -> tuple[ModelConfig, dict[str, Stated]]:
    """The architecture from what the checkpoint states and `--arch` words, which win; and the origin of each value.

    Raises UserError for a word that is no known key=value and for values that cannot be together.
    """
    overrides = dict(_parsed(word) for word in words)
    known = {key: found for key, found in stated.items() if key not in overrides}
    unstated = [key for key in NEEDED if key not in known and key not in overrides]
    if unstated:
        raise UserError(f"the checkpoint does not state {', '.join(unstated)}; give --arch {unstated[0]}=... and so on")
    try:
        built = build(
            {"model": {key: found.value for key, found in known.items()}},
            {f"model.{key}": text for key, text in overrides.items()},
        )
        model = resolve_model(built.model)
        validate_model(model)
    except UserError as error:
        raise UserError(f"this architecture cannot be: {error}. State other values with --arch KEY=VALUE") from error
    origins = dict.fromkeys(KEYS, "default") | {key: found.by for key, found in known.items()}
    origins |= {key: f"--arch {key}={text}" for key, text in overrides.items()}
    return model, {key: Stated(getattr(model, key), by) for key, by in origins.items()}


def _parsed(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not equals:
        raise UserError(f"--arch {word}: write --arch KEY=VALUE; keys are {', '.join(KEYS)}")
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--arch {word}: there is no such key; {hint}Keys are {', '.join(KEYS)}")
    return key, text


def table(origins: Mapping[str, Stated]) -> str:
    """One line a value: key, value, origin."""
    rows = [(key, str(found.value), found.by) for key, found in origins.items()]
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {key:<{key_width}}  {value:<{value_width}}  {by}" for key, value, by in rows)
