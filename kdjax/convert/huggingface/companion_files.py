"""The files of a Hugging Face checkpoint beside its tensors: its configuration and its tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.types import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "tekken.json",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object; it holds a {type(found).__name__}")
    return found


def find_files(directories: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """Returns the files that exist of these names, by name, from the first directory that has any."""
    for directory in directories:
        found = {name: directory / name for name in names if (directory / name).is_file()}
        if found:
            return found
    return {}


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    """Copies each file into a directory under its name."""
    for name, path in files.items():
        shutil.copyfile(path, directory / name)
