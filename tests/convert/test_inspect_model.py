"""`verify` and `inspect`: what they print and when they say no."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax.checkpoint import load_model, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.model import init_params, param_shapes
from kdjax.types import UserError

GOLDEN = Path(__file__).parent.parent / "fixtures" / "hf" / "qwen2"
TOKENS = np.arange(14).reshape(2, 7)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    main(["from-hf", str(GOLDEN), str(tmp_path / "model")])
    return tmp_path / "model"


def verify(model: Path, tmp_path: Path, *words: str, **arrays: np.ndarray) -> int:
    np.savez(tmp_path / "file.npz", **arrays)
    return main(["verify", str(model), "--logits", str(tmp_path / "file.npz"), *words])


def test_verify_agrees_with_transformers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), "--logits", str(GOLDEN / "logits.npz")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "same top token at 100.00% of positions: within 2e-05" in last


def test_verify_says_no_beyond_the_tolerance(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits = np.array(load_model(model)(TOKENS))
    logits[1, 3] = -logits[1, 3]  # another first choice at one of 14 positions
    assert verify(model, tmp_path, input_ids=TOKENS, logits=logits) == 1
    assert "same top token at 92.86% of positions: NOT WITHIN 2e-05" in capsys.readouterr().out
    assert verify(model, tmp_path, "--tolerance=100", input_ids=TOKENS, logits=logits) == 0
    assert (
        verify(model, tmp_path, "--tolerance=100", input_ids=TOKENS, logits=np.where(logits > 3, np.nan, logits)) == 1
    )


def test_verify_uses_the_positions_and_the_dtype(model: Path, tmp_path: Path) -> None:
    positions = np.tile([0, 1, 2, 0, 1, 5, 9], (2, 1))
    logits = np.asarray(load_model(model)(TOKENS, positions))
    assert verify(model, tmp_path, input_ids=TOKENS, logits=logits, positions=positions) == 0
    assert verify(model, tmp_path, input_ids=TOKENS, logits=logits) == 1
    both = ("--dtype=bfloat16", "--tolerance=2e-5")
    assert verify(model, tmp_path, *both, input_ids=TOKENS, logits=logits, positions=positions) == 1
    assert verify(model, tmp_path, both[0], input_ids=TOKENS, logits=logits, positions=positions) == 0


def test_verify_takes_padded_columns(tmp_path: Path) -> None:
    config = ModelConfig(layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=61, padded_vocab_size=64, dtype="float32")
    save_model(tmp_path / "model", config, init_params(config, 0))
    padded = dataclasses.replace(config, vocab_size=64)
    save_model(tmp_path / "padded", padded, init_params(config, 0))
    logits = np.asarray(load_model(tmp_path / "padded")(TOKENS))
    assert logits.shape[-1] == 64
    assert verify(tmp_path / "model", tmp_path, input_ids=TOKENS, logits=logits) == 0
    assert verify(tmp_path / "model", tmp_path, input_ids=TOKENS, logits=logits[..., :61]) == 0
    with pytest.raises(UserError, match=r"logits \(2, 7, 60\); they must be .* V = 61 or 64"):
        verify(tmp_path / "model", tmp_path, input_ids=TOKENS, logits=logits[..., :60])


def test_files_that_verify_cannot_use(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file.npz holds logits; it must hold input_ids and logits"):
        verify(model, tmp_path, logits=TOKENS)
    with pytest.raises(UserError, match=r"positions \(2, 6\) must have input_ids' shape, \(2, 7\)"):
        verify(model, tmp_path, input_ids=TOKENS, logits=np.zeros((2, 7, 101)), positions=TOKENS[:, 1:])
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UserError, match=r"text.npz cannot be read as an .npz file"):
        main(["verify", str(model), "--logits", str(tmp_path / "text.npz")])
    with pytest.raises(UserError, match=r"absent.npz cannot be read as an .npz file"):
        main(["verify", str(model), "--logits", str(tmp_path / "absent.npz")])


def test_inspect_prints_the_tree_and_checks_the_digests(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(read_model_config(model))))
    assert f"{count:,} parameters in 15 arrays" in out
    for words in (
        "layers/attn/k/kernel",
        "(3, 24, 2, 6)",
        "format               huggingface",
        "qkv_bias             True",
    ):
        assert words in out
    assert out.count("digest correct") == 15
    assert main(["inspect", str(model), "--no-digests"]) == 0
    assert "digest" not in capsys.readouterr().out


def test_inspect_finds_a_changed_and_a_damaged_array(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = model / "params" / "layers.mlp.up.kernel" / "1.0.0"
    other = (model / "params" / "layers.mlp.up.kernel" / "2.0.0").read_bytes()
    chunk.write_bytes(other)
    assert main(["inspect", str(model)]) == 1
    assert "differs from provenance.json: layers/mlp/up/kernel; convert the model again" in capsys.readouterr().out
    chunk.write_bytes(other[:50])
    assert main(["inspect", str(model)]) == 1
    assert "layers/mlp/up/kernel cannot be read" in capsys.readouterr().out
    # In a process of its own: Orbax leaves reads that it gave up on behind, which Python warns of when it finds them.
    code = f"from kdjax.checkpoint import load_model; load_model({str(model)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"UserError: .*params are damaged or incomplete: (.|\n)*layers.mlp.up.kernel", done.stderr)


def test_inspect_reads_what_no_converter_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=61)
    save_model(tmp_path / "model", config, init_params(config, 0))
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "no provenance.json" in capsys.readouterr().out
