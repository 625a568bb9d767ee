"""Building, overriding, saving and comparing configurations, and what each mistake is told."""

import argparse
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from kdjax import config as configs
from kdjax.config import Config, build, command_line
from kdjax.types import UserError


def test_config_dict_and_overrides_fill_the_dataclasses() -> None:
    settings = ConfigDict({"model": {"layers": 4, "init_from": placeholder(str)}, "optim": {"lr": 1}})
    config = build(
        settings,
        {"optim.lr": "3e-5", "data.train": "a.jsonl,b.jsonl", "optim.clip_norm": "none", "data.top_k": "8"},
    )
    assert (config.model.layers, config.model.init_from) == (4, None)
    assert config.optim.lr == 3e-5
    assert config.optim.clip_norm is None
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config["data.top_k"] == 8
    assert config.optim.b2 == 0.98  # a default


@pytest.mark.parametrize(
    ("text", "kept"),
    [("3,1,2", (3, 1, 2)), ("0-3,7", (0, 1, 2, 3, 7)), ("5", (5,)), ("none", None), ("0-1, 9-10", (0, 1, 9, 10))],
)
def test_numbers_and_ranges_on_the_command_line(text: str, kept: tuple[int, ...] | None) -> None:
    assert build({}, {"model.keep_layers": text}).model.keep_layers == kept


def test_tuples_of_numbers() -> None:
    config = build({"model": {"keep_layers": [3, 1], "rope_llama3": [8, 1, 4, 8192]}})
    assert config.model.rope_llama3 == (8.0, 1.0, 4.0, 8192.0)
    assert configs.from_json(configs.to_json(config)) == config
    assert build({}, {"model.rope_llama3": "8,1,4,8192"}).model.rope_llama3 == config.model.rope_llama3


def test_json_round_trip_and_differences() -> None:
    config = build({"data": {"train": ["a", "b"]}, "loss": {"cross_tokenizer": True}, "optim": {"clip_norm": None}})
    assert configs.from_json(configs.to_json(config)) == config
    assert configs.differences(Config(), config) == [
        ("data.train", (), ("a", "b")),
        ("loss.cross_tokenizer", None, True),
        ("optim.clip_norm", 1.0, None),
    ]


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"modle": {}}, {}, r"unknown config group 'modle': did you mean 'model'"),
        ({"model": {"layer": 1}}, {}, r"unknown config key 'model.layer': did you mean 'model.layers'"),
        ({}, {"optim.weight_dacay": "1"}, r"did you mean 'optim.weight_decay'"),
        ({}, {"optim.learning_rate": "1"}, r"unknown config key 'optim.learning_rate': .*optim has name, lr, min_lr"),
        ({}, {"model.sequence_length": "1"}, r"did you mean 'data.sequence_length'"),
        ({"model": {"layers": 1.5}}, {}, r"model.layers = 1.5 is a float; it must be int"),
        ({"optim": {"lr": "fast"}}, {}, r"optim.lr = 'fast' is a str; it must be float"),
        ({}, {"model.layers": "abc"}, r"model.layers = 'abc'"),
        ({}, {"model.bias": "1"}, r"model.bias = '1' is a str; it must be bool"),
        (
            {},
            {"model.keep_layers": "0,x"},
            r"keep_layers = \(0.0, 'x'\) is a tuple; it must be tuple\[int, ...\] or None",
        ),
        ({}, {"model.keep_layers": "1.5"}, r"keep_layers = \(1.5,\) is a tuple; it must be tuple\[int"),
        ({"model": {"keep_layers": [True]}}, {}, r"keep_layers = \[True\] is a list; it must be tuple\[int"),
        ({"model": {"bias": 1}}, {}, r"model.bias = 1 is a int; it must be bool"),
        ({"model": {"layers": True}}, {}, r"model.layers = True"),
        ({"model": 3}, {}, r"config group 'model' holds 3"),
        ({}, {"data.top_k": "many"}, r"data.top_k = 'many' is a str; it must be int or None"),
    ],
)
def test_mistakes_are_told(settings: dict, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(settings, overrides)


def parsed(recipe: Path, *words: str) -> Config:
    recipe.write_text("def get_config():\n    return {'optim': {'b1': 0.5}}\n")
    return command_line.parse(argparse.ArgumentParser("test"), ["--config", str(recipe), *words])[1]()


def test_command_line_words(tmp_path: Path) -> None:
    words = ["--config.optim.lr=1e-3", "--config.data.train", "x=y.jsonl", "--config.mesh.data", "-1"]
    config = parsed(tmp_path / "recipe.py", *words)
    assert (config.optim.b1, config.optim.lr, config.data.train, config.mesh.data) == (0.5, 1e-3, ("x=y.jsonl",), -1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr=3"], r"unknown argument '--lr=3'"),
        (["--config.optim.lr"], r"argument --config.optim.lr: expected one argument"),
        (["--config.optim.learning_rate=1"], r"unknown config key 'optim.learning_rate': .*optim has name, lr"),
        (["--config.optim.learning_rate", "1"], r"unknown config key|unknown argument"),
        (["--config.optim.lr=fast"], r"optim.lr = 'fast' is a str; it must be float"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(tmp_path / "recipe.py", *words)


def test_help_groups_knobs_with_type_choices_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.parse(argparse.ArgumentParser("test"), ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "knobs of optim: Optimiser and learning rate." in told
    assert "--config.optim.name NAME optimiser; one of adamw, lion, sgd (default: adamw)" in told
    assert "--config.optim.b1 FLOAT decay of the first moment (momentum for sgd); >= 0 and < 1 (default: 0.9)" in told
    assert "--config.model.keep_layers INTS" in told
    for dotted in configs.KNOBS:
        assert f"--config.{dotted} " in told


def test_config_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"absent.py: there is no such file; for .* choose from .*, quickstart$"):
        command_line.load(tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"defines no get_config"):
        command_line.load(tmp_path / "empty.py")


def test_every_knob_is_used_and_tested() -> None:
    """Something outside kdjax/config reads each knob, and some test sets it and says what it must change."""
    tests = Path(__file__).parents[1]
    used = "\n".join(
        p.read_text() for p in (tests.parent / "kdjax").rglob("*.py") if p.name not in ("schema.py", "validate.py")
    )
    tested = "\n".join(
        p.read_text() for p in tests.rglob("test_*.py") if p.name not in ("test_config.py", "test_validate.py")
    )
    for dotted in configs.KNOBS:
        group, name = dotted.split(".")
        assert re.search(rf"\b{name}\b", used), f"nothing reads {dotted}"
        assert re.search(rf"\b({group}__)?{name}\b", tested), f"no test sets {dotted}"


def test_every_knob_says_what_it_means() -> None:
    for dotted, knob in configs.KNOBS.items():
        assert len(knob.meaning) > 8, dotted
