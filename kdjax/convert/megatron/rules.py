"""Which Megatron tensors become which kdjax parameters, and how, both ways.

Tensor names are the canonical ones of `kdjax.convert.megatron.parameter_names`.
"""

import re

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.rules import Arrays, Rule, copy, linear, output_projection

EMBEDDING, UNEMBEDDING = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = "decoder.layers.{i}."
# Entries that hold no weights: kind -> regular expression of names.
SKIP = {
    "Transformer Engine's _extra_state": r".*_extra_state(/.*)?",
    "random number generators' state": r"rng_state(/.*)?",
    "optimizer state": r"(chained_\d+\.)?optimizer\..*|optimizer|opt_param_scheduler.*",
    "training loop's state": r"rerun_state_machine.*|iteration|num_floating_point_operations_so_far",
    "rotary frequencies (recomputed)": r"(.*\.)?rotary_(pos_)?emb\.inv_freq",
}
SKIPPED = re.compile("|".join(f"(?:{pattern})" for pattern in SKIP.values()))


def megatron_rules(config: ModelConfig) -> list[Rule]:
    """Returns the rules for an architecture: one for every tensor that it has."""
    table = [copy(EMBEDDING, "embed")]
    if config.position == "learned":
        table.append(copy("embedding.position_embeddings.weight", "positions"))
    table += _norm(config, f"{LAYER}self_attention.linear_qkv.layer_norm_", "layers/attn_norm/")
    table += _attention(config)
    table += _norm(config, f"{LAYER}mlp.linear_fc1.layer_norm_", "layers/mlp_norm/")
    table += _mlp(config)
    table += _norm(config, "decoder.final_layernorm.", "final_norm/")
    if not config.tied:
        table.append(copy(UNEMBEDDING, "unembed"))
    return table


def _norm(config: ModelConfig, source: str, target: str) -> list[Rule]:
    biases = [] if config.norm == "rmsnorm" else [copy(f"{source}bias", f"{target}bias")]
    return [copy(f"{source}weight", f"{target}scale"), *biases]


def _attention(config: ModelConfig) -> list[Rule]:
    source, target = f"{LAYER}self_attention.", "layers/attn/"

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{target}{name}/{kind}" for name in "qkv")

    table = [
        Rule((f"{source}linear_qkv.weight",), qkv("kernel"), split_qkv, join_qkv),
        output_projection(f"{source}linear_proj.weight", f"{target}o/kernel"),
    ]
    if config.bias or config.qkv_bias:
        table.append(Rule((f"{source}linear_qkv.bias",), qkv("bias"), split_qkv_bias, join_qkv_bias))
    if config.bias:
        table.append(copy(f"{source}linear_proj.bias", f"{target}o/bias"))
    if config.qk_norm:
        table += [copy(f"{source}{name}_layernorm.weight", f"{target}{name}_norm/scale") for name in "qk"]
    return table


def _mlp(config: ModelConfig) -> list[Rule]:
    source, target = f"{LAYER}mlp.linear_", "layers/mlp/"
    gated = config.activation == "swiglu"
    table = [linear(f"{source}fc2.weight", f"{target}down/kernel")]
    if gated:
        halves = (f"{target}gate/kernel", f"{target}up/kernel")
        table.append(Rule((f"{source}fc1.weight",), halves, split_gate_and_up, join_gate_and_up))
    else:
        table.append(linear(f"{source}fc1.weight", f"{target}up/kernel"))
    if config.bias:
        table.append(copy(f"{source}fc2.bias", f"{target}down/bias"))
        if gated:
            halves = (f"{target}gate/bias", f"{target}up/bias")
            table.append(Rule((f"{source}fc1.bias",), halves, split_gate_and_up_bias, join_gate_and_up_bias))
        else:
            table.append(copy(f"{source}fc1.bias", f"{target}up/bias"))
    return table


def split_qkv(config: ModelConfig, weight: np.ndarray) -> Arrays:
    """[G * (N/G + 2) * H, D] -> queries [D, N, H], keys and values [D, G, H].

    The rows of a query group are its query heads, its key head and its value head.
    """
    D, G, H = weight.shape[1], config.groups, config.head_width
    grouped = weight.reshape(G, config.n_heads // G + 2, H, D)
    q_NxHxD = grouped[:, :-2].reshape(config.n_heads, H, D)
    return tuple(part.transpose(2, 0, 1) for part in (q_NxHxD, grouped[:, -2], grouped[:, -1]))


def join_qkv(config: ModelConfig, q_DxNxH: np.ndarray, k_DxGxH: np.ndarray, v_DxGxH: np.ndarray) -> Arrays:
    """Undoes `split_qkv`."""
    D, G, H = k_DxGxH.shape
    q_GxRxHxD = q_DxNxH.transpose(1, 2, 0).reshape(G, -1, H, D)
    k_Gx1xHxD, v_Gx1xHxD = (part.transpose(1, 2, 0)[:, None] for part in (k_DxGxH, v_DxGxH))
    return (np.concatenate([q_GxRxHxD, k_Gx1xHxD, v_Gx1xHxD], axis=1).reshape(-1, D),)


def split_qkv_bias(config: ModelConfig, bias: np.ndarray) -> Arrays:
    """[G * (N/G + 2) * H] -> queries [N, H], keys and values [G, H]."""
    return tuple(part[0] for part in split_qkv(config, bias[:, None]))


def join_qkv_bias(config: ModelConfig, q_NxH: np.ndarray, k_GxH: np.ndarray, v_GxH: np.ndarray) -> Arrays:
    """Undoes `split_qkv_bias`."""
    return (join_qkv(config, q_NxH[None], k_GxH[None], v_GxH[None])[0][:, 0],)


def split_gate_and_up(config: ModelConfig, weight: np.ndarray) -> Arrays:
    """[2 F, D] -> gate and up projection, each [D, F]. The gate is the half that goes through SiLU."""
    gate_FxD, up_FxD = np.split(weight, 2)
    return gate_FxD.T, up_FxD.T


def join_gate_and_up(config: ModelConfig, gate_DxF: np.ndarray, up_DxF: np.ndarray) -> Arrays:
    """Undoes `split_gate_and_up`."""
    return (np.concatenate([gate_DxF.T, up_DxF.T]),)


def split_gate_and_up_bias(config: ModelConfig, bias: np.ndarray) -> Arrays:
    """[2 F] -> gate and up bias, each [F]."""
    return tuple(np.split(bias, 2))


def join_gate_and_up_bias(config: ModelConfig, gate_F: np.ndarray, up_F: np.ndarray) -> Arrays:
    """Undoes `split_gate_and_up_bias`."""
    return (np.concatenate([gate_F, up_F]),)
