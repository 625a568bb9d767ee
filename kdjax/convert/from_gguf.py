"""Converts a GGUF file of llama.cpp's "llama" architecture to a kdjax model directory, dequantised to float32.

llama.cpp's rotary embedding rotates neighbouring rows, where Hugging Face and kdjax rotate the two halves of a head, so
the rows of query and key projections are reordered. Of tokenizers only byte-level BPE (as SmolLM's) is converted; for
others use `to-hf --tokenizer DIR`.
"""

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.checkpoint.model_directory import MODEL_CONFIG
from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, add_import_arguments, format_table, resolve
from kdjax.convert.conversion import match_tensors
from kdjax.convert.gguf_tokenizer import tokenizer_files
from kdjax.convert.huggingface.config_json import write_architecture
from kdjax.convert.huggingface.families import FAMILIES
from kdjax.convert.huggingface.rules import huggingface_rules
from kdjax.convert.model_writer import write_model
from kdjax.convert.output_directory import refuse_existing
from kdjax.convert.tensors import LazyTensor, Tensors, transform
from kdjax.model import rope_frequencies
from kdjax.types import UserError

# kdjax key -> GGUF's name, without "llama."
KEYS = {
    "vocab_size": "vocab_size",
    "layers": "block_count",
    "d_model": "embedding_length",
    "n_heads": "attention.head_count",
    "n_groups": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "d_ff": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
OPTIONAL = {"n_groups", "head_dim", "rope_theta", "vocab_size"}
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    **{f"attn_{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkv"},
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"ffn_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
ROPE_FACTORS = "rope_freqs.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_import_arguments(parser, "the GGUF file")


def run(arguments: argparse.Namespace) -> None:
    """Reads and checks the file, prints its architecture and writes the model directory."""
    path, out = arguments.source, arguments.out
    refuse_existing(out, arguments.force, MODEL_CONFIG)
    fields, stored = _read(path)
    tokenizer = tokenizer_files(fields)
    stated = _read_architecture(fields, stored, path)
    if tokenizer:
        digest = hashlib.sha256(tokenizer["tokenizer.json"]).hexdigest()
        stated["tokenizer_sha256"] = Stated(digest, "tokenizer.ggml")
    config, values = resolve(stated, arguments.arch)
    print(f"{path}: {fields['general.architecture']}\n{format_table(values)}")
    _check_rope_factors(config, stored, path)
    llama = FAMILIES["llama"]
    tensors = {_huggingface_name(name): _reorder_rows(name, tensor, config) for name, tensor in stored.items()}
    skip = {"rotary factors": ROPE_FACTORS.replace(".", r"\.")}
    conversion = match_tensors(huggingface_rules(config, llama), tensors, config, skip, str(path))
    config_json = write_architecture(config, llama, int(fields.get("llama.context_length", 2048)), "float32")
    for token in ("bos", "eos"):
        config_json[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    files: dict[str, Path | bytes] = {"huggingface/config.json": json.dumps(config_json, indent=2).encode()}
    files |= {f"tokenizer/{name}": content for name, content in tokenizer.items()}
    provenance = {"format": "gguf", "source": path.name, "architecture": "llama"}
    write_model(out, conversion, provenance, files=files, force=arguments.force)
    print(f"wrote {out}: {conversion.nbytes / 1e9:.2f} GB of parameters")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Returns the file's fields and its tensors, unread, as float32."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files requires the gguf package: pip install 'kdjax[gguf]'")
    import gguf

    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}; copy it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise UserError(
            f"{path}: general.architecture = {fields.get('general.architecture')!r}: kdjax reads only llama"
        )

    def lazy(tensor: Any) -> LazyTensor:
        shape = tuple(int(size) for size in reversed(tensor.shape))

        def rows(start: int, stop: int) -> np.ndarray:
            return gguf.dequantize(tensor.data[start:stop], tensor.tensor_type).astype(np.float32, copy=False)

        return LazyTensor(shape, np.dtype(np.float32), str(path), rows, tensor.name)

    return fields, {tensor.name: lazy(tensor) for tensor in reader.tensors}


def _read_architecture(fields: Mapping[str, Any], tensors: Tensors, path: Path) -> dict[str, Stated]:
    """Returns what the file states of the architecture. Raises UserError for what kdjax's model does not have."""
    if fields.get("llama.expert_count", 0):
        raise UserError(f"{path}: llama.expert_count = {fields['llama.expert_count']}: kdjax has no mixture of experts")
    constants = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
    found = {key: Stated(value, "llama") for key, value in constants.items()}
    found["tied"] = Stated("output.weight" not in tensors, "output.weight")
    for key, name in KEYS.items():
        value = fields.get(f"llama.{name}")
        if value is not None:
            shortest = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.99999975e-6
            found[key] = Stated(shortest, f"llama.{name}")
        elif key not in OPTIONAL:
            raise UserError(f"{path}: llama.{name} is missing")
    if "vocab_size" not in found and "token_embd.weight" in tensors:
        found["vocab_size"] = Stated(tensors["token_embd.weight"].shape[0], "token_embd.weight")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        found["rope_linear_factor"] = Stated(fields["llama.rope.scaling.factor"], "llama.rope.scaling.factor")
    elif scaling != "none":
        raise UserError(f"{path}: llama.rope.scaling.type = {scaling!r}: kdjax has only linear and Llama 3's scaling")
    return found


def _check_rope_factors(config: ModelConfig, tensors: Tensors, path: Path) -> None:
    """Raises UserError unless the architecture scales rotary frequencies as the file does.

    llama.cpp stores the factors by which Llama 3's scaling divides the frequencies, not the four numbers behind them.
    """
    if ROPE_FACTORS not in tensors:
        return
    width = 2 * tensors[ROPE_FACTORS].shape[0]
    plain = rope_frequencies(ModelConfig(rope_theta=config.rope_theta), width)
    scaled = np.asarray(plain / rope_frequencies(config, width))
    if not np.allclose(scaled, tensors[ROPE_FACTORS].read(), rtol=1e-3):
        raise UserError(
            f"{path}: {ROPE_FACTORS} does not scale the rotary frequencies as model.rope_llama3 = "
            f"{config.rope_llama3} does; give the model's own numbers, for Llama 3.1 --arch rope_llama3=8,1,4,8192"
        )


def _huggingface_name(name: str) -> str:
    """Returns Hugging Face's name, which the rules use. Unknown names stay, and no rule uses them."""
    kind, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if kind == "blk" and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}"
    return MODEL_NAMES.get(name, name)


def _reorder_rows(name: str, tensor: LazyTensor, config: ModelConfig) -> LazyTensor:
    """Returns query and key projections with each head's rows in Hugging Face's order: first halves, second halves."""
    if not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return tensor
    half = config.head_width // 2

    def change(pairs: np.ndarray) -> np.ndarray:
        return pairs.reshape(-1, half, 2, pairs.shape[-1]).swapaxes(1, 2).reshape(pairs.shape)

    return transform(tensor, tensor.shape, change)
