"""Writes tiny Hugging Face checkpoints with transformers' own logits for the tests, one directory for each family.

    python scripts/tools/make_hf_goldens.py tests/fixtures/hf        # in an environment with torch and transformers

The weights are random, the sizes odd and no setting has its default. `save_pretrained` writes them, so names, shards
and config.json are transformers' own. `logits.npz` holds `input_ids` and the float32 logits of a forward pass.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROPE = {
    "llama": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "smollm2": {"rope_type": "linear", "factor": 4.0},
}
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "intermediate_size": 37,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "smollm2": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "num_hidden_layers": 3, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": None, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 24,
        "n_inner": 37,
        "n_positions": 31,
        "vocab_size": 101,
        "layer_norm_epsilon": 3e-5,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
SHARDED = {"qwen2": "40KB"}
BFLOAT16 = {"smollm2"}


def make(family: str, out: Path) -> None:
    """Writes one family's model, its logits and, for Llama, a tokenizer."""
    settings = FAMILIES[family] if family == "gpt2" else SHAPE | FAMILIES[family]
    if family != "gpt2":
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 531.0} | ROPE.get(family, {})}
    torch.manual_seed(sorted(FAMILIES).index(family))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases, which start as 1 and 0
                parameter += 0.3 * torch.randn_like(parameter)
            if family in BFLOAT16:
                parameter.copy_(parameter.bfloat16())
            assert parameter.abs().max() > 0, name
        input_ids = torch.randint(settings["vocab_size"], (2, 29))
        logits = model(input_ids).logits
    if family in BFLOAT16:
        model = model.bfloat16()
    model.save_pretrained(out, max_shard_size=SHARDED.get(family, "5GB"))
    np.savez(out / "logits.npz", input_ids=input_ids.numpy().astype(np.int32), logits=logits.numpy())
    if family == "llama":
        vocabulary = {f"w{i}": i for i in range(settings["vocab_size"])}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    version = transformers.__version__
    print(f"{family:<13} {size:>8,} bytes, logits up to {logits.abs().max():.2f}, transformers {version}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write, with one directory for each family")
    arguments = parser.parse_args()
    for name in FAMILIES:
        make(name, arguments.out / name)
