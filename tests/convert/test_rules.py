"""Rules change arrays as the formats define, undo each other, and state the shapes that they need."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import random_params

from kdjax.config import ModelConfig
from kdjax.convert.huggingface.families import FAMILIES
from kdjax.convert.huggingface.rules import embedding_name, huggingface_rules, prefix
from kdjax.convert.megatron.rules import megatron_rules, split_gate_and_up, split_qkv, split_qkv_bias
from kdjax.convert.rules import Rule, copy, linear, split_head_bias, split_heads, split_output_heads
from kdjax.model import named_shapes

CONFIG = ModelConfig(layers=3, d_model=10, n_heads=6, n_groups=2, head_dim=3, d_ff=7, vocab_size=11, tied=False)
D, N, G, H = 10, 6, 2, 3
LEARNED = {"position": "learned", "max_positions": 5, "norm": "layernorm", "bias": True, "n_groups": 6}


def numbers(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


def test_heads_are_consecutive_rows() -> None:
    kernel = numbers(N * H, D)
    (split,) = split_heads(CONFIG, kernel)
    (output,) = split_output_heads(CONFIG, kernel.T)
    assert split.shape == (D, N, H)
    assert output.shape == (N, H, D)
    for head in range(N):
        for row in range(H):
            np.testing.assert_array_equal(split[:, head, row], kernel[head * H + row])
            np.testing.assert_array_equal(output[head, row], kernel[head * H + row])
    np.testing.assert_array_equal(split_head_bias(CONFIG, numbers(N * H))[0], numbers(N, H))


def test_megatrons_query_groups() -> None:
    """Each group's rows are its three query heads, its key head and its value head."""
    fused = numbers(G * 5 * H, D)
    q, k, v = split_qkv(CONFIG, fused)
    biases = split_qkv_bias(CONFIG, fused[:, 0])
    assert (q.shape, k.shape, v.shape) == ((D, N, H), (D, G, H), (D, G, H))
    for group in range(G):
        rows = fused[group * 5 * H :][: 5 * H].reshape(5, H, D)
        for head in range(3):
            np.testing.assert_array_equal(q[:, 3 * group + head], rows[head].T)
            np.testing.assert_array_equal(biases[0][3 * group + head], rows[head, :, 0])
        for part, bias, row in ((k, biases[1], 3), (v, biases[2], 4)):
            np.testing.assert_array_equal(part[:, group], rows[row].T)
            np.testing.assert_array_equal(bias[group], rows[row, :, 0])


def test_the_gate_comes_first() -> None:
    gate, up = split_gate_and_up(CONFIG, numbers(14, D))
    np.testing.assert_array_equal(gate, numbers(14, D)[:7].T)
    np.testing.assert_array_equal(up, numbers(14, D)[7:].T)


def test_layers_and_names() -> None:
    per_layer, whole = linear("x.{i}.weight", "layers/mlp/up/kernel"), copy("y", "embed")
    assert (list(per_layer.layers(CONFIG)), list(whole.layers(CONFIG))) == ([0, 1, 2], [None])
    assert (per_layer.source_names(2), whole.source_names(None)) == (("x.2.weight",), ("y",))
    shapes = named_shapes(CONFIG)
    assert per_layer.source_shapes(CONFIG, shapes) == [(7, D)]
    assert whole.source_shapes(CONFIG, shapes) == [(11, D)]


def llama(name: str) -> Callable[[ModelConfig], list[Rule]]:
    return lambda config: huggingface_rules(config, FAMILIES[name])


@pytest.mark.parametrize(
    ("rules", "changes"),
    [
        (megatron_rules, {}),
        (megatron_rules, {"bias": True, "tied": True}),
        (megatron_rules, {"qkv_bias": True, "qk_norm": True, "activation": "gelu"}),
        (megatron_rules, LEARNED | {"activation": "squared_relu"}),
        (llama("llama"), {"bias": True}),
        (llama("qwen2"), {"qkv_bias": True, "tied": True}),
        (llama("qwen3"), {"qk_norm": True}),
        (llama("gpt2"), LEARNED | {"activation": "gelu"}),
    ],
)
def test_rules_undo_each_other(rules: Callable[[ModelConfig], list[Rule]], changes: dict[str, Any]) -> None:
    """From random parameters to tensors of the stated shapes and back, with every parameter in exactly one rule."""
    config = dataclasses.replace(CONFIG, **changes)
    shapes = named_shapes(config)
    params = random_params(config)
    filled: list[str] = []
    for rule in rules(config):
        filled += rule.targets
        before = []
        for name in rule.targets:
            array = params
            for key in name.split("/"):
                array = array[key]
            before.append(array[1] if rule.per_layer else array)
        tensors = rule.from_kdjax(config, *before)
        assert [tensor.shape for tensor in tensors] == rule.source_shapes(config, shapes)
        assert len(tensors) == len(rule.sources)
        for one, other in zip(rule.to_kdjax(config, *tensors), before, strict=True):
            np.testing.assert_array_equal(one, other)
    assert sorted(filled) == sorted(shapes)


def test_prefixes() -> None:
    assert (prefix(FAMILIES["gpt2"]), embedding_name(FAMILIES["gpt2"])) == ("transformer.", "transformer.wte.weight")
    assert (prefix(FAMILIES["qwen3"]), embedding_name(FAMILIES["qwen3"])) == ("model.", "model.embed_tokens.weight")
