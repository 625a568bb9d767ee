"""Stated values and overrides make an architecture, or an error that says how to correct it."""

import argparse

import pytest

from kdjax.convert.architecture import KEYS, Stated, add_import_arguments, format_table, resolve
from kdjax.types import UserError

STATED = {
    "layers": Stated(4, "args: num_layers 4"),
    "d_model": Stated(64, "args: hidden_size 64"),
    "n_heads": Stated(4, "args: num_attention_heads 4"),
    "d_ff": Stated(256, "args: ffn_hidden_size 256"),
    "position": Stated("learned", "args: position_embedding_type learned_absolute"),
    "max_positions": Stated(32, "args: max_position_embeddings 32"),
    "padded_vocab_size": Stated(512, "args: padded_vocab_size 512"),
    "vocab_size": Stated(500, "args: vocab_size 500"),
}


def test_overrides_win() -> None:
    config, values = resolve(STATED, ["layers=5", "norm_eps=1e-6", "vocab_size=499", "vocab_size=498"])
    assert (config.layers, config.norm_eps, config.vocab_size, config.d_ff) == (5, 1e-6, 498, 256)
    assert values["layers"] == Stated(5, "--arch layers=5")
    assert values["d_ff"] == STATED["d_ff"]
    assert values["n_groups"] == Stated(4, "default")  # resolved to the number of heads
    assert list(values) == list(KEYS)


def test_the_table_says_where_each_value_came_from() -> None:
    _, values = resolve(STATED, ["norm_eps=1e-6"])
    lines = format_table(values).splitlines()
    assert lines[0].startswith("  ")
    assert len({len(line) - len(line.split(maxsplit=2)[2]) for line in lines}) == 1  # the origins are aligned
    rows = [line.split(maxsplit=2) for line in lines]
    assert ["layers", "4", "args: num_layers 4"] in rows
    assert ["norm_eps", "1e-06", "--arch norm_eps=1e-6"] in rows
    assert ["rope_llama3", "None", "default"] in rows


def test_values_that_must_be_stated() -> None:
    with pytest.raises(UserError, match=r"does not state layers, d_ff; give --arch layers=... and so on"):
        resolve({key: found for key, found in STATED.items() if key not in ("layers", "d_ff")}, [])
    some = {key: found for key, found in STATED.items() if key not in ("d_ff", "max_positions")}
    message = r"architecture is invalid: .*max_positions = None: learned positions need their number.*--arch KEY=VALUE"
    with pytest.raises(UserError, match=message):
        resolve(some, ["d_ff=5"])
    assert resolve(some, ["d_ff=5", "max_positions=31"])[0].max_positions == 31


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layers", r"--arch layers: write --arch KEY=VALUE; keys are layers, d_model"),
        ("layer=4", r"--arch layer=4: there is no such key; did you mean layers\? Keys are layers"),
        ("dtype=float32", r"--arch dtype=float32: there is no such key"),
        ("xyz=1", r"--arch xyz=1: there is no such key; Keys are layers"),
        ("layers=four", r"model.layers = 'four' is a str; it must be int"),
        ("activation=relu", r"model.activation = 'relu': choose one of swiglu, gelu"),
        ("n_groups=3", r"model.n_groups = 3: it must divide model.n_heads = 4; .*--arch KEY=VALUE"),
        ("vocab_size=600", r"padded_vocab_size = 512: it must be at least model.vocab_size = 600"),
    ],
)
def test_overrides_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(STATED, [override])


def test_the_arguments_of_a_command() -> None:
    parser = argparse.ArgumentParser()
    add_import_arguments(parser, "some file")
    parsed = parser.parse_args(["a", "b", "--arch", "x=1", "--arch", "y=2"])
    assert (str(parsed.source), str(parsed.out), parsed.arch, parsed.force) == ("a", "b", ["x=1", "y=2"], False)
    assert parser.parse_args(["a", "b", "--force"]).force
    assert parser.parse_args(["a", "b"]).arch == []
