"""Fixtures that the converters' tests share."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from models import HF_GOLDENS

from kdjax.convert.__main__ import main


@pytest.fixture(scope="session")
def converted_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the model directory of a golden Hugging Face checkpoint, which is converted once. Do not change it."""
    root = tmp_path_factory.mktemp("hf")

    def converted(name: str) -> Path:
        if not (root / name).exists():
            with contextlib.redirect_stdout(io.StringIO()):
                main(["from-hf", str(HF_GOLDENS / name), str(root / name)])
        return root / name

    return converted
