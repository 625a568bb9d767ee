"""provenance.json: what a converted checkpoint was made from, and by which version of kdjax."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from kdjax.types import UserError

PROVENANCE = "provenance.json"


def write_provenance(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes provenance.json into a directory."""
    (directory / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")


def read_provenance(directory: Path) -> dict[str, Any]:
    """Returns the content of a directory's provenance.json; empty if it has none."""
    path = directory / PROVENANCE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; convert the model again") from error


def kdjax_version() -> str:
    """Returns the installed version."""
    try:
        return metadata.version("kdjax")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
