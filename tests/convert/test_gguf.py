"""GGUF files of llama.cpp's llama architecture, written here with llama.cpp's own package."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from kdjax.checkpoint import load_model, read_model_config
from kdjax.convert.__main__ import main
from kdjax.types import UserError

GOLDEN = Path(__file__).parent.parent / "fixtures" / "hf" / "llama"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
FIELDS = {
    "block_count": 3,
    "context_length": 64,
    "embedding_length": 24,
    "feed_forward_length": 37,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 531.0,
    "attention.layer_norm_rms_epsilon": 3e-5,
    "vocab_size": 101,
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key map in llama.cpp's order: neighbouring rows are turned into each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, **changes: Any) -> Path:
    """The golden Llama as GGUF. Llama 3's scaling stands in rope_freqs.weight, as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    drop = changes.pop("drop", "")
    for name, value in (FIELDS | changes).items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            (writer.add_float32 if isinstance(value, float) else add)(f"llama.{name}", value)
    with safe_open(GOLDEN / "model.safetensors", framework="numpy") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            stem = name.removesuffix(".weight")
            layer = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
            theirs = layer + NAMES[stem.split(".", 3)[3] if layer else stem] + ".weight"
            array = opened.get_tensor(name)
            array = permuted(array, 4) if ".attn_q" in theirs else permuted(array, 2) if ".attn_k" in theirs else array
            if theirs != drop:
                writer.add_tensor(theirs, array)
    frequency = 531.0 ** (-np.arange(0, 6, 2) / 6)
    turns = 16 * frequency / (2 * np.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / (kept + (1 - kept) / 8)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_are_transformers(tmp_path: Path) -> None:
    main(["from-gguf", str(write(tmp_path / "x.gguf")), str(tmp_path / "out"), "--arch", "rope_llama3=8,1,4,16"])
    with np.load(GOLDEN / "logits.npz") as stored:
        logits = load_model(tmp_path / "out")(stored["input_ids"])
        np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)
    assert read_model_config(tmp_path / "out").norm_eps == 3e-5
    main(["to-hf", str(tmp_path / "out"), str(tmp_path / "hf")])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"rope_freqs.weight does not scale the rotary frequencies as model.rope_llama3 = None does; .*8,1,4,8192"),
        ({"architecture": "gemma"}, r"general.architecture = 'gemma': kdjax reads only llama"),
        ({"expert_count": 4}, r"llama.expert_count = 4: kdjax has no mixture of experts"),
        ({"rope.scaling.type": "yarn"}, r"rope.scaling.type = 'yarn'"),
        ({"block_count": None}, r"llama.block_count is missing"),
        ({"drop": "blk.1.attn_k.weight"}, r"layers.1.self_attn.k_proj.weight \(12, 24\): missing"),
        ({"block_count": 2}, r"model.layers.2.*, stored as blk.2.*: no rule of this architecture uses it"),
    ],
)
def test_files_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = ["--arch", "rope_llama3=8,1,4,16"] if changes else []
    with pytest.raises(UserError, match=message):
        main(["from-gguf", str(write(tmp_path / "x.gguf", **changes)), str(tmp_path / "out"), *words])
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.gguf: there is no such file"):
        main(["from-gguf", str(tmp_path / "absent.gguf"), str(tmp_path / "out")])
    whole = write(tmp_path / "x.gguf").read_bytes()
    for size in (3, 100, len(whole) // 2):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x.gguf cannot be read as GGUF: .*copy it again"):
            main(["from-gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out")])


def test_the_package_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[gguf\]'"):
        main(["from-gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out")])
