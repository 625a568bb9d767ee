"""The student against Megatron's own logits, and every option against what it must change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import megatron_goldens as megatron
import numpy as np
import pytest

from kdjax.config import ModelConfig
from kdjax.model import bind, init_params, param_shapes

TINY = ModelConfig(
    layers=3,
    d_model=24,
    n_heads=4,
    n_groups=2,
    head_dim=6,
    d_ff=40,
    vocab_size=53,
    init_std=0.2,
    dtype="float32",
    remat="none",
)
TOKENS = np.arange(2 * 7).reshape(2, 7) % 53


def logits(config: ModelConfig, seed: int = 0, tokens: np.ndarray = TOKENS, **kwargs: jax.Array) -> np.ndarray:
    params = jax.tree.map(lambda x: x + 0.05, init_params(config, seed))  # biases and scales away from 0 and 1
    return np.asarray(jax.jit(lambda p: bind(config, p)(tokens, **kwargs))(params))


@functools.cache
def tiny_logits() -> np.ndarray:
    return logits(TINY)


@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_megatron_logits(variant: str) -> None:
    """Float32 logits of Megatron-Core's own forward pass, padded columns included."""
    config, golden = dataclasses.replace(megatron.architecture(variant), vocab_size=512), megatron.golden(variant)
    model = bind(config, megatron.params(variant))
    np.testing.assert_allclose(model(golden["input_ids"]), golden["logits"], rtol=0, atol=2e-5)


def test_megatron_tanh_gelu() -> None:
    config = dataclasses.replace(megatron.architecture("gpt2ish"), vocab_size=512, activation="gelu_tanh")
    golden = megatron.golden("gpt2ish", "golden_tp1pp1_default_bias_gelu_fusion")
    model = bind(config, megatron.params("gpt2ish"))
    np.testing.assert_allclose(model(golden["input_ids"]), golden["logits"], rtol=0, atol=2e-5)
    assert np.abs(golden["logits"] - megatron.golden("gpt2ish")["logits"]).max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e5},
        {"rope_fraction": 2 / 6},
        {"rope_linear_factor": 4.0},
        {"rope_llama3": (8.0, 1.0, 4.0, 16.0)},
        {"position": "learned", "max_positions": 7},
        {"norm": "layernorm"},
        {"norm": "layernorm_1p"},
        {"norm_eps": 0.1},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"activation": "squared_relu"},
        {"bias": True},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"tied": False},
        {"n_groups": 4},
        {"head_dim": 8},
        {"d_ff": 41},
        {"layers": 2},
        {"init_std": 0.3},
        {"scaled_init": False},
        {"dtype": "bfloat16"},
        {"param_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_option_changes_the_logits(change: dict[str, object]) -> None:
    changed = logits(dataclasses.replace(TINY, **change))
    assert np.isfinite(changed).all()
    assert np.abs(changed - tiny_logits()).max() > 1e-4


def test_gelus_differ_from_each_other() -> None:
    exact, tanh = (logits(dataclasses.replace(TINY, activation=name, init_std=0.5)) for name in ("gelu", "gelu_tanh"))
    assert 1e-6 < np.abs(exact - tanh).max() < 0.1


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_rematerialisation_changes_memory_not_gradients(remat: str) -> None:
    config = dataclasses.replace(TINY, layers=16)
    params, tokens = init_params(config, 0), np.tile(TOKENS, (8, 4))

    def gradient(config: ModelConfig):
        def loss(params):
            return jnp.square(bind(config, params).hidden(tokens)).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    plain, plain_bytes = gradient(config)
    again, again_bytes = gradient(dataclasses.replace(config, remat=remat))
    assert again_bytes < 0.8 * plain_bytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, plain)


def test_a_segment_sees_only_itself() -> None:
    """Two documents in one row, positions restarting, give the logits of each alone."""
    tokens = np.concatenate([TOKENS[:1, :4], TOKENS[1:, :3]], axis=1)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2]])
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2]])
    packed = logits(TINY, tokens=tokens, positions=positions, segment_ids=segment_ids)
    np.testing.assert_allclose(packed[:, :4], logits(TINY, tokens=tokens[:, :4]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed[:, 4:], logits(TINY, tokens=tokens[:, 4:]), rtol=1e-5, atol=1e-6)


def test_causal() -> None:
    later = TOKENS.copy()
    later[:, 5:] += 1
    changed = logits(TINY, tokens=later)
    np.testing.assert_array_equal(tiny_logits()[:, :5], changed[:, :5])
    assert np.abs(tiny_logits()[:, 5:] - changed[:, 5:]).max() > 1e-4


def test_padded_vocabulary_is_stored_but_not_returned() -> None:
    config = dataclasses.replace(TINY, padded_vocab_size=64, tied=False)
    assert param_shapes(config)["embed"].shape == param_shapes(config)["unembed"].shape == (64, 24)
    assert logits(config).shape == (2, 7, 53)
    assert logits(config).dtype == np.float32


def test_layers_are_stacked_and_compile_once() -> None:
    shapes = param_shapes(TINY)
    assert all(leaf.shape[0] == TINY.layers for leaf in jax.tree.leaves(shapes["layers"]))

    def program(layers: int) -> str:
        config = dataclasses.replace(TINY, layers=layers)
        return jax.jit(lambda p: bind(config, p)(TOKENS)).lower(param_shapes(config)).as_text()

    assert program(20).count("dot_general") == program(2).count("dot_general")
    assert TINY.head_width == 6


def test_scaled_init_divides_by_the_root_of_twice_the_depth() -> None:
    config = dataclasses.replace(TINY, d_model=96, d_ff=384, layers=8)
    layers = init_params(config, 0)["layers"]
    np.testing.assert_allclose(np.std(layers["mlp"]["down"]["kernel"]), 0.2 / 4, rtol=0.02)
    np.testing.assert_allclose(np.std(layers["mlp"]["up"]["kernel"]), 0.2, rtol=0.02)
