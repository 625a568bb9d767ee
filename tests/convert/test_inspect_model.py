"""`inspect` prints a model and checks the digests of its parameters."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from models import save_random_model

from kdjax.checkpoint import read_model_config
from kdjax.config import ModelConfig
from kdjax.convert import inspect_model
from kdjax.convert.__main__ import main
from kdjax.model import param_shapes


@pytest.fixture
def model(converted_hf: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(converted_hf("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def test_it_prints_the_model_and_checks_the_digests(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [str(model / "params")] in lines
    for line in (
        "format huggingface",
        "qkv_bias True",
        "layers 3",
        "layers/attn/k/kernel float32 (3, 24, 2, 6) 0.00 MB digest correct",
        "embed float32 (101, 24) 0.01 MB digest correct",
    ):
        assert line.split() in lines
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(read_model_config(model))))
    assert out.splitlines()[-1] == f"  {count:,} parameters in 15 arrays, {4 * count / 1e9:.3f} GB"
    assert out.count("digest correct") == 15
    assert main(["inspect", str(model), "--no-digests"]) == 0
    assert "digest" not in capsys.readouterr().out


def test_digests_are_computed_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, and `HASHED_ROWS` rows of what lies outside the layers, the last ones fewer."""
    monkeypatch.setattr(inspect_model, "HASHED_ROWS", 10)
    read, sizes = inspect_model.StoredArray.read, []

    def counted(array: inspect_model.StoredArray, index: tuple[slice, ...]) -> np.ndarray:
        found = read(array, index)
        sizes.append((array.name, len(found)))
        return found

    monkeypatch.setattr(inspect_model.StoredArray, "read", counted)
    assert main(["inspect", str(model)]) == 0
    assert [size for name, size in sizes if name == "embed"] == [10] * 10 + [1]
    assert [size for name, size in sizes if name == "layers/mlp/up/kernel"] == [1, 1, 1]


def test_it_finds_changed_and_damaged_arrays(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = model / "params" / "layers.mlp.up.kernel" / "1.0.0"
    other = (model / "params" / "layers.mlp.up.kernel" / "2.0.0").read_bytes()
    chunk.write_bytes(other)
    assert main(["inspect", str(model)]) == 1
    out = capsys.readouterr().out
    assert out.count("digest correct") == 14
    assert out.count("DIGEST WRONG") == 1
    assert out.splitlines()[-1] == "differs from provenance.json: layers/mlp/up/kernel; convert the model again"
    chunk.write_bytes(other[:50])
    assert main(["inspect", str(model)]) == 1
    assert "DAMAGED: " in (out := capsys.readouterr().out)
    assert "layers/mlp/up/kernel cannot be read" in out


def test_loading_a_damaged_array(model: Path) -> None:
    """In a process of its own: Orbax leaves reads behind when one fails, and Python warns when it collects them."""
    chunk = model / "params" / "layers.mlp.up.kernel" / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:50])
    code = f"from kdjax.checkpoint import load_model; load_model({str(model)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"UserError: .*params are damaged or incomplete: (.|\n)*layers.mlp.up.kernel", done.stderr)


def test_it_compares_with_what_is_recorded(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = json.loads((model / "provenance.json").read_text())
    leaves = provenance["leaves"]
    del leaves["embed"]
    leaves["unembed"]["dtype"] = "bfloat16"
    leaves["final_norm/scale"]["shape"] = [25]
    leaves["gone"] = leaves["unembed"]
    (model / "provenance.json").write_text(json.dumps(provenance))
    assert main(["inspect", str(model)]) == 1
    out = capsys.readouterr().out
    for verdict in ("NOT RECORDED", "RECORDED AS bfloat16 (101, 24)", "RECORDED AS float32 (25,)"):
        assert out.count(verdict) == 1
    last = "differs from provenance.json: embed, final_norm/scale, unembed, gone; convert the model again"
    assert out.splitlines()[-1] == last


def test_it_prints_what_no_converter_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_model(tmp_path / "model", ModelConfig(layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=61))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "\nno provenance.json: not written by a converter\n" in out
    assert "digest" not in out
