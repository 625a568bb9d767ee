"""Models go out as Hugging Face checkpoints: the bytes that transformers wrote, and the family that fits.

scripts/tools/check_hf.py has transformers read what is written here.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from models import HF_GOLDENS, HF_NAMES, safetensors, save_random_model

from kdjax.checkpoint import read_model_config
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main
from kdjax.convert.huggingface.config_json import choose_family
from kdjax.convert.huggingface.safetensors_files import SafetensorsWriter
from kdjax.types import UserError

MODEL = ModelConfig(layers=2, d_model=16, n_heads=4, n_groups=2, head_dim=4, d_ff=24, vocab_size=61, tied=False)
LEARNED = {"position": "learned", "max_positions": 9, "norm": "layernorm", "bias": True, "n_groups": 4}


def config_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("family", HF_NAMES)
def test_round_trip_is_exact(family: str, converted_hf: Callable[[str], Path], tmp_path: Path) -> None:
    """Every tensor's name, dtype and bits, and every key of config.json that transformers had written."""
    main(["to-hf", str(converted_hf(family)), str(tmp_path / "back")])
    before, after = safetensors(HF_GOLDENS / family), safetensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        np.testing.assert_array_equal(after[name].view(np.uint8), array.view(np.uint8), err_msg=name)
    old, new = config_json(HF_GOLDENS / family), config_json(tmp_path / "back")
    assert {key: new.get(key) for key in old} == old
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (HF_GOLDENS / family / name).exists():
            assert (tmp_path / "back" / name).read_bytes() == (HF_GOLDENS / family / name).read_bytes()


def test_what_is_printed(
    converted_hf: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = converted_hf("gpt2")
    capsys.readouterr()
    main(["to-hf", str(model), str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'out'}: GPT2LMHeadModel, 28 tensors, 0.00 GB, float32",
        "no tokenizer files were found for it; --tokenizer DIR copies them from DIR",
    ]


def test_shards_and_dtypes_of_what_is_written(converted_hf: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["to-hf", str(converted_hf("qwen3")), str(out), "--max-shard-gb=2e-5", "--dtype=bfloat16"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before, after = safetensors(HF_GOLDENS / "qwen3"), safetensors(out)
    assert index["weight_map"].keys() == after.keys() == before.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array.astype(ml_dtypes.bfloat16), err_msg=name)
    assert config_json(out)["dtype"] == config_json(out)["torch_dtype"] == "bfloat16"
    main(["from-hf", str(out), str(tmp_path / "again")])
    assert read_model_config(tmp_path / "again") == read_model_config(converted_hf("qwen3"))


def test_files_are_cut_where_one_would_be_too_large(tmp_path: Path) -> None:
    """Full to the last byte; a tensor larger than a file gets one of its own."""
    shapes = {"a": (3,), "b": (1,), "c": (9,), "d": (1,), "e": (3,), "f": (1,)}
    tensors = {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    arrays = {name: np.full(shape, number, np.float32) for number, (name, shape) in enumerate(shapes.items())}
    SafetensorsWriter(tmp_path, tensors, 16).write(iter(arrays.items()))
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    numbers = {name: int(file.removeprefix("model-")[:5]) for name, file in weight_map.items()}
    assert numbers == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 3, "f": 4}
    assert set(weight_map.values()) == {f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)}
    for file in set(weight_map.values()):
        assert (8 + int.from_bytes((tmp_path / file).read_bytes()[:8], "little")) % 8 == 0  # the tensors are aligned
    for name, array in safetensors(tmp_path).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_writer_takes_only_what_was_announced(tmp_path: Path) -> None:
    tensors = {"a": ((2,), np.dtype(np.float32))}
    good = ("a", np.zeros(2, np.float32))
    for given in ([("b", good[1])], [("a", np.zeros(3, np.float32))], [("a", np.zeros(2))], [good, good]):
        with pytest.raises(AssertionError):
            SafetensorsWriter(tmp_path, tensors).write(iter(given))
    SafetensorsWriter(tmp_path, tensors).write(iter([good]))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    main(["from-hf", str(HF_GOLDENS / "gpt2"), str(tmp_path / "model")])
    chunk = tmp_path / "model" / "params" / "layers.mlp.down.kernel" / "1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel cannot be read"):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_directory_is_kept_without_force(converted_hf: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists already; .*--force"):
        main(["to-hf", str(converted_hf("gpt2")), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"directories that hold config.json, and .*out does not; move it away"):
        main(["to-hf", str(converted_hf("gpt2")), str(tmp_path / "out"), "--force"])
    (tmp_path / "out" / "config.json").write_text("{}")
    main(["to-hf", str(converted_hf("gpt2")), str(tmp_path / "out"), "--force"])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"bias": True}, "llama"),
        ({"head_dim": 6, "rope_llama3": (8.0, 1.0, 4.0, 64.0)}, "llama"),
        ({"rope_linear_factor": 2.0, "norm_eps": 1e-3, "tied": True}, "llama"),
        ({"qkv_bias": True, "rope_linear_factor": 2.0}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        (LEARNED | {"activation": "gelu"}, "gpt2"),
        (LEARNED | {"activation": "gelu_tanh", "padded_vocab_size": 64}, "gpt2"),
    ],
    ids=str,
)
def test_the_family_follows_from_the_architecture(changes: dict[str, Any], family: str) -> None:
    assert choose_family(dataclasses.replace(MODEL, **changes), None).model_type == family


def test_the_family_that_it_came_from_is_preferred() -> None:
    assert choose_family(MODEL, "mistral").model_type == "mistral"
    assert choose_family(dataclasses.replace(MODEL, qk_norm=True), "mistral").model_type == "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm_1p"}, r"llama: norm = 'layernorm_1p' \(it has 'rmsnorm'\)(.|\n)*gpt2: .*'swiglu'"),
        ({"activation": "squared_relu"}, r"llama: activation = 'squared_relu' \(it has 'swiglu'\)"),
        ({"rope_fraction": 0.5}, r"llama: rope_fraction = 0.5 \(it has 1.0\)"),
        ({"qkv_bias": True, "qk_norm": True}, r"qwen2: qk_norm = True"),
        (LEARNED | {"activation": "gelu", "n_groups": 2}, r"gpt2: n_groups = 2 \(it has 4\)"),
    ],
)
def test_a_model_of_no_family(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", dataclasses.replace(MODEL, **changes))
    with pytest.raises(UserError, match=r"no Hugging Face family that kdjax writes can(.|\n)*" + message):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out"), "--max-positions", "9"])
    assert not (tmp_path / "out").exists()


def test_padded_rows_are_stripped_or_kept(tmp_path: Path) -> None:
    params = save_random_model(tmp_path / "model", dataclasses.replace(MODEL, padded_vocab_size=64))
    for words, rows in (([], 61), (["--vocab-padding=strip"], 61), (["--vocab-padding=keep"], 64)):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out"), "--max-positions=9", "--force", *words])
        assert config_json(tmp_path / "out")["vocab_size"] == rows
        found = safetensors(tmp_path / "out")
        np.testing.assert_array_equal(found["lm_head.weight"], params["unembed"][:rows])
        np.testing.assert_array_equal(found["model.embed_tokens.weight"], params["embed"][:rows])


def test_the_longest_sequence(tmp_path: Path, converted_hf: Callable[[str], Path]) -> None:
    """As given, else the source's; learned positions have one length only."""
    save_random_model(tmp_path / "model", MODEL)
    with pytest.raises(UserError, match=r"model does not state its longest sequence; give --max-positions N"):
        main(["to-hf", str(tmp_path / "model"), str(tmp_path / "out")])
    for model, words, expected in (
        (tmp_path / "model", ["--max-positions=9"], ("max_position_embeddings", 9)),
        (converted_hf("llama"), [], ("max_position_embeddings", 64)),
        (converted_hf("llama"), ["--max-positions=9"], ("max_position_embeddings", 9)),
        (converted_hf("gpt2"), ["--max-positions=9"], ("n_positions", 31)),
    ):
        main(["to-hf", str(model), str(tmp_path / "out"), "--force", *words])
        assert config_json(tmp_path / "out")[expected[0]] == expected[1]


def test_what_another_family_inherits(tmp_path: Path, converted_hf: Callable[[str], Path]) -> None:
    """No key of the source's config.json; without these two transformers would take its class's own tokens."""
    model = tmp_path / "model"
    save_random_model(model, MODEL)
    (model / "huggingface").mkdir()
    for family, expected in (("llama", 2), ("qwen3", None)):
        settings = config_json(HF_GOLDENS / family) | {"unheard_of": 1}
        (model / "huggingface" / "config.json").write_text(json.dumps(settings))
        main(["to-hf", str(model), str(tmp_path / "out"), "--max-positions=9", "--force"])
        written = config_json(tmp_path / "out")
        assert (written["model_type"], written["eos_token_id"]) == ("llama", expected)
        assert ("unheard_of" in written) == (family == "llama")
        assert written["rope_theta"] == MODEL.rope_theta
