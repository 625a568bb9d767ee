"""A GGUF file of llama.cpp's "llama" architecture as a kdjax model directory, dequantised to float32.

llama.cpp stores the rows of the query and key maps in the order of its own rotary embedding, which turns neighbours
where Hugging Face and kdjax turn halves; they are put back. Tokenizers are not converted: give `to-hf --tokenizer DIR`.
"""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, add_arch_argument, settle, table
from kdjax.convert.huggingface.families import FAMILIES, settings
from kdjax.convert.huggingface.rules import rules
from kdjax.convert.model_writer import refuse_existing, write_model
from kdjax.convert.rules import plan
from kdjax.convert.tensors import StoredTensor, transformed
from kdjax.model import rope_frequencies
from kdjax.types import UserError

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
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROPE_FACTORS = "rope_freqs.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("checkpoint", metavar="IN", type=Path, help="GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="model directory to be written")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")
    add_arch_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads, checks, prints the architecture, converts."""
    path, out = arguments.checkpoint, arguments.out
    refuse_existing(out, arguments.force)
    fields, tensors = _read(path)
    said = _stated(fields, tensors, str(path))
    config, origins = settle(said, arguments.arch)
    print(f"{path}: {fields['general.architecture']}\n{table(origins)}")
    _check_rope_factors(config, tensors, path)
    llama = FAMILIES["llama"]
    source = {_renamed(name): _unpermuted(name, tensor, config) for name, tensor in tensors.items()}
    skip = {"rotary factors": ROPE_FACTORS.replace(".", r"\.")}
    checked = plan(rules(config, llama), source, config, skip, str(path))
    beside = settings(config, llama, int(fields.get("llama.context_length", 2048)), "float32")
    for token in ("bos", "eos"):
        beside[f"{token}_token_id"] = fields.get(f"tokenizer.ggml.{token}_token_id")
    along: dict[str, Path | bytes] = {"huggingface/config.json": json.dumps(beside, indent=2).encode()}
    provenance = {"format": "gguf", "source": path.name, "architecture": "llama"}
    write_model(out, checked, provenance, files=along, force=arguments.force)
    print(f"{out}: {checked.nbytes / 1e9:.2f} GB of parameters")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The file's fields and its tensors, unread, as float32."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files takes the gguf package: pip install 'kdjax[gguf]'")
    import gguf

    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}; copy it again") from error
    scalars = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
    fields = {name: field.contents() for name, field in scalars.items()}
    if fields.get("general.architecture") != "llama":
        raise UserError(f"{path}: general.architecture = {fields.get('general.architecture')!r}: kdjax reads llama")

    def stored(tensor: Any) -> StoredTensor:
        shape = tuple(int(size) for size in reversed(tensor.shape))

        def rows(start: int, stop: int) -> np.ndarray:
            return gguf.dequantize(tensor.data[start:stop], tensor.tensor_type).astype(np.float32, copy=False)

        return StoredTensor(shape, np.dtype(np.float32), str(path), rows, tensor.name)

    return fields, {tensor.name: stored(tensor) for tensor in reader.tensors}


def _stated(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor], where: str) -> dict[str, Stated]:
    """What the fields say of the architecture."""
    if fields.get("llama.expert_count", 0):
        raise UserError(
            f"{where}: llama.expert_count = {fields['llama.expert_count']}: kdjax has no mixture of experts"
        )
    constants = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
    found = {key: Stated(value, "llama") for key, value in constants.items()}
    found["tied"] = Stated("output.weight" not in tensors, "output.weight")
    for key, name in KEYS.items():
        value = fields.get(f"llama.{name}")
        if value is not None:
            shortest = float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.99999975e-6
            found[key] = Stated(shortest, f"llama.{name}")
        elif key not in OPTIONAL:
            raise UserError(f"{where}: no llama.{name}")
    if "vocab_size" not in found and "token_embd.weight" in tensors:
        found["vocab_size"] = Stated(tensors["token_embd.weight"].shape[0], "token_embd.weight")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        found["rope_linear_factor"] = Stated(fields["llama.rope.scaling.factor"], "llama.rope.scaling.factor")
    elif scaling != "none":
        raise UserError(f"{where}: llama.rope.scaling.type = {scaling!r}: kdjax scales linearly and as Llama 3 only")
    return found


def _check_rope_factors(config: ModelConfig, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """llama.cpp stores what Llama 3's scaling divides each frequency by, not the four numbers it follows from."""
    if ROPE_FACTORS not in tensors:
        return
    width = 2 * tensors[ROPE_FACTORS].shape[0]
    plain = rope_frequencies(ModelConfig(rope_theta=config.rope_theta), width)
    scaled = np.asarray(plain / rope_frequencies(config, width))
    if not np.allclose(scaled, tensors[ROPE_FACTORS].read(), rtol=1e-3):
        raise UserError(
            f"{path}: {ROPE_FACTORS} scales the rotary frequencies otherwise than model.rope_llama3 = "
            f"{config.rope_llama3}; give the model's own numbers, for Llama 3.1 --arch rope_llama3=8,1,4,8192"
        )


def _renamed(name: str) -> str:
    """Hugging Face's name, for which the rules are written; unknown ones stay and are refused by them."""
    kind, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if kind == "blk" and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}"
    return MODEL_NAMES.get(name, name)


def _unpermuted(name: str, tensor: StoredTensor, config: ModelConfig) -> StoredTensor:
    """Query and key maps with the rows of a head in Hugging Face's order: first halves, then second halves."""
    if not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return tensor
    half = config.head_width // 2

    def halves(pairs: np.ndarray) -> np.ndarray:
        return pairs.reshape(-1, half, 2, pairs.shape[-1]).swapaxes(1, 2).reshape(pairs.shape)

    return transformed(tensor, tensor.shape, halves)
