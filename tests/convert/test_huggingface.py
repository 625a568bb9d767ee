"""Hugging Face checkpoints: transformers' own logits, bit-exact round trips, and what is told of those that do not fit.

`tests/fixtures/hf` was written by transformers (scripts/tools/make_hf_goldens.py);
scripts/tools/check_hf.py has it read ours.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kdjax.checkpoint import load_model, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.convert.huggingface.config_json import choose_family
from kdjax.model import init_params
from kdjax.types import UserError

GOLDENS = Path(__file__).parent.parent / "fixtures" / "hf"
FAMILIES = sorted(path.name for path in GOLDENS.iterdir())


def tensors(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's model directory, converted once."""
    root = tmp_path_factory.mktemp("converted")

    def convert(family: str) -> Path:
        if not (root / family).exists():
            main(["from-hf", str(GOLDENS / family), str(root / family)])
        return root / family

    return convert


@pytest.fixture
def golden(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's checkpoint with changes to config.json and to the tensors."""

    def copy(family: str, change: Callable[[dict], None] | None = None, **settings: Any) -> Path:
        directory = tmp_path / "golden"
        shutil.copytree(GOLDENS / family, directory)
        config = json.loads((directory / "config.json").read_text())
        config |= {key: value for key, value in settings.items() if value is not ...}
        config = {key: value for key, value in config.items() if settings.get(key) is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        if change is not None:
            held = tensors(directory)
            change(held)
            save_file(held, directory / "model.safetensors", {"format": "pt"})
        return directory

    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str, converted: Callable[[str], Path]) -> None:
    with np.load(GOLDENS / family / "logits.npz") as stored:
        logits = load_model(converted(family))(stored["input_ids"])
        np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)
        assert np.std(stored["logits"]) > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family: str, converted: Callable[[str], Path], tmp_path: Path) -> None:
    """Every tensor's name, dtype and bits, and every key of config.json that transformers had written."""
    main(["to-hf", str(converted(family)), str(tmp_path / "back")])
    before, after = tensors(GOLDENS / family), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        np.testing.assert_array_equal(after[name].view(np.uint8), array.view(np.uint8), err_msg=name)
    old, new = (json.loads((path / "config.json").read_text()) for path in (GOLDENS / family, tmp_path / "back"))
    assert {key: new.get(key) for key in old} == old
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (GOLDENS / family / name).exists():
            assert (tmp_path / "back" / name).read_bytes() == (GOLDENS / family / name).read_bytes()


def test_files_travel_along(converted: Callable[[str], Path]) -> None:
    directory = converted("llama")
    assert sorted(path.name for path in (directory / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (directory / "huggingface" / "generation_config.json").exists()
    assert len(read_model_config(directory).tokenizer_sha256 or "") == 64


def test_two_conversions_are_byte_equal(converted: Callable[[str], Path], tmp_path: Path) -> None:
    first = converted("gpt2")
    main(["from-hf", str(GOLDENS / "gpt2"), str(tmp_path / "again")])
    paths = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(paths) > 10
    assert paths == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for path in paths:
        assert (first / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_shards_and_dtypes_of_what_is_written(converted: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["to-hf", str(converted("qwen3")), str(out), "--max-shard-gb=2e-5", "--dtype=bfloat16"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before, after = tensors(GOLDENS / "qwen3"), tensors(out)
    assert index["weight_map"].keys() == after.keys() == before.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array.astype(ml_dtypes.bfloat16), err_msg=name)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    main(["from-hf", str(out), str(tmp_path / "again")])
    assert read_model_config(tmp_path / "again") == read_model_config(converted("qwen3"))


def test_names_without_the_head_model_and_buffers_of_old_versions(golden: Callable[..., Path], tmp_path: Path) -> None:
    """As OpenAI's GPT-2 is stored: no "transformer.", a causal mask a layer, and the tied head beside the embedding."""

    def older(held: dict[str, np.ndarray]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)
        held["h.0.attn.bias"] = np.tril(np.ones((1, 1, 31, 31), np.float32))
        held["lm_head.weight"] = held["wte.weight"]

    main(["from-hf", str(golden("gpt2", older)), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["skipped"] == {
        "causal masks": 1,
        "copies of the embedding": 1,
    }
    with np.load(GOLDENS / "gpt2" / "logits.npz") as stored:
        logits = load_model(tmp_path / "out")(stored["input_ids"])
        np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)


def test_config_json_as_transformers_4_wrote_it(golden: Callable[..., Path], tmp_path: Path) -> None:
    scaling = json.loads((GOLDENS / "llama" / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    older = {"rope_parameters": ..., "head_dim": ..., "dtype": ..., "torch_dtype": "float32"}
    directory = golden("llama", **older, rope_theta=theta, rope_scaling=scaling)
    main(["from-hf", str(directory), str(tmp_path / "out")])
    with np.load(GOLDENS / "llama" / "logits.npz") as stored:
        logits = load_model(tmp_path / "out")(stored["input_ids"])
        np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    main(["from-hf", str(GOLDENS / "gpt2"), str(tmp_path / "model")])
    chunk = tmp_path / "model" / "params" / "layers.mlp.down.kernel" / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel cannot be read"):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held.__delitem__(name)


def put(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.norm.weight"), r"model.norm.weight \(24,\): missing; needed for final_norm/scale"),
        (drop("model.layers.1.mlp.up_proj.weight"), r"layers.1.mlp.up_proj.weight \(37, 24\): missing"),
        (put("model.layers.3.x", np.zeros(3)), r"model.layers.3.x \(3,\) float64 in .*: no rule"),
        (
            put("lm_head.weight", np.zeros((7, 24), np.float32)),
            r"lm_head.weight \(7, 24\) float32 in .*model.safetensors: unembed needs \(101, 24\)",
        ),
        (
            put("model.layers.2.self_attn.k_proj.weight", np.zeros((24, 24), np.float32)),
            r"k_proj.weight \(24, 24\) float32 in .*: layers/attn/k/kernel needs \(12, 24\)",
        ),
        (
            put("model.norm.weight", np.zeros(24, np.int32)),
            r"model.norm.weight is stored as I32; kdjax reads F32",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, np.ndarray]], None], message: str, golden: Callable[..., Path], tmp_path: Path
) -> None:
    refused(golden("llama", change), tmp_path, message)


def refused(directory: Path, tmp_path: Path, message: str, *words: str) -> None:
    """The conversion is refused in these words, and leaves nothing behind."""
    with pytest.raises(UserError, match=message):
        main(["from-hf", str(directory), str(tmp_path / "out"), *words])
    assert {path.name for path in tmp_path.iterdir()} <= {"golden"}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, r"architectures = .*: kdjax converts LlamaFor"),
        ("llama", {"model_type": "mixtral"}, r"model_type = 'mixtral': kdjax converts LlamaForCausalLM \(llama\)"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu': kdjax's model has only 'silu'"),
        (
            "llama",
            {"attention_bias": True},
            r"attention_bias = True, mlp_bias = False: .*in both attention and MLP",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_type = 'yarn': .*scalings linear and llama3",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"factor is missing in the scaling"),
        ("llama", {"num_hidden_layers": ...}, r"num_hidden_layers is missing"),
        ("llama", {"num_hidden_layers": 2}, r"model.layers.2.*: no rule of this architecture uses it"),
        ("llama", {"num_key_value_heads": 3}, r"model.n_groups = 3: it must divide"),
        ("qwen3", {"attention_bias": True}, r"attention_bias = True"),
        ("mistral", {"sliding_window": 32}, r"sliding_window = 32: .*--full-attention"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
            r"window = 8",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ..., "max_window_layers": 2},
            r"window = 8",
        ),
        ("gpt2", {"activation_function": "relu"}, r"activation_function = 'relu': kdjax converts gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_architectures_that_cannot_be_expressed(
    family: str, settings: dict[str, Any], message: str, golden: Callable[..., Path], tmp_path: Path
) -> None:
    refused(golden(family, **settings), tmp_path, message)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 64}),  # as long as its longest sequence
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": ...}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ..., "max_window_layers": 3}),
        ("llama", {"sliding_window": 8}),  # which transformers' Llama does not read
    ],
)
def test_windows_without_effect(
    family: str, settings: dict[str, Any], golden: Callable[..., Path], tmp_path: Path
) -> None:
    main(["from-hf", str(golden(family, **settings)), str(tmp_path / "out")])
    assert read_model_config(tmp_path / "out").layers in (2, 3)


def test_a_window_longer_than_what_is_read_may_be_waived(golden: Callable[..., Path], tmp_path: Path) -> None:
    main(["from-hf", str(golden("mistral", sliding_window=32)), str(tmp_path / "out"), "--full-attention"])
    assert read_model_config(tmp_path / "out").layers == 2


def test_a_head_that_is_said_to_be_tied_and_is_not(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("smollm2", put("lm_head.weight", np.zeros((101, 24), ml_dtypes.bfloat16)))
    refused(directory, tmp_path, r"lm_head.weight differs from model.embed_tokens.weight; .*--arch tied=False")
    main(["from-hf", str(directory), str(tmp_path / "out"), "--arch", "tied=False"])
    assert not np.any(load_model(tmp_path / "out")(np.zeros((1, 3), np.int32)))


def test_files_that_are_damaged_or_not_there(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("qwen2")
    shard = directory / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(directory, tmp_path, r"00001-of-00002.safetensors cannot be read: .*copy it again")
    shard.unlink()
    refused(directory, tmp_path, r"00001-of-00002.safetensors cannot be read: .*[Nn]o such file")
    shutil.copyfile(directory / "model-00002-of-00002.safetensors", shard)
    refused(
        directory, tmp_path, r"00001-of-00002.safetensors holds .*, but model.safetensors.index.json says that model-"
    )
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, tmp_path, r"holds neither model.safetensors nor model.safetensors.index.json")
    refused(tmp_path / "absent" / "llama", tmp_path, r"no such directory; download it first")
    (directory / "model.safetensors").write_bytes(whole)
    (directory / "config.json").write_text("{")
    refused(directory, tmp_path, r"config.json is not valid JSON")


def test_an_existing_directory_is_kept_without_force(converted: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists already; .*--force"):
        main(["to-hf", str(converted("gpt2")), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"directories that hold config.json, and .*out does not; move it away"):
        main(["to-hf", str(converted("gpt2")), str(tmp_path / "out"), "--force"])
    (tmp_path / "out" / "config.json").write_text("{}")
    main(["to-hf", str(converted("gpt2")), str(tmp_path / "out"), "--force"])
    assert (tmp_path / "out" / "model.safetensors").exists()


MODEL = ModelConfig(layers=2, d_model=16, n_heads=4, n_groups=2, head_dim=4, d_ff=24, vocab_size=61, tied=False)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"bias": True}, "llama"),
        ({"head_dim": 6, "rope_llama3": (8.0, 1.0, 4.0, 64.0)}, "llama"),
        ({"qkv_bias": True, "rope_linear_factor": 2.0}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        (
            {
                "position": "learned",
                "max_positions": 9,
                "norm": "layernorm",
                "bias": True,
                "activation": "gelu",
                "n_groups": 4,
            },
            "gpt2",
        ),
    ],
    ids=str,
)
def test_the_family_follows_from_the_architecture(changes: dict[str, Any], family: str) -> None:
    assert choose_family(dataclasses.replace(MODEL, **changes), None).model_type == family


def test_the_family_it_came_from_is_preferred() -> None:
    assert choose_family(MODEL, "mistral").model_type == "mistral"
    assert choose_family(dataclasses.replace(MODEL, qk_norm=True), "mistral").model_type == "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm_1p"}, r"llama: norm = 'layernorm_1p' \(it has 'rmsnorm'\)(.|\n)*gpt2: .*'swiglu'"),
        ({"activation": "squared_relu"}, r"llama: activation = 'squared_relu' \(it has 'swiglu'\)"),
        ({"rope_fraction": 0.5}, r"llama: rope_fraction = 0.5 \(it has 1.0\)"),
        ({"qkv_bias": True, "qk_norm": True}, r"qwen2: qk_norm = True"),
    ],
)
def test_a_model_of_no_family(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(MODEL, **changes)
    save_model(tmp_path / "model", config, init_params(config, 0))
    with pytest.raises(UserError, match=message):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out"), "--max-positions", "9"])
    assert not (tmp_path / "out").exists()


def test_padded_rows_are_stripped_or_kept(tmp_path: Path) -> None:
    config = dataclasses.replace(MODEL, padded_vocab_size=64)
    params = init_params(config, 0)
    save_model(tmp_path / "model", config, params)
    for choice, rows in (("strip", 61), ("keep", 64)):
        out = tmp_path / choice
        main(["to-hf", str(tmp_path / "model"), str(out), "--max-positions=9", f"--vocab-padding={choice}"])
        assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
        np.testing.assert_array_equal(tensors(out)["lm_head.weight"], params["unembed"][:rows])


def test_the_longest_sequence_must_be_known(tmp_path: Path) -> None:
    save_model(tmp_path / "model", MODEL, init_params(MODEL, 0))
    with pytest.raises(UserError, match=r"give --max-positions N"):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out")])
