import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_scratch_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices and decompressed files of one test are not seen by another."""
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch
