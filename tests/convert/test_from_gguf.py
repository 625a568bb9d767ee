"""GGUF files of llama.cpp's llama architecture, written with llama.cpp's own package."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from models import HF_GOLDENS, safetensors

from kdjax.checkpoint import load_params, read_model_config
from kdjax.convert.__main__ import main
from kdjax.convert.provenance import read_provenance
from kdjax.types import UserError

GOLDEN = HF_GOLDENS / "llama"
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
    """Returns a query or key projection in llama.cpp's order, whose rotary embedding rotates neighbouring rows."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, **changes: Any) -> Path:
    """Writes the golden Llama as GGUF with changed fields (None: without it), as llama.cpp's converter does.

    `architecture`, `drop` (a tensor) and `frequencies` (the rotary factors, or None) are no fields.
    """
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    drop = changes.pop("drop", "")
    frequency = 531.0 ** (-np.arange(0, 6, 2) / 6)
    kept = np.clip((16 * frequency / (2 * np.pi) - 1) / 3, 0, 1)  # Llama 3's scaling with 8, 1, 4, 16
    frequencies = changes.pop("frequencies", 1 / (kept + (1 - kept) / 8))
    for name, value in (FIELDS | changes).items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add = writer.add_float32 if isinstance(value, float) else add
            add(name if name.startswith("tokenizer.") else f"llama.{name}", value)
    for name, array in safetensors(GOLDEN).items():
        stem = name.removesuffix(".weight")
        layer = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
        theirs = layer + NAMES[stem.split(".", 3)[3] if layer else stem] + ".weight"
        array = permuted(array, 4) if ".attn_q" in theirs else permuted(array, 2) if ".attn_k" in theirs else array
        if theirs != drop:
            writer.add_tensor(theirs, array)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_the_model_that_transformers_wrote(tmp_path: Path, converted_hf: Callable[[str], Path]) -> None:
    """The same architecture and arrays as from Hugging Face, which compute transformers' logits (test_from_hf.py)."""
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 5}
    path = write(tmp_path / "x.gguf", **tokens)
    main(["from-gguf", str(path), str(tmp_path / "out"), "--arch", "rope_llama3=8,1,4,16"])
    theirs = read_model_config(converted_hf("llama"))
    found = read_model_config(tmp_path / "out")
    assert found == dataclasses.replace(theirs, tokenizer_sha256=None)
    params = load_params(tmp_path / "out", found), load_params(converted_hf("llama"), theirs)
    jax.tree.map(np.testing.assert_array_equal, *params)
    provenance = read_provenance(tmp_path / "out")
    wanted = {"format": "gguf", "source": "x.gguf", "architecture": "llama", "skipped": {"rotary factors": 1}}
    assert {key: provenance[key] for key in wanted} == wanted
    main(["to-hf", str(tmp_path / "out"), str(tmp_path / "hf")])
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["bos_token_id"], written["eos_token_id"]) == (64, 1, 5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention.head_count_kv": 2, "attention.key_length": 6}, {"n_groups": 2, "head_dim": 6}),
        ({"vocab_size": None}, {"vocab_size": 101}),  # the embedding's rows
        ({"rope.freq_base": None}, {"rope_theta": 10000.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_linear_factor": 4.0, "rope_theta": 531.0, "norm_eps": 3e-5, "tied": False},
        ),
        ({"rope.scaling.type": "none", "drop": "output.weight"}, {"rope_linear_factor": 1.0, "tied": True}),
    ],
)
def test_what_the_fields_state(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    main(["from-gguf", str(write(tmp_path / "x.gguf", frequencies=None, **changes)), str(tmp_path / "out")])
    found = read_model_config(tmp_path / "out")
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"rope_freqs.weight does not scale the rotary frequencies as model.rope_llama3 = None does; .*8,1,4,8192"),
        ({"architecture": "gemma"}, r"general.architecture = 'gemma': kdjax reads only llama"),
        ({"expert_count": 4}, r"llama.expert_count = 4: kdjax has no mixture of experts"),
        ({"rope.scaling.type": "yarn"}, r"rope.scaling.type = 'yarn': kdjax has only linear and Llama 3's"),
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


def test_files_that_are_no_gguf_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.gguf: there is no such file"):
        main(["from-gguf", str(tmp_path / "absent.gguf"), str(tmp_path / "out")])
    whole = write(tmp_path / "x.gguf").read_bytes()
    for size in (3, 100, len(whole) // 2):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x.gguf cannot be read as GGUF: .*copy it again"):
            main(["from-gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out")])


def test_the_package_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[gguf\]'"):
        main(["from-gguf", str(tmp_path / "x.gguf"), str(tmp_path / "out")])
