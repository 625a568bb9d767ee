"""Models go out as Megatron checkpoints: the bytes that Megatron wrote, the architecture, and what is refused.

scripts/tools/check_megatron.py shows that Megatron-Core loads them and computes the same logits.
"""

import dataclasses
import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron_goldens as megatron
import ml_dtypes
import numpy as np
import pytest
from models import assert_same_params, save_random_model

from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.convert.checkpoint_files import list_files, subdirectory
from kdjax.convert.megatron.args_reader import from_args
from kdjax.convert.megatron.args_writer import to_args
from kdjax.convert.megatron.checkpoint import TRACKER, open_checkpoint
from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_reader import unpickle
from kdjax.types import UserError

SMALL = ModelConfig(layers=3, d_model=16, n_heads=4, d_ff=23, vocab_size=37, padded_vocab_size=37, n_groups=4)
# What Megatron's GPT can be, and no golden is.
OWN = {
    "llama3 rope, wide heads": {"n_groups": 2, "head_dim": 6, "rope_llama3": (32.0, 1.0, 4.0, 8192.0), "tied": False},
    "qkv biases, linear rope, partly rotated": {"qkv_bias": True, "rope_linear_factor": 4.0, "rope_fraction": 0.5},
    "norms of queries and keys": {"qk_norm": True, "n_groups": 1, "norm_eps": 1e-6, "rope_theta": 1e6},
    "nemotron": {"norm": "layernorm_1p", "activation": "squared_relu", "padded_vocab_size": 48, "tied": False},
    "tanh gelu": {
        "position": "learned",
        "max_positions": 7,
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
    },
    "gelu without biases": {"norm": "layernorm", "activation": "gelu"},
    "gated, with biases": {"bias": True, "head_dim": 5, "rope_fraction": 0.4},
}


def own_model(path: Path, **changes: Any) -> ModelConfig:
    """Writes a model directory that never was Megatron's, biases and scales random too."""
    config = dataclasses.replace(SMALL, head_dim=changes.pop("head_dim", 4), **changes)
    save_random_model(path, config)
    return config


def described(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the entries of a checkpoint's .metadata: a tensor's shape and dtype, or "object"."""
    pickled = unpickle((checkpoint / ".metadata").read_bytes(), str(checkpoint))
    found = {}
    for name, entry in pickled.attributes["state_dict_metadata"].items():
        state = entry.attributes
        found[name] = (state["size"], str(state["properties"].state[0])) if "size" in state else ((), "object")
    return found


def tensors(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).read_tensors(config).items() if tensor.nbytes}


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype), name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("variant", "checkpoint", "iteration"),
    [
        ("gpt2ish", "torch_dist_tp1pp1", "iter_0000100"),
        ("gpt2ish", "torch_dist_tp2pp2", "iter_0000100"),
        ("llamaish", "torch_dist_tp1pp1", "iter_0000100"),
        ("llamaish", "torch_dist_tp1pp1_bf16_release", "release"),
    ],
)
def test_megatron_and_back(variant: str, checkpoint: str, iteration: str, tmp_path: Path) -> None:
    """Every key, shape, dtype and byte of what Megatron-Core wrote."""
    golden, config = megatron.unpacked(variant) / checkpoint, megatron.architecture(variant)
    main(["to-megatron", str(megatron.converted(variant, checkpoint)), str(tmp_path / "back")])
    assert (tmp_path / "back" / TRACKER).read_text() == "release"
    ours, theirs = described(tmp_path / "back" / "release"), described(golden / iteration)
    assert {name: entry for name, entry in theirs.items() if not name.startswith("rng_state")}.items() <= ours.items()
    assert {name for name in ours.keys() - theirs.keys() if "_extra_state" not in name} == set()
    assert_same_bytes(tensors(tmp_path / "back", config), tensors(golden, config))
    ours_json, theirs_json = (path / "metadata.json" for path in (tmp_path / "back" / "release", golden / iteration))
    assert json.loads(ours_json.read_text()) == json.loads(theirs_json.read_text())


@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_in_another_dtype(variant: str, tmp_path: Path) -> None:
    """The goldens' weights are representable in bfloat16, which therefore loses nothing."""
    main(["to-megatron", str(megatron.converted(variant)), str(tmp_path / "back"), "--dtype", "bfloat16"])
    config = megatron.architecture(variant)
    found = tensors(tmp_path / "back", config)
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    golden = tensors(megatron.unpacked(variant) / "torch_dist_tp1pp1", config)
    assert_same_bytes({name: array.astype(np.float32) for name, array in found.items()}, golden)
    args = common(tmp_path / "back")["args"].attributes
    assert (args["params_dtype"], args["bf16"], args["fp16"]) == ("bfloat16", True, False)


def common(path: Path) -> dict[str, Any]:
    return torch_file.load(subdirectory(list_files(path), "release")["common.pt"])


@pytest.mark.parametrize("checkpoint", [("gpt2ish", "torch_dist_tp1pp1"), ("llamaish", "torch_tp1pp2vpp2_bf16")])
def test_there_and_back_is_the_same_model_directory(checkpoint: tuple[str, str], tmp_path: Path) -> None:
    first = megatron.converted(*checkpoint)
    main(["to-megatron", str(first), str(tmp_path / "there")])
    main(["from-megatron", str(tmp_path / "there"), str(tmp_path / "back")])
    assert (tmp_path / "back" / "model_config.json").read_text() == (first / "model_config.json").read_text()
    before, after = (json.loads((path / "provenance.json").read_text()) for path in (first, tmp_path / "back"))
    assert after["leaves"] == before["leaves"]


@pytest.mark.parametrize("name", OWN)
def test_models_that_never_were_megatrons(name: str, tmp_path: Path) -> None:
    own_model(tmp_path / "model", **OWN[name])
    main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "there")])
    main(["from-megatron", str(tmp_path / "there"), str(tmp_path / "back")])
    assert_same_params(tmp_path / "back", tmp_path / "model")


def test_two_exports_are_byte_equal(tmp_path: Path) -> None:
    own_model(tmp_path / "model")
    for out in ("first", "second"):
        main(["to-megatron", str(tmp_path / "model"), str(tmp_path / out)])
    files = [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "provenance.json"]
    assert sorted(os.listdir(tmp_path / "first" / "release")) == sorted(files)
    first, second = tmp_path / "first" / "release", tmp_path / "second" / "release"
    assert filecmp.cmpfiles(first, second, files, shallow=False) == (files, [], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qk_norm": True, "norm": "layernorm"},
            r"model.qk_norm with model.norm = 'layernorm': .* get its layers' norm",
        ),
        ({"qk_norm": True, "norm": "layernorm_1p"}, r"model.qk_norm with model.norm = 'layernorm_1p'"),
        (
            {"activation": "gelu_tanh"},
            r"model.activation = 'gelu_tanh' without model.bias: .* only where it adds a bias",
        ),
        ({"rope_llama3": (8.0, 1.0, 2.0, 8192.0)}, r"model.rope_llama3 = \(8.*fixes all but the factor, to 1, 4, 8192"),
        ({"rope_theta": 10000.5}, r"model.rope_theta = 10000.5: .*must be a whole number"),
        ({"rope_linear_factor": 2.5}, r"model.rope_linear_factor = 2.5: .*must be a whole number"),
    ],
)
def test_architectures_that_megatron_does_not_have(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    own_model(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["model"]


def test_args_are_read_back_under_the_names_of_each_release() -> None:
    config = dataclasses.replace(SMALL, norm="layernorm_1p", norm_eps=3e-6, head_dim=4, padded_vocab_size=40)
    args = to_args(config)
    for newer, older in (
        ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
        ("layernorm_epsilon", "norm_epsilon"),
    ):
        for name in (newer, older):
            stated = from_args({key: value for key, value in args.items() if key != name}, "here")
            assert (stated["norm"].value, stated["norm_eps"].value) == ("layernorm_1p", 3e-6)
    assert "seq_length" not in args
    longer = to_args(config, 20)
    assert (longer["seq_length"], longer["max_position_embeddings"]) == (20, 20)
    learned = to_args(dataclasses.replace(config, position="learned", max_positions=7), 20)
    assert (learned["seq_length"], learned["max_position_embeddings"]) == (7, 7)


@pytest.mark.parametrize(
    ("vocab", "stored", "divisor", "rows", "megatron_divisor"),
    [
        (37, 37, None, 37, 37),
        (37, 48, None, 48, 48),
        (37, 48, 1, 37, 37),
        (37, 37, 128, 128, 128),
        (37, 128, 10, 40, 40),
    ],
)
def test_vocabulary_padding(
    vocab: int, stored: int, divisor: int | None, rows: int, megatron_divisor: int, tmp_path: Path
) -> None:
    """As stored, cut, or filled with zeros; Megatron's own rule gives the same number of rows."""
    config = dataclasses.replace(SMALL, head_dim=4, padded_vocab_size=stored, tied=False)
    before = save_random_model(tmp_path / "model", config)
    words = [] if divisor is None else [f"--vocab-divisible-by={divisor}"]
    main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out"), *words])
    args = common(tmp_path / "out")["args"].attributes
    assert (args["vocab_size"], args["padded_vocab_size"]) == (vocab, rows)
    assert args["make_vocab_size_divisible_by"] == megatron_divisor
    assert -(-vocab // megatron_divisor) * megatron_divisor == rows
    found = tensors(tmp_path / "out", config)
    for name, parameter in (("embedding.word_embeddings.weight", "embed"), ("output_layer.weight", "unembed")):
        assert found[name].shape == (rows, 16)
        np.testing.assert_array_equal(found[name][: min(rows, stored)], before[parameter][: min(rows, stored)])
        assert not found[name][stored:].any()


def test_a_multiple_of_nothing(tmp_path: Path) -> None:
    own_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"--vocab-divisible-by 0: it must be at least 1, such as 128"):
        main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out"), "--vocab-divisible-by", "0"])


def test_what_is_printed_and_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = own_model(tmp_path / "model", qk_norm=True)
    main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"wrote {tmp_path / 'out'}: torch_dist, 26 tensors, 0.000 GB, float32"
    assert second == f"Megatron's args for it are also in {tmp_path / 'out' / 'release' / 'provenance.json'}"
    provenance = json.loads((tmp_path / "out" / "release" / "provenance.json").read_text())
    assert (provenance["source"], provenance["step"]) == ("model", 0)
    args = common(tmp_path / "out")["args"].attributes
    assert provenance["args"] == {key: args[key] for key in to_args(config)}
    assert (args["params_dtype"], args["bf16"], args["fp16"]) == ("float32", False, False)
    entries = described(tmp_path / "out" / "release")
    assert len([name for name in entries if "_extra_state/shard_" in name]) == 3 * 7 + 1
    assert entries["decoder.layers.self_attention.k_layernorm._extra_state/shard_2_3"] == ((), "object")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the checkpoint should go; fails the test if anything is there afterwards."""
    own_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    yield tmp_path / "out" / "megatron"
    assert os.listdir(tmp_path / "out") == []


def test_a_disk_that_fills_up(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch_file.save, []

    def until_full(*things: Any) -> int:
        calls.append(things)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*things)

    monkeypatch.setattr(torch_file, "save", until_full)
    with pytest.raises(UserError, match=r"out filled up before megatron was complete \(.*No space left .*nothing was"):
        main(["to-megatron", str(tmp_path / "model"), str(out)])
    assert len(calls) == 8


def test_a_disk_without_room_and_an_interruption(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"has 0.0 MB free and the model may need 0.0 MB; free some"):
            main(["to-megatron", str(tmp_path / "model"), str(out)])

    def interrupted(*things: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_file, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["to-megatron", str(tmp_path / "model"), str(out)])


@pytest.mark.parametrize(
    ("spoil", "force", "message"),
    [
        (lambda out: None, False, r"exists already; name another directory, or pass --force"),
        (
            lambda out: (out / "release" / "provenance.json").unlink(),
            True,
            r"hold release/provenance.json, and .*out does",
        ),
        (lambda out: (out / "iter_0000010").mkdir(), True, r"holds iter_0000010, a training run's checkpoints; name"),
    ],
)
def test_an_existing_out(spoil: Callable[[Path], Any], force: bool, message: str, tmp_path: Path) -> None:
    """Replaced if this command wrote it, and no training went on in it."""
    own_model(tmp_path / "model")
    words = ["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")]
    main(words)
    main([*words, "--force", "--dtype", "float16"])
    args = common(tmp_path / "out")["args"].attributes
    assert (args["params_dtype"], args["fp16"]) == ("float16", True)
    spoil(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        main([*words, *(["--force"] if force else [])])


def test_parameters_that_do_not_fit(tmp_path: Path) -> None:
    own_model(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "model_config.json").read_text())
    (tmp_path / "model" / "model_config.json").write_text(json.dumps(stored | {"d_ff": 29}))
    with pytest.raises(
        UserError,
        match=r"layers/mlp/\w+/kernel: \(3, .*23.*\) is stored, but the architecture .* needs \(3, .*29",
    ):
        main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")])
    for changes, message in (
        ({"tied": False}, r"unembed: nothing is stored, but the architecture beside it needs \(37, 16\)"),
        ({"vocab_size": 38, "padded_vocab_size": 38}, r"embed: \(37, 16\) is stored, but .* needs \(38, 16\)"),
        ({"d_model": 20}, r"embed: \(37, 16\) is stored, but .* needs \(37, 20\)"),
    ):
        (tmp_path / "model" / "model_config.json").write_text(json.dumps(stored | changes))
        with pytest.raises(UserError, match=message):
            main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["model"]
