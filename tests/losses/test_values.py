"""Values and gradients of every implementation, against float64 formulas and against NeMo-Aligner's results."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from loss_oracle import IMPLEMENTATIONS, assert_close, jit, make_inputs, oracle, takes, weighted_sums

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss

GOLDEN = sorted((pathlib.Path(__file__).parents[1] / "fixtures" / "topk_loss").glob("*.npz"))

SETTINGS: list[dict[str, Any]] = [
    {"kd_loss": "fwd_kl"},
    {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4},
    {"kd_loss": "jsd", "jsd_beta": 0.3},
    {"kd_loss": "fwd_kl", "kd_loss_weight": 0.5, "sft_loss_weight": 1.0, "logits_scale": 0.7},
    {"kd_loss": "bwd_kl", "logits_scale": 1.3, "target_logits_scale": 0.6},
    {"kd_loss": "jsd", "sft_loss_weight": 0.4, "logits_scale": 0.5, "target_logits_scale": 2.0},
    {"kd_loss": "fwd_kl", "tail": "ghost"},
    {"kd_loss": "bwd_kl", "tail": "ghost", "sft_loss_weight": 0.3, "logits_scale": 0.8},
    {"kd_loss": "jsd", "tail": "ghost", "jsd_beta": 0.7},
    {"kd_loss": "fwd_kl", "cross_tokenizer": "rank_match", "sft_loss_weight": 0.4},
    {"kd_loss": "bwd_kl", "cross_tokenizer": True, "tail": "ghost"},
    {"kd_loss": "fwd_kl", "kd_loss_weight": 0.0, "sft_loss_weight": 1.0},
    {"tail": "label"},
    {"tail": "label", "sft_loss_weight": 0.4, "logits_scale": 0.7},
    {"targets": "sampled"},
    {"targets": "sampled", "sft_loss_weight": 0.4, "logits_scale": 0.7},
]
SHAPES = [(1, 1, 2, 1), (2, 3, 97, 13), (3, 1, 7, 7), (1, 3, 1031, 101), (2, 2, 4, 3), (1, 5, 31, 5), (1, 2, 4099, 1)]
TRAITS: list[dict[str, Any]] = [{}, {"duplicates": True}, {"absent": True}, {"offset": 1000.0}, {"offset": -1000.0}]
GRID = [  # kernels, which are slow to interpret, take one dtype of each setting; test_pallas.py has more of them
    pytest.param(name, settings, SHAPES[(i + 4 * j) % 7], dtype, TRAITS[(i + 2 * j) % 5], id=f"{i}-{dtype}-{name}")
    for i, settings in enumerate(SETTINGS)
    for j, dtype in enumerate(("float32", ("bfloat16", "float16")[i % 2]))
    for name in IMPLEMENTATIONS
    if takes(name, settings) and (name != "pallas_interpret" or j == i // 2 % 2)
]


@pytest.mark.parametrize(("implementation", "settings", "shape", "dtype", "traits"), GRID)
def test_float64_formulas(
    implementation: str, settings: dict[str, Any], shape: tuple[int, int, int, int], dtype: str, traits: dict[str, Any]
) -> None:
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    inputs = make_inputs(sum(shape), shape, numpy_dtype, **traits)
    *losses, gradient = oracle(inputs, **settings)
    if implementation != "reference":  # masked positions may hold anything
        inputs.logits[inputs.weight == 0] = np.nan
    ours, our_gradient = weighted_sums(implementation, inputs, settings)

    weight = inputs.weight.astype(np.float64)
    for mine, truth in zip(ours, losses, strict=True):
        assert_close(mine, (weight * truth).sum(), "float32", scale=weight.sum())
    assert our_gradient.dtype == dtype
    assert_close(our_gradient, weight[..., None] * gradient, dtype, scale=1.5)
    np.testing.assert_array_equal(np.asarray(our_gradient)[inputs.weight == 0], 0)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_nemo_aligner(path: pathlib.Path) -> None:
    golden = np.load(path)
    settings = {
        "kd_loss": str(golden["kd_loss_kind"]),
        "cross_tokenizer": bool(golden["cross_tokenizer"]),
        **{
            name: float(golden[name])
            for name in ("kd_loss_weight", "sft_loss_weight", "logits_scale", "target_logits_scale")
        },
    }
    logits, mask = golden["student_logits"], golden["loss_mask"]
    teaching = golden["topk_logits"], golden["topk_token_ids"], golden["labels"]

    def token_mean(z: jax.Array, implementation: str) -> tuple[jax.Array, Any]:
        losses = topk_kd_loss(z, *teaching, implementation=implementation, **settings)
        means = [(x * mask).sum() / mask.sum() for x in losses]
        return means[0], (means, losses)

    def linear_mean(hidden: jax.Array, implementation: str) -> tuple[jax.Array, Any]:
        eye = jnp.eye(logits.shape[-1])
        sums = linear_topk_kd_loss(hidden, eye, *teaching, mask, implementation=implementation, **settings)
        means = [x / sums.tokens for x in sums[:3]]
        return means[0], (means, None)

    def close(ours: jax.Array, name: str) -> None:
        np.testing.assert_allclose(ours, golden[name], rtol=1e-5, atol=1e-5 * np.abs(golden[name]).max())

    ways = [(token_mean, "reference"), (token_mean, "xla")]
    if logits.shape[-1] == 64:  # a larger vocabulary takes the same path through the others
        ways += [(token_mean, "pallas_interpret"), (linear_mean, "xla")]
        ways += [(linear_mean, "gathered")] if takes("gathered", settings) else []
    run = jit(lambda z: [jax.value_and_grad(mean, has_aux=True)(z, name) for mean, name in ways])
    for (_, (means, losses)), gradient in run(logits):
        for ours, name in zip(means, ("loss", "kd_loss", "sft_loss"), strict=True):
            close(ours, name)
        for ours, name in zip(losses or (), ("loss", "kd", "sft"), strict=bool(losses)):
            close(ours, f"{name}_per_token")
        close(gradient, "grad_student_logits")


def test_all_golden_files_are_here() -> None:
    assert len(GOLDEN) == 24
