"""Every Megatron and NeMo fixture converts to a model with Megatron's own logits and gradients."""

import dataclasses
import filecmp
import itertools
import os
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import megatron_goldens as megatron
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch_writer as writer
from jax.tree_util import tree_leaves_with_path
from models import assert_same_params, logits

from kdjax import cli
from kdjax.checkpoint import load_params, read_model_config
from kdjax.config import ModelConfig
from kdjax.convert.from_megatron import convert
from kdjax.convert.megatron.parameter_names import canonical_name
from kdjax.convert.megatron.rules import megatron_rules
from kdjax.convert.provenance import read_provenance
from kdjax.convert.rules import Rule
from kdjax.model import Params, bind, param_name
from kdjax.types import UserError

LAYOUTS = {
    "gpt2ish": (
        "torch_dist_tp1pp1",
        "torch_dist_tp2pp2",
        "torch_tp1pp1",
        "torch_tp1pp1_te",
        "torch_tp2pp2",
        "torch_tp2pp2_te",
    ),
    "llamaish": (
        "torch_dist_tp1pp1",
        "torch_dist_tp2pp2",
        "torch_dist_tp1pp1_bf16_release",
        "torch_dist_tp1pp1_bf16_perlayer",
        "torch_tp1pp1",
        "torch_tp1pp1_te",
        "torch_tp2pp2",
        "torch_tp2pp2_te",
        "torch_tp1pp2vpp2_bf16",
        "torch_tp2pp1_bf16",
        "legacy_tp1_swiglu.nemo",
        "legacy_tp2_fastswiglu.nemo",
        "mcore_dist.nemo",
    ),
}
CASES = [(variant, layout) for variant, layouts in LAYOUTS.items() for layout in layouts]
PADDED = ("vocab_size=512",)  # Megatron's logits have the padded columns too


def test_every_fixture_is_listed() -> None:
    for variant, layouts in LAYOUTS.items():
        found = {path.name for path in megatron.unpacked(variant).iterdir() if path.is_dir() or path.suffix == ".nemo"}
        assert found - {"keys"} == set(layouts)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_logits(variant: str, layout: str) -> None:
    assert_logits(megatron.converted(variant, layout, *PADDED), megatron.golden(variant))


def assert_logits(model: Path, golden: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(logits(model, golden["input_ids"]), golden["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_every_layout_gives_the_same_arrays(variant: str, layout: str) -> None:
    """Ranks, pipeline stages, shards and names are joined to exactly the arrays of the plainest layout."""
    assert_same_params(*(megatron.converted(variant, name, *PADDED) for name in ("torch_dist_tp1pp1", layout)))


@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_gradients(variant: str) -> None:
    """Of the masked mean cross-entropy over the padded vocabulary, converted to Megatron's layout by the same rules."""
    out, golden = megatron.converted(variant, "torch_dist_tp1pp1", *PADDED), megatron.golden(variant)
    config = dataclasses.replace(read_model_config(out), dtype="float32")

    def loss(params: Params) -> jax.Array:
        log_probs_BxTxV = jax.nn.log_softmax(bind(config, params)(golden["input_ids"]))
        losses_BxT = -jnp.take_along_axis(log_probs_BxTxV, golden["labels"][..., None], -1)[..., 0]
        return jnp.sum(losses_BxT * golden["loss_mask"]) / jnp.sum(golden["loss_mask"])

    value, grads = jax.jit(jax.value_and_grad(loss))(load_params(out, config))
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
    theirs = {canonical_name(name): array for name, array in megatron.golden(variant, "golden_tp1pp1.grads").items()}
    ours = megatron_arrays(megatron_rules(config), config, grads)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        error = np.linalg.norm(ours[name] - array) / np.linalg.norm(array)
        assert error < 1e-4, f"{name}: relative error {error}"


def megatron_arrays(table: list[Rule], config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns kdjax's parameters under Megatron's names."""
    parameters = {param_name(path): np.asarray(array) for path, array in tree_leaves_with_path(params)}
    arrays_by_name: dict[str, np.ndarray] = {}
    for rule in table:
        for layer in rule.layers(config):
            arrays = [parameters[name] if layer is None else parameters[name][layer] for name in rule.targets]
            arrays_by_name |= zip(rule.source_names(layer), rule.from_kdjax(config, *arrays), strict=True)
    return arrays_by_name


def test_tanh_gelu() -> None:
    """Megatron's fused GELU is the tanh approximation."""
    golden = megatron.golden("gpt2ish", "golden_tp1pp1_default_bias_gelu_fusion")
    assert_logits(megatron.converted("gpt2ish", "torch_dist_tp1pp1", "activation=gelu_tanh", *PADDED), golden)
    exact = megatron.golden("gpt2ish")["logits"]
    assert np.abs(golden["logits"] - exact).max() > 1e-3  # or the test could not tell them apart


def test_tanh_gelu_from_the_args(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(megatron.unpacked("gpt2ish") / "torch_dist_tp1pp1" / "iter_0000100", source)
    args = megatron.args("gpt2ish") | {"bias_gelu_fusion": True}
    writer.save(source / "common.pt", {"args": writer.namespace(**args), "iteration": 100})
    convert(source, tmp_path / "out", PADDED)
    assert_same_params(
        tmp_path / "out", megatron.converted("gpt2ish", "torch_dist_tp1pp1", "activation=gelu_tanh", *PADDED)
    )


def test_the_true_vocabulary_follows_from_the_null_tokenizer() -> None:
    """Its args state 499, without the end-of-document token."""
    config = read_model_config(megatron.converted("llamaish"))
    assert (config.vocab_size, config.padded_vocab_size) == (500, 512)
    padded = megatron.converted("llamaish", "torch_dist_tp1pp1", *PADDED)
    params = (load_params(path, config) for path in (megatron.converted("llamaish"), padded))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_nemo_file_does_not_state_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(megatron.unpacked("llamaish") / "mcore_dist.nemo", tmp_path / "out")
    assert read_model_config(tmp_path / "out").vocab_size == 512
    assert "vocab_size          512      NOT STATED" in capsys.readouterr().out


def test_parameters_keep_the_stored_dtype() -> None:
    """On the disk, as plain Orbax reads it; `load_params` casts."""
    out = megatron.converted("llamaish", "torch_dist_tp1pp1_bf16_release")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "params")
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {np.dtype(ml_dtypes.bfloat16)}
    loaded = load_params(out, read_model_config(out))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), restored, loaded)


def test_two_conversions_are_byte_equal(tmp_path: Path) -> None:
    source = megatron.unpacked("llamaish") / "torch_tp1pp2vpp2_bf16"
    for name in ("first", "second"):
        convert(source, tmp_path / name)
    files = sorted(str(path.relative_to(tmp_path / "first")) for path in (tmp_path / "first").rglob("*"))
    assert files == sorted(str(path.relative_to(tmp_path / "second")) for path in (tmp_path / "second").rglob("*"))
    files = [file for file in files if (tmp_path / "first" / file).is_file()]
    _, different, unreadable = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", files, shallow=False)
    assert (different, unreadable) == ([], [])


def test_an_iteration_directory_and_an_unpacked_nemo_file(tmp_path: Path) -> None:
    """IN may be an iteration's directory, and a .nemo file may have been unpacked."""
    llamaish = megatron.unpacked("llamaish")
    same = [megatron.converted("llamaish", "torch_tp2pp2/iter_0000100", *PADDED)]
    for name in ("mcore_dist.nemo", "legacy_tp2_fastswiglu.nemo"):
        (tmp_path / name).mkdir()
        shutil.unpack_archive(llamaish / name, tmp_path / name, "tar", filter="data")
        convert(tmp_path / name, tmp_path / f"{name}.out", PADDED)
        same.append(tmp_path / f"{name}.out")
    for out in same:
        assert_same_params(out, megatron.converted("llamaish", "torch_dist_tp1pp1", *PADDED))


def test_provenance() -> None:
    out = megatron.converted("llamaish", "torch_tp1pp2vpp2_bf16")
    found = read_provenance(out)
    assert found["source"] == "torch_tp1pp2vpp2_bf16"
    assert found["format"] == "torch, tensor parallel 1, pipeline parallel 2, 2 virtual stages, checkpoint version 3"
    assert (found["iteration"], found["vocab_size"], found["padded_vocab_size"]) == (100, 500, 512)
    assert found["architecture_from"]["layers"] == "args: num_layers 4"
    assert read_provenance(megatron.converted("llamaish", "torch_tp1pp1"))["format"] == (
        "torch, tensor parallel 1, pipeline parallel 1, checkpoint version 3"
    )
    assert found["leaves"]["layers/mlp/up/kernel"]["dtype"] == "bfloat16"
    assert found["leaves"]["layers/mlp/up/kernel"]["shape"] == [4, 64, 160]
    assert re.fullmatch(r"[0-9a-f]{64}", found["leaves"]["unembed"]["sha256"])


def test_a_tied_copy_that_differs(tmp_path: Path) -> None:
    """The last pipeline stage's copy of a tied embedding is skipped only if it equals the embedding."""
    source = tmp_path / "source"
    shutil.copytree(megatron.unpacked("gpt2ish") / "torch_tp2pp2", source)
    file = source / "iter_0000100" / "mp_rank_01_001" / "model_optim_rng.pt"
    last = file.read_bytes()
    embedding = np.asarray(megatron.params("gpt2ish")["embed"])[-1].tobytes()
    assert embedding in last
    file.write_bytes(last.replace(embedding, bytes(len(embedding))))
    with pytest.raises(UserError, match=r"output_layer.weight \(512, 64\) .* differs from .*--arch tied=false"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In plain lines when standard error is not a terminal, up to the model's size."""
    clock = itertools.count(0, 11)  # seconds, so that a line is due each time
    monkeypatch.setattr(cli, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    convert(megatron.unpacked("llamaish") / "torch_tp1pp1", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"writing \d+k/953kB", lines[0])
    assert lines[-1] == "writing 953k/953kB  0 s left"
