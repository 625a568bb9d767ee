"""Students go out from their run: any step of it, with their teacher's tokenizer and the rows that were trained."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy_problem as toy
from models import HF_GOLDENS, assert_same_params

from kdjax import config as configs
from kdjax.checkpoint import load_params, read_model_config
from kdjax.convert.__main__ import main
from kdjax.convert.checkpoint_files import list_files
from kdjax.convert.pytorch import torch_file
from kdjax.train import run
from kdjax.types import UserError

PADDING = 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps from two of the golden Llama's three layers, each step saved.

    `golden` beside it is what its teacher was converted from; `PADDING` rows of its vocabulary are padding, which the
    softmax includes.
    """
    root = tmp_path_factory.mktemp("student")
    golden = root / "golden"
    shutil.copytree(HF_GOLDENS / "llama", golden)
    settings = json.loads((golden / "config.json").read_text())
    settings["rope_parameters"]["original_max_position_embeddings"] = 8192  # the only value that Megatron has
    (golden / "config.json").write_text(json.dumps(settings))
    vocabulary = settings["vocab_size"]
    padded = ["--arch", f"vocab_size={vocabulary - PADDING}", "--arch", f"padded_vocab_size={vocabulary}"]
    with contextlib.redirect_stdout(io.StringIO()):
        main(["from-hf", str(golden), str(root / "teacher"), *padded])
        config = toy.config(root, model__init_from=str(root / "teacher"), model__keep_layers=(2, 0))
        config = configs.replace(
            config,
            loss__include_vocab_padding=True,
            batch__global_size=2,
            train__steps=2,
            train__val_every=1,
            train__save_every=1,
            optim__warmup_steps=0,
        )
        run(config, root / "run", devices=jax.devices()[:1])
    return root / "run"


def config_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def assert_is_step(exported: Path, student: Path, step: int | None) -> None:
    """Asserts that a model directory loads to the arrays of a step of `student`, and to no other step's."""
    best = 2 if step is None else step
    config = read_model_config(exported)
    found, trained, other = (
        load_params(path, config)
        for path in (exported, student / "checkpoints" / str(best), student / "checkpoints" / str(3 - best))
    )
    jax.tree.map(np.testing.assert_array_equal, found, trained)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (found, other)), strict=True))


@pytest.mark.parametrize("step", [None, 1, 2])
def test_any_step_as_a_hugging_face_checkpoint(student: Path, tmp_path: Path, step: int | None) -> None:
    """With its teacher's tokenizer and the keys of the teacher's config.json that still hold."""
    model = student if step is None else student / "checkpoints" / str(step)
    main(["to-hf", str(model), str(tmp_path / "hf"), "--vocab-padding", "keep"])
    written, golden = config_json(tmp_path / "hf"), config_json(student.parent / "golden")
    assert (written["num_hidden_layers"], golden["num_hidden_layers"]) == (2, 3)
    for key in ("eos_token_id", "max_position_embeddings", "rope_parameters", "architectures", "vocab_size"):
        assert written[key] == golden[key]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (student.parent / "golden" / name).read_bytes()
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    assert_is_step(tmp_path / "back", student, step)


def test_another_tokenizer(student: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    words = ["to-hf", str(student), str(tmp_path / "hf"), "--vocab-padding=keep"]
    with pytest.raises(UserError, match=r"--tokenizer .*: it holds none of tokenizer.json, "):
        main([*words, "--tokenizer", str(tmp_path / "tokenizer")])
    (tmp_path / "tokenizer" / "merges.txt").write_text("a b\n")
    main([*words, "--tokenizer", str(tmp_path / "tokenizer")])
    assert (tmp_path / "hf" / "merges.txt").exists()
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_rows_that_were_in_the_softmax_are_not_dropped_unasked(student: Path, tmp_path: Path) -> None:
    rows = config_json(student.parent / "golden")["vocab_size"]
    message = rf"softmax ran over {rows} rows, of which {rows - PADDING} are .*Pass --vocab-padding keep to write all"
    with pytest.raises(UserError, match=message):
        main(["to-hf", str(student), str(tmp_path / "hf")])
    for choice, expected in (("keep", rows), ("strip", rows - PADDING)):
        main(["to-hf", str(student), str(tmp_path / choice), "--vocab-padding", choice])
        assert config_json(tmp_path / choice)["vocab_size"] == expected
    main(["from-hf", str(tmp_path / "strip"), str(tmp_path / "again")])
    main(["to-hf", str(tmp_path / "again"), str(tmp_path / "twice")])
    main(["from-hf", str(tmp_path / "twice"), str(tmp_path / "back")])
    assert_same_params(tmp_path / "again", tmp_path / "back")


@pytest.mark.parametrize("step", [None, 1, 2])
def test_any_step_as_a_megatron_checkpoint(student: Path, step: int | None, tmp_path: Path) -> None:
    model = student if step is None else student / "checkpoints" / str(step)
    main(["to-megatron", str(model), str(tmp_path / "there")])
    common = torch_file.load(list_files(tmp_path / "there")["release/common.pt"])
    assert common["iteration"] == (step or 2)
    assert common["args"].attributes["seq_length"] == toy.LENGTH
    provenance = json.loads((tmp_path / "there" / "release" / "provenance.json").read_text())
    assert (provenance["step"], provenance["source"]) == (step or 2, "run" if step is None else str(step))
    main(["from-megatron", str(tmp_path / "there"), str(tmp_path / "back")])
    assert_is_step(tmp_path / "back", student, step)


def test_the_padding_of_a_megatron_vocabulary(student: Path, tmp_path: Path) -> None:
    """Rows that were in the softmax are neither cut nor added to."""
    rows = config_json(student.parent / "golden")["vocab_size"]
    with pytest.raises(
        UserError, match=rf"--vocab-divisible-by 128 makes 128 vocabulary rows, .* over {rows} rows; omit"
    ):
        main(["to-megatron", str(student), str(tmp_path / "out"), "--vocab-divisible-by", "128"])
    main(["to-megatron", str(student), str(tmp_path / "out"), "--vocab-divisible-by", str(rows)])


def test_a_run_without_a_tokenizer_or_padding(student: Path, tmp_path: Path) -> None:
    """The longest sequence is the data's where nothing else states one."""
    shutil.copytree(student, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings["model"]["init_from"] = None
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--vocab-padding=keep"])
    assert config_json(tmp_path / "hf")["max_position_embeddings"] == toy.LENGTH
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
