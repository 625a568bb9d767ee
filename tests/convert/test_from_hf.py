"""Hugging Face checkpoints compute transformers' own logits, and those that do not fit are refused by name.

`tests/fixtures/hf` was written by transformers (scripts/tools/make_hf_goldens.py).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from models import HF_GOLDENS, HF_NAMES, logits, safetensors
from safetensors.numpy import save_file

from kdjax.checkpoint import load_params, read_model_config
from kdjax.convert.__main__ import main
from kdjax.convert.provenance import read_provenance
from kdjax.types import UserError

Held = dict[str, np.ndarray]
Golden = Callable[..., Path]


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    """Returns a copy of a family's checkpoint with changes to config.json (... removes a key) and to the tensors."""

    def copy(family: str, change: Callable[[Held], None] | None = None, **settings: Any) -> Path:
        directory = tmp_path / "golden"
        shutil.copytree(HF_GOLDENS / family, directory)
        config = json.loads((directory / "config.json").read_text())
        config |= {key: value for key, value in settings.items() if value is not ...}
        config = {key: value for key, value in config.items() if settings.get(key) is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        if change is not None:
            held = safetensors(directory)
            change(held)
            save_file(held, directory / "model.safetensors", {"format": "pt"})
        return directory

    return copy


def assert_logits(model: Path, family: str) -> None:
    with np.load(HF_GOLDENS / family / "logits.npz") as stored:
        np.testing.assert_allclose(logits(model, stored["input_ids"]), stored["logits"], rtol=0, atol=2e-5)
        assert np.std(stored["logits"]) > 0.5


@pytest.mark.parametrize("family", HF_NAMES)
def test_logits_are_transformers(family: str, converted_hf: Callable[[str], Path]) -> None:
    assert_logits(converted_hf(family), family)


def test_other_files_and_provenance(converted_hf: Callable[[str], Path]) -> None:
    directory = converted_hf("llama")
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (directory / "tokenizer").iterdir()) == tokenizer
    for name in ("config.json", "generation_config.json"):
        assert (directory / "huggingface" / name).read_bytes() == (HF_GOLDENS / "llama" / name).read_bytes()
    assert len(read_model_config(directory).tokenizer_sha256 or "") == 64
    found = read_provenance(directory)
    wanted = {"format": "huggingface", "source": "llama", "architecture": "LlamaForCausalLM", "skipped": {}}
    assert {key: found[key] for key in wanted} == wanted


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["from-hf", str(HF_GOLDENS / "llama"), str(tmp_path / "out"), "--arch", "norm_eps=1e-5"])
    first, *table, last = capsys.readouterr().out.splitlines()
    assert first == f"{HF_GOLDENS / 'llama'}: LlamaForCausalLM"
    assert ["norm_eps", "1e-05", "--arch norm_eps=1e-5"] in [line.split(maxsplit=2) for line in table]
    assert ["rope_theta", "531.0", "rope_theta"] in [line.split(maxsplit=2) for line in table]
    assert last == f"wrote {tmp_path / 'out'}: 0.00 GB of parameters, 4 other files"


def test_two_conversions_are_byte_equal(converted_hf: Callable[[str], Path], tmp_path: Path) -> None:
    first, again = converted_hf("gpt2"), tmp_path / "again"
    main(["from-hf", str(HF_GOLDENS / "gpt2"), str(again)])
    paths = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(paths) > 10
    assert paths == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in paths:
        assert (first / path).read_bytes() == (again / path).read_bytes(), path


def test_names_without_the_head_model_and_buffers_of_old_versions(golden: Golden, tmp_path: Path) -> None:
    """As OpenAI's GPT-2 is stored: no "transformer.", a causal mask a layer, and the tied head beside the embedding."""

    def older(held: Held) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)
        held["h.0.attn.bias"] = np.tril(np.ones((1, 1, 31, 31), np.float32))
        held["h.1.attn.masked_bias"] = np.full(1, -1e4, np.float32)
        held["lm_head.weight"] = held["wte.weight"]

    main(["from-hf", str(golden("gpt2", older)), str(tmp_path / "out")])
    assert read_provenance(tmp_path / "out")["skipped"] == {"causal masks": 2, "copies of the embedding": 1}
    assert_logits(tmp_path / "out", "gpt2")


def test_stored_rotary_frequencies_are_skipped(golden: Golden, tmp_path: Path) -> None:
    def older(held: Held) -> None:
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        held["model.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    main(["from-hf", str(golden("llama", older)), str(tmp_path / "out")])
    assert read_provenance(tmp_path / "out")["skipped"] == {"rotary frequencies": 2}


def test_config_json_as_transformers_4_wrote_it(golden: Golden, tmp_path: Path, converted_hf: Any) -> None:
    scaling = json.loads((HF_GOLDENS / "llama" / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    older = {"rope_parameters": ..., "head_dim": ..., "dtype": ..., "torch_dtype": "float32"}
    main(["from-hf", str(golden("llama", **older, rope_theta=theta, rope_scaling=scaling)), str(tmp_path / "out")])
    assert read_model_config(tmp_path / "out") == read_model_config(converted_hf("llama"))


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
        ("llama", {"rope_parameters": ..., "rope_theta": ...}, {"rope_theta": 10000.0, "rope_llama3": None}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 3.0,
                }
            },
            {"rope_llama3": (2.0, 1.0, 3.0, 64.0)},  # the original length is max_position_embeddings
        ),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 3.0}},
            {"rope_linear_factor": 3},
        ),
        ("gpt2", {"activation_function": "gelu"}, {"activation": "gelu"}),
        ("gpt2", {"activation_function": ...}, {"activation": "gelu_tanh"}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ("gpt2", {"activation_function": "gelu_fast"}, {"activation": "gelu_tanh"}),
        ("gpt2", {"layer_norm_epsilon": ...}, {"norm_eps": 1e-5}),
        ("gpt2", {"architectures": ...}, {"position": "learned", "max_positions": 31, "tied": True}),
    ],
)
def test_what_config_json_states(
    family: str, settings: dict[str, Any], expected: dict[str, Any], golden: Golden, tmp_path: Path
) -> None:
    main(["from-hf", str(golden(family, **settings)), str(tmp_path / "out")])
    found = read_model_config(tmp_path / "out")
    assert {key: getattr(found, key) for key in expected} == expected


def drop(name: str) -> Callable[[Held], None]:
    return lambda held: held.__delitem__(name)


def put(name: str, array: np.ndarray) -> Callable[[Held], None]:
    return lambda held: held.update({name: array})


def refused(directory: Path, tmp_path: Path, message: str, *words: str) -> None:
    """Asserts that the conversion is refused in these words and leaves nothing behind."""
    with pytest.raises(UserError, match=message):
        main(["from-hf", str(directory), str(tmp_path / "out"), *words])
    assert {path.name for path in tmp_path.iterdir()} <= {"golden"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("model.norm.weight"),
            r"golden \(LlamaForCausalLM\) does .*(\n.*)*model.norm.weight \(24,\): missing; needed",
        ),
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
            r"model.norm.weight is stored as I32; kdjax reads F32, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Held], None], message: str, golden: Golden, tmp_path: Path) -> None:
    refused(golden("llama", change), tmp_path, message)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, r"architectures = .*: kdjax converts LlamaFor"),
        ("llama", {"model_type": "mixtral"}, r"model_type = 'mixtral': kdjax converts LlamaForCausalLM \(llama\)"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu': kdjax's model has only 'silu'"),
        ("llama", {"attention_bias": True}, r"attention_bias = True, mlp_bias = False: .*in both attention and MLP"),
        ("llama", {"mlp_bias": True}, r"attention_bias = False, mlp_bias = True: "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_type = 'yarn': .*linear and llama3",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"factor is missing in the scaling"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5: in transformers these families"),
        ("llama", {"num_hidden_layers": ...}, r"config.json: num_hidden_layers is missing"),
        ("llama", {"num_hidden_layers": 2}, r"model.layers.2.*: no rule of this architecture uses it"),
        ("llama", {"num_key_value_heads": 3}, r"model.n_groups = 3: it must divide"),
        ("qwen3", {"attention_bias": True}, r"attention_bias = True: kdjax's model has only False"),
        ("mistral", {"sliding_window": 32}, r"sliding_window = 32: .*up to 32 tokens.*--full-attention"),
        ("mistral", {"sliding_window": 63}, r"sliding_window = 63"),
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
        ("gpt2", {"n_inner": None}, r"c_fc.weight \(24, 37\).* needs \(24, 96\)"),  # 4 n_embd
    ],
)
def test_architectures_that_cannot_be_expressed(
    family: str, settings: dict[str, Any], message: str, golden: Golden, tmp_path: Path
) -> None:
    refused(golden(family, **settings), tmp_path, message)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 64}),  # as long as its longest sequence
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "layer_types": ...}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ..., "max_window_layers": 3}),
        ("llama", {"sliding_window": 8}),  # which transformers' Llama does not read
    ],
)
def test_windows_without_effect(family: str, settings: dict[str, Any], golden: Golden, tmp_path: Path) -> None:
    main(["from-hf", str(golden(family, **settings)), str(tmp_path / "out")])
    assert read_model_config(tmp_path / "out").layers in (2, 3)


def test_a_window_with_effect_may_be_accepted(golden: Golden, tmp_path: Path) -> None:
    main(["from-hf", str(golden("mistral", sliding_window=32)), str(tmp_path / "out"), "--full-attention"])
    assert read_model_config(tmp_path / "out").layers == 2


def test_a_head_that_is_said_to_be_tied_and_is_not(golden: Golden, tmp_path: Path) -> None:
    directory = golden("smollm2", put("lm_head.weight", np.zeros((101, 24), ml_dtypes.bfloat16)))
    refused(directory, tmp_path, r"lm_head.weight differs from model.embed_tokens.weight; .*--arch tied=False")
    main(["from-hf", str(directory), str(tmp_path / "out"), "--arch", "tied=False"])
    params = load_params(tmp_path / "out", read_model_config(tmp_path / "out"))
    assert np.any(params["embed"])
    assert not np.any(params["unembed"])


def test_a_tied_head_without_its_embedding(golden: Golden, tmp_path: Path) -> None:
    def change(held: Held) -> None:
        held["lm_head.weight"] = held.pop("model.embed_tokens.weight")

    refused(golden("smollm2", change), tmp_path, r"model.embed_tokens.weight \(101, 24\): missing; needed for embed")


def test_files_that_are_damaged_or_missing(golden: Golden, tmp_path: Path) -> None:
    directory = golden("qwen2")
    shard, index = directory / "model-00001-of-00002.safetensors", directory / "model.safetensors.index.json"
    whole, indexed = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[:-7])
    refused(directory, tmp_path, r"00001-of-00002.safetensors cannot be read: .*copy it again")
    shard.unlink()
    refused(directory, tmp_path, r"00001-of-00002.safetensors cannot be read: .*[Nn]o such file")
    shutil.copyfile(directory / "model-00002-of-00002.safetensors", shard)
    refused(
        directory, tmp_path, r"00001-of-00002.safetensors holds .*, but model.safetensors.index.json says that model-"
    )
    shard.write_bytes(whole)
    weight_map = json.loads(indexed)["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.x": shard.name}}))
    refused(
        directory, tmp_path, r"00001-of-00002.safetensors does not hold model.x, as model.safetensors.index.json says"
    )
    lost = next(name for name, file in weight_map.items() if file == shard.name)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if name != lost}}))
    refused(directory, tmp_path, rf"holds {lost}, but .* says that no file does; copy both again")
    for content in ("[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{}"):
        index.write_text(content)
        refused(directory, tmp_path, r"index.json(: it has no weight_map| must hold a JSON object; it holds a list)")


def test_directories_without_a_checkpoint(golden: Golden, tmp_path: Path) -> None:
    directory = golden("llama")
    (directory / "config.json").write_text("{")
    refused(directory, tmp_path, r"config.json is not valid JSON")
    (directory / "config.json").unlink()
    refused(directory, tmp_path, r"config.json: there is no such file")
    (directory / "model.safetensors").unlink()
    refused(directory, tmp_path, r"holds neither model.safetensors nor model.safetensors.index.json$")
    (directory / "x.gguf").touch()
    refused(directory, tmp_path, r"index.json \(only x.gguf\)$")
    for name in ("a.bin", "b.bin", "c.bin"):
        (directory / name).touch()
    refused(directory, tmp_path, r"index.json \(only a.bin, b.bin, c.bin\); load it with transformers and save_pretr")
    refused(tmp_path / "absent" / "llama", tmp_path, r"no such directory; download it first")
    refused(Path("absent"), tmp_path, r"absent: there is no such directory$")
