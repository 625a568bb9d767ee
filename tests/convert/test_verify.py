"""`verify` compares logits: what it prints, when its exit code is 1, and the files that it cannot use."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import HF_GOLDENS, logits, save_random_model

from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.types import UserError

TOKENS = np.arange(14).reshape(2, 7)
PADDED = ModelConfig(layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=61, padded_vocab_size=64, dtype="float32")


@pytest.fixture
def model(converted_hf: Callable[[str], Path]) -> Path:
    return converted_hf("qwen2")


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    save_random_model(tmp_path / "model", PADDED)
    return tmp_path / "model"


def verify(model: Path, tmp_path: Path, *words: str, **arrays: np.ndarray) -> int:
    np.savez(tmp_path / "file.npz", **arrays)
    return main(["verify", str(model), "--logits", str(tmp_path / "file.npz"), *words])


def test_it_agrees_with_transformers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), "--logits", str(HF_GOLDENS / "qwen2" / "logits.npz")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        rf"{model}: largest difference [\de.-]+, mean [\de.-]+, same top token at 100.00% of positions: within 2e-05",
        last,
    )


def test_it_measures_the_difference(padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = logits(padded, TOKENS)
    changed = exact.copy()
    changed[0, 2, 1] += 3  # one of 2 * 7 * 61
    changed[1, 3] = -changed[1, 3]  # another top token at one of 14 positions
    assert verify(padded, tmp_path, input_ids=TOKENS, logits=changed) == 1
    apart = np.abs(changed.astype(np.float64) - exact)
    found = re.search(r"largest difference (\S+), mean (\S+), same top token at (\S+)% of", capsys.readouterr().out)
    assert found is not None
    np.testing.assert_allclose([float(found[1]), float(found[2])], [apart.max(), apart.mean()], rtol=0.01)
    agreement = (changed.argmax(-1) == exact.argmax(-1)).mean()
    assert 0.8 < agreement < 1
    assert float(found[3]) == round(100 * agreement, 2)


def test_the_tolerance(padded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = logits(padded, TOKENS)
    changed = exact.copy()
    changed[1, 3, 5] += 4e-5
    assert verify(padded, tmp_path, input_ids=TOKENS, logits=changed) == 1
    assert ": NOT WITHIN 2e-05" in capsys.readouterr().out
    for tolerance, code in (("5e-5", 0), ("3e-5", 1), ("0", 1)):
        assert verify(padded, tmp_path, f"--tolerance={tolerance}", input_ids=TOKENS, logits=changed) == code
    for value in (np.nan, np.inf):
        changed[0, 0, 0] = value
        assert verify(padded, tmp_path, "--tolerance=100", input_ids=TOKENS, logits=changed) == 1


def test_it_uses_the_positions_and_the_dtype(model: Path, tmp_path: Path) -> None:
    positions = np.tile([0, 1, 2, 0, 1, 5, 9], (2, 1))
    exact = logits(model, TOKENS, positions)
    assert verify(model, tmp_path, input_ids=TOKENS, logits=exact, positions=positions) == 0
    assert verify(model, tmp_path, input_ids=TOKENS, logits=exact) == 1
    words = ("--dtype=bfloat16", "--tolerance=2e-5")
    assert verify(model, tmp_path, *words, input_ids=TOKENS, logits=exact, positions=positions) == 1
    assert verify(model, tmp_path, words[0], input_ids=TOKENS, logits=exact, positions=positions) == 0


def test_it_compares_padded_columns_if_they_are_given(padded: Path, tmp_path: Path) -> None:
    params = save_random_model(tmp_path / "whole", PADDED)
    exact = logits(padded, TOKENS)
    assert exact.shape[-1] == 61
    config = (tmp_path / "whole" / "model_config.json").read_text()
    (tmp_path / "whole" / "model_config.json").write_text(config.replace('"vocab_size": 61', '"vocab_size": 64'))
    whole = logits(tmp_path / "whole", TOKENS)
    assert (whole.shape[-1], params["embed"].shape[0]) == (64, 64)
    assert verify(padded, tmp_path, input_ids=TOKENS, logits=whole) == 0
    assert verify(padded, tmp_path, input_ids=TOKENS, logits=whole[..., :61]) == 0
    whole[0, 0, 63] += 1
    assert verify(padded, tmp_path, input_ids=TOKENS, logits=whole) == 1
    with pytest.raises(UserError, match=r"logits \(2, 7, 60\); they must be .* V = 61 or 64"):
        verify(padded, tmp_path, input_ids=TOKENS, logits=whole[..., :60])


def test_files_that_it_cannot_use(padded: Path, tmp_path: Path) -> None:
    exact = np.zeros((2, 7, 61))
    for arrays, message in (
        ({"logits": TOKENS}, r"file.npz holds logits; it must hold input_ids and logits"),
        ({}, r"file.npz holds nothing; it must"),
        ({"input_ids": TOKENS[0], "logits": exact[0]}, r"input_ids \(7,\) and logits \(7, 61\); they must be \[B, T\]"),
        ({"input_ids": TOKENS, "logits": exact[:1]}, r"input_ids \(2, 7\) and logits \(1, 7, 61\)"),
        (
            {"input_ids": TOKENS, "logits": exact, "positions": TOKENS[:, 1:]},
            r"positions \(2, 6\) must have input_ids' shape, \(2, 7\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            verify(padded, tmp_path, **arrays)
    (tmp_path / "text.npz").write_text("no")
    for name in ("text.npz", "absent.npz"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as an .npz file"):
            main(["verify", str(padded), "--logits", str(tmp_path / name)])
