"""A distilled student goes out as a Hugging Face checkpoint, from the run directory, with its teacher's tokenizer."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_problem as toy

from kdjax import config as configs
from kdjax.checkpoint import load_model, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.model import init_params
from kdjax.train import run
from kdjax.types import UserError

GOLDEN = Path(__file__).parent.parent / "fixtures" / "hf" / "llama"
TOKENS = np.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that started from two of the golden's three layers and made two steps, saving each."""
    root = tmp_path_factory.mktemp("student")
    main(["from-hf", str(GOLDEN), str(root / "teacher")])
    config = toy.config(root, model__init_from=str(root / "teacher"), model__keep_layers=(2, 0))
    config = configs.replace(config, train__steps=2, train__val_every=1, train__save_every=1, optim__warmup_steps=0)
    run(config, root / "run", devices=jax.devices()[:1])
    return root / "run"


@pytest.mark.parametrize("step", [None, 1, 2])
def test_any_step_of_a_run(student: Path, tmp_path: Path, step: int | None) -> None:
    model = student if step is None else student / "checkpoints" / str(step)
    main(["to-hf", str(model), str(tmp_path / "hf")])
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    golden = json.loads((GOLDEN / "config.json").read_text())
    assert (written["num_hidden_layers"], golden["num_hidden_layers"]) == (2, 3)
    for key in ("eos_token_id", "max_position_embeddings", "rope_parameters", "architectures"):
        assert written[key] == golden[key]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (GOLDEN / name).read_bytes()
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    np.testing.assert_array_equal(load_model(tmp_path / "back")(TOKENS), load_model(model)(TOKENS))


def test_steps_differ(student: Path) -> None:
    first, second = (load_model(student / "checkpoints" / str(step))(TOKENS) for step in (1, 2))
    assert np.abs(first - second).max() > 1e-4


def test_another_tokenizer(student: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"--tokenizer .*: it holds none of tokenizer.json, "):
        main(["to-hf", str(student), str(tmp_path / "hf"), "--tokenizer", str(tmp_path / "tokenizer")])
    (tmp_path / "tokenizer" / "merges.txt").write_text("a b\n")
    main(["to-hf", str(student), str(tmp_path / "hf"), "--tokenizer", str(tmp_path / "tokenizer")])
    assert (tmp_path / "hf" / "merges.txt").exists()
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_rows_that_were_in_the_softmax_are_not_dropped_unasked(tmp_path: Path) -> None:
    model = ModelConfig(layers=1, d_model=8, n_heads=2, d_ff=8, vocab_size=toy.VOCAB, padded_vocab_size=toy.VOCAB + 3)
    save_model(tmp_path / "model", model, init_params(model, 0))
    config = toy.config(tmp_path, model__init_from=str(tmp_path / "model"), loss__include_vocab_padding=True)
    config = configs.replace(config, train__steps=1, optim__warmup_steps=0)
    run(config, tmp_path / "run", devices=jax.devices()[:1])
    with pytest.raises(
        UserError, match=rf"softmax ran over {toy.VOCAB + 3} rows, .*Pass --vocab-padding keep to write all of them"
    ):
        main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")])
    main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--vocab-padding", "keep"])
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["vocab_size"], written["max_position_embeddings"]) == (toy.VOCAB + 3, toy.LENGTH)
