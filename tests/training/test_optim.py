"""Schedules against NeMo's formulae, updates against torch's AdamW written out in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.config import OptimConfig
from kdjax.training.optim import decay_mask, learning_rate, optimizer

CONFIG = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=4)


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [float(learning_rate(config, steps)(step)) for step in range(steps + 3)]


def test_cosine_without_constant_steps() -> None:
    """WarmupAnnealHoldPolicy, constant_steps = 0."""
    steps, warmup = 20, 4
    expected = []
    for step in range(steps + 3):
        if step <= warmup:
            expected.append(1e-2 * (step + 1) / (warmup + 1))
        else:
            share = (min(step, steps) - warmup) / (steps - warmup)
            expected.append(1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * share)))
    np.testing.assert_allclose(rates(CONFIG, steps), expected, rtol=1e-6)


def test_cosine_with_constant_steps_starts_at_zero_and_ends_flat() -> None:
    """CosineAnnealing, constant_steps > 0: the constant part is at min_lr, at the end."""
    steps, warmup, constant = 20, 4, 6
    expected = []
    for step in range(steps + 3):
        if step < warmup:
            expected.append(1e-2 * step / warmup)
        else:
            share = min((step - warmup) / (steps - constant - warmup), 1)
            expected.append(1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * share)))
    found = rates(dataclasses.replace(CONFIG, constant_steps=constant), steps)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == 0
    np.testing.assert_allclose(found[14:], 1e-3, rtol=1e-6)


def test_warm_up_stable_decay() -> None:
    found = rates(dataclasses.replace(CONFIG, schedule="wsd", constant_steps=6), 20)
    np.testing.assert_allclose(found[:5], [2e-3, 4e-3, 6e-3, 8e-3, 1e-2], rtol=1e-6)
    np.testing.assert_allclose(found[4:11], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(found[15], 0.5 * (1e-2 + 1e-3), rtol=1e-6)
    np.testing.assert_allclose(found[20:], 1e-3, rtol=1e-6)


def test_constant() -> None:
    found = rates(dataclasses.replace(CONFIG, schedule="constant"), 8)
    np.testing.assert_allclose(found, [2e-3, 4e-3, 6e-3, 8e-3] + 7 * [1e-2], rtol=1e-6)


def test_no_warm_up_starts_at_the_peak() -> None:
    for name in ("cosine", "wsd", "constant"):
        assert rates(dataclasses.replace(CONFIG, schedule=name, warmup_steps=0), 10)[0] == pytest.approx(1e-2)


PARAMS = {
    "embed": jnp.ones((5, 3)),
    "layers": {
        "mlp": {"up": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}},
        "mlp_norm": {"scale": jnp.ones((2, 3))},
    },
    "final_norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
}


def test_decay_rules() -> None:
    """Megatron-Core spares what has one axis, the stacked one not counted; NeMo spares biases only."""
    megatron = decay_mask(PARAMS, "megatron")
    assert megatron["embed"]
    assert megatron["layers"]["mlp"]["up"] == {"kernel": True, "bias": False}
    assert not megatron["layers"]["mlp_norm"]["scale"]
    assert megatron["final_norm"] == {"scale": False, "bias": False}
    nemo = decay_mask(PARAMS, "nemo")
    assert nemo["layers"]["mlp"]["up"] == {"kernel": True, "bias": False}
    assert nemo["layers"]["mlp_norm"]["scale"]
    assert nemo["final_norm"] == {"scale": True, "bias": False}


def test_query_biases_are_not_decayed_although_they_have_two_axes() -> None:
    mask = decay_mask({"layers": {"attn": {"q": {"bias": jnp.ones((2, 4, 8))}}}}, "megatron")
    assert not mask["layers"]["attn"]["q"]["bias"]


def descend(config: OptimConfig, gradients: list[np.ndarray], start: np.ndarray, lr: float = 0.1) -> np.ndarray:
    tx, params = optimizer(config), {"w": jnp.asarray(start)}
    state = tx.init(params)
    for gradient in gradients:
        directions, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = jax.tree.map(lambda p, d: p - lr * d, params, directions)
    return np.asarray(params["w"])


def test_adamw_is_torchs() -> None:
    """Clip by global norm, then torch.optim.AdamW: decoupled decay, eps outside the root."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(5)]
    w, m, v = start.copy(), np.zeros((3, 4)), np.zeros((3, 4))
    for t, g in enumerate(gradients, 1):
        g = g * min(1.0, 1.0 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w = w * (1 - 0.1 * 0.01)
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
    np.testing.assert_allclose(descend(OptimConfig(), gradients, start), w, rtol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "lion"},
        {"name": "sgd"},
        {"b1": 0.8},
        {"b2": 0.9},
        {"eps": 0.1},
        {"weight_decay": 0.1},
        {"clip_norm": None},
    ],
    ids=str,
)
def test_every_option_changes_the_update(change: dict) -> None:
    rng = np.random.default_rng(1)
    start, gradients = rng.normal(size=(3, 4)), [10 * rng.normal(size=(3, 4)), 0.1 * rng.normal(size=(3, 4))]
    base, found = descend(OptimConfig(), gradients, start), descend(OptimConfig(**change), gradients, start)
    assert np.isfinite(found).all()
    assert np.abs(found - base).max() > 1e-5


def test_clipping_leaves_small_gradients_alone() -> None:
    tx = optimizer(OptimConfig(name="sgd", b1=0.0, weight_decay=0.0))
    params = {"w": jnp.zeros(2)}
    for gradient, expected in (([0.3, 0.4], 0.5), ([30.0, 40.0], 1.0)):
        direction, _ = tx.update({"w": jnp.array(gradient)}, tx.init(params), params)
        np.testing.assert_allclose(optax.tree.norm(direction), expected, rtol=1e-6)
