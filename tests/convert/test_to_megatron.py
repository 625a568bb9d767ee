"""Models go out as Megatron checkpoints: the bytes that Megatron wrote, the architecture, and what cannot be said.

That Megatron-Core loads them and computes the same logits is scripts/tools/check_megatron.py's to show.
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

import jax
import megatron_goldens as megatron
import ml_dtypes
import numpy as np
import pytest
import toy_problem as toy

from kdjax import config as configs
from kdjax.checkpoint import load_params, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.convert.checkpoint_files import list_files, subdirectory
from kdjax.convert.megatron.args_reader import from_args
from kdjax.convert.megatron.args_writer import to_args
from kdjax.convert.megatron.checkpoint import TRACKER, open_checkpoint
from kdjax.convert.pytorch import torch_file
from kdjax.convert.pytorch.pickle_reader import unpickle
from kdjax.model import init_params
from kdjax.train import run
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
    """A model directory of random weights, biases and scales among them, that were never Megatron's."""
    config = dataclasses.replace(SMALL, head_dim=changes.pop("head_dim", 4), **changes)
    params = init_params(config, 5)
    keys = iter(jax.random.split(jax.random.key(6), 99))
    save_model(path, config, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params))
    return config


def described(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every entry of the checkpoint's .metadata under its own key: a tensor's shape and dtype, or that it is none."""
    pickled = unpickle((checkpoint / ".metadata").read_bytes(), str(checkpoint))
    found = {}
    for name, entry in pickled.attributes["state_dict_metadata"].items():
        told = entry.attributes
        found[name] = (told["size"], str(told["properties"].state[0])) if "size" in told else ((), "object")
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
    assert {name: told for name, told in theirs.items() if not name.startswith("rng_state")}.items() <= ours.items()
    assert {name for name in ours.keys() - theirs.keys() if "_extra_state" not in name} == set()
    assert_same_bytes(tensors(tmp_path / "back", config), tensors(golden, config))
    ours_json, theirs_json = (path / "metadata.json" for path in (tmp_path / "back" / "release", golden / iteration))
    assert json.loads(ours_json.read_text()) == json.loads(theirs_json.read_text())


@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_in_another_dtype(variant: str, tmp_path: Path) -> None:
    """The goldens' weights are bfloat16's, so that bfloat16 loses nothing."""
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
    config = own_model(tmp_path / "model", **OWN[name])
    main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "there")])
    main(["from-megatron", str(tmp_path / "there"), str(tmp_path / "back")])
    assert read_model_config(tmp_path / "back") == read_model_config(tmp_path / "model")
    ours, theirs = (load_params(tmp_path / path, config) for path in ("back", "model"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


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


def test_args_say_what_they_are_read_as() -> None:
    """`from_args` undoes `to_args`, key by key, under each release's names for it."""
    config = dataclasses.replace(SMALL, norm="layernorm_1p", norm_eps=3e-6, head_dim=4, padded_vocab_size=40)
    args = to_args(config)
    for newer, older in (
        ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
        ("layernorm_epsilon", "norm_epsilon"),
    ):
        for name in (newer, older):
            told = from_args({key: value for key, value in args.items() if key != name}, "here")
            assert (told["norm"].value, told["norm_eps"].value) == ("layernorm_1p", 3e-6)


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
    """As stored, cut, or filled up with zeros; Megatron's own rule makes as many of it."""
    config = own_model(tmp_path / "model", padded_vocab_size=stored, tied=False)
    words = [] if divisor is None else [f"--vocab-divisible-by={divisor}"]
    main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out"), *words])
    args = common(tmp_path / "out")["args"].attributes
    assert (args["vocab_size"], args["padded_vocab_size"]) == (vocab, rows)
    assert args["make_vocab_size_divisible_by"] == megatron_divisor
    assert -(-vocab // megatron_divisor) * megatron_divisor == rows
    found, before = tensors(tmp_path / "out", config), load_params(tmp_path / "model", config)
    for name, leaf in (("embedding.word_embeddings.weight", "embed"), ("output_layer.weight", "unembed")):
        assert found[name].shape == (rows, 16)
        np.testing.assert_array_equal(found[name][: min(rows, stored)], before[leaf][: min(rows, stored)])
        assert not found[name][stored:].any()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, each saved, with padded rows in its softmax."""
    root = tmp_path_factory.mktemp("student")
    own_model(root / "model", vocab_size=toy.VOCAB, padded_vocab_size=toy.VOCAB + 3)
    config = toy.config(root, model__init_from=str(root / "model"), loss__include_vocab_padding=True)
    config = configs.replace(config, train__steps=2, train__val_every=1, train__save_every=1, optim__warmup_steps=0)
    run(config, root / "run", devices=jax.devices()[:1])
    return root / "run"


@pytest.mark.parametrize("step", [None, 1, 2])
def test_any_step_of_a_run(student: Path, step: int | None, tmp_path: Path) -> None:
    model = student if step is None else student / "checkpoints" / str(step)
    main(["to-megatron", str(model), str(tmp_path / "there")])
    told = common(tmp_path / "there")
    assert told["iteration"] == (step or 2)
    assert told["args"].attributes["seq_length"] == toy.LENGTH
    main(["from-megatron", str(tmp_path / "there"), str(tmp_path / "back")])
    config = read_model_config(tmp_path / "back")
    ours, theirs, other = (
        load_params(path, config)
        for path in (
            tmp_path / "back",
            student / "checkpoints" / str(step or 2),
            student / "checkpoints" / str(3 - (step or 2)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (ours, other)), strict=True))


def test_rows_that_were_in_the_softmax_stay(student: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"--vocab-divisible-by 128 makes 128 vocabulary rows, .* over {toy.VOCAB + 3} rows; omit"
    ):
        main(["to-megatron", str(student), str(tmp_path / "out"), "--vocab-divisible-by", "128"])
    main(["to-megatron", str(student), str(tmp_path / "out"), "--vocab-divisible-by", str(toy.VOCAB + 3)])
    with pytest.raises(UserError, match=r"--vocab-divisible-by 0: it must be at least 1"):
        main(["to-megatron", str(student), str(tmp_path / "other"), "--vocab-divisible-by", "0"])


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the checkpoint should go; the test fails if anything is there afterwards."""
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


def test_leaves_that_do_not_fit(tmp_path: Path) -> None:
    own_model(tmp_path / "model")
    told = json.loads((tmp_path / "model" / "model_config.json").read_text())
    (tmp_path / "model" / "model_config.json").write_text(json.dumps(told | {"d_ff": 29}))
    with pytest.raises(
        UserError,
        match=r"layers/mlp/\w+/kernel: \(3, .*23.*\) is stored, but the architecture .* needs \(3, .*29",
    ):
        main(["to-megatron", str(tmp_path / "model"), str(tmp_path / "out")])
