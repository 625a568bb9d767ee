"""Which tensors of each family become which kdjax parameters, and how, both ways.

PyTorch stores linear maps as [out, in], but GPT-2's Conv1D stores them as [in, out].
"""

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.huggingface.families import Family
from kdjax.convert.rules import Arrays, Rule, copy, head_bias, head_projection, linear, output_projection

UNEMBEDDING = "lm_head.weight"
# Kind of tensor -> regular expression of names: what some versions stored and all of them recompute.
SKIP = {
    "rotary frequencies": r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    "causal masks": r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
}


def huggingface_rules(config: ModelConfig, family: Family) -> list[Rule]:
    """Returns the family's rules for an architecture: one for every tensor that it has."""
    return _gpt2(config) if family.model_type == "gpt2" else _llama(config)


def prefix(family: Family) -> str:
    """Returns what every name but the unembedding's begins with, unless it was saved from the base model."""
    return "transformer." if family.model_type == "gpt2" else "model."


def embedding_name(family: Family) -> str:
    """Returns the name of the token embedding."""
    return prefix(family) + ("wte.weight" if family.model_type == "gpt2" else "embed_tokens.weight")


def _llama(config: ModelConfig) -> list[Rule]:
    theirs, ours = "model.layers.{i}.", "layers/"
    table = [
        copy("model.embed_tokens.weight", "embed"),
        copy(f"{theirs}input_layernorm.weight", f"{ours}attn_norm/scale"),
        *(head_projection(f"{theirs}self_attn.{x}_proj.weight", f"{ours}attn/{x}/kernel") for x in "qkv"),
        output_projection(f"{theirs}self_attn.o_proj.weight", f"{ours}attn/o/kernel"),
        copy(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm/scale"),
        *(linear(f"{theirs}mlp.{x}_proj.weight", f"{ours}mlp/{x}/kernel") for x in ("gate", "up", "down")),
        copy("model.norm.weight", "final_norm/scale"),
    ]
    if config.bias or config.qkv_bias:
        table += [head_bias(f"{theirs}self_attn.{x}_proj.bias", f"{ours}attn/{x}/bias") for x in "qkv"]
    if config.bias:
        table += [copy(f"{theirs}self_attn.o_proj.bias", f"{ours}attn/o/bias")]
        table += [copy(f"{theirs}mlp.{x}_proj.bias", f"{ours}mlp/{x}/bias") for x in ("gate", "up", "down")]
    if config.qk_norm:
        table += [copy(f"{theirs}self_attn.{x}_norm.weight", f"{ours}attn/{x}_norm/scale") for x in "qk"]
    return table + ([] if config.tied else [copy(UNEMBEDDING, "unembed")])


def _gpt2(config: ModelConfig) -> list[Rule]:
    theirs, ours = "transformer.h.{i}.", "layers/"
    kernels = tuple(f"{ours}attn/{x}/kernel" for x in "qkv")
    biases = tuple(f"{ours}attn/{x}/bias" for x in "qkv")
    table = [
        copy("transformer.wte.weight", "embed"),
        copy("transformer.wpe.weight", "positions"),
        Rule((f"{theirs}attn.c_attn.weight",), kernels, _split_qkv, _join_qkv),
        Rule((f"{theirs}attn.c_attn.bias",), biases, _split_qkv_bias, _join_qkv_bias),
        Rule((f"{theirs}attn.c_proj.weight",), (f"{ours}attn/o/kernel",), _split_output_heads, _join_output_heads),
        copy(f"{theirs}attn.c_proj.bias", f"{ours}attn/o/bias"),
        copy(f"{theirs}mlp.c_fc.weight", f"{ours}mlp/up/kernel"),
        copy(f"{theirs}mlp.c_fc.bias", f"{ours}mlp/up/bias"),
        copy(f"{theirs}mlp.c_proj.weight", f"{ours}mlp/down/kernel"),
        copy(f"{theirs}mlp.c_proj.bias", f"{ours}mlp/down/bias"),
    ]
    norms = ((f"{theirs}ln_1", f"{ours}attn_norm"), (f"{theirs}ln_2", f"{ours}mlp_norm"))
    for source, target in (*norms, ("transformer.ln_f", "final_norm")):
        table += [copy(f"{source}.weight", f"{target}/scale"), copy(f"{source}.bias", f"{target}/bias")]
    return table + ([] if config.tied else [copy(UNEMBEDDING, "unembed")])


def _split_qkv(config: ModelConfig, fused_Dx3D: np.ndarray) -> Arrays:
    """[D, queries | keys | values] -> three [D, N, H]."""
    return tuple(part.reshape(len(part), -1, config.head_width) for part in np.split(fused_Dx3D, 3, axis=1))


def _join_qkv(config: ModelConfig, *kernels_DxNxH: np.ndarray) -> Arrays:
    return (np.concatenate([kernel.reshape(len(kernel), -1) for kernel in kernels_DxNxH], axis=1),)


def _split_qkv_bias(config: ModelConfig, fused: np.ndarray) -> Arrays:
    """[queries | keys | values] -> three [N, H]."""
    return tuple(part.reshape(-1, config.head_width) for part in np.split(fused, 3))


def _join_qkv_bias(config: ModelConfig, *biases_NxH: np.ndarray) -> Arrays:
    return (np.concatenate([bias.reshape(-1) for bias in biases_NxH]),)


def _split_output_heads(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """The attention's output projection [N * H, D] -> [N, H, D]."""
    return (kernel.reshape(config.n_heads, config.head_width, -1),)


def _join_output_heads(config: ModelConfig, kernel_NxHxD: np.ndarray) -> Arrays:
    return (kernel_NxHxD.reshape(-1, kernel_NxHxD.shape[-1]),)
