"""The fused unembedding and loss: sums, gradients, work and memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from loss_oracle import TOLERANCE, Inputs, arguments_of, assert_close, jit, make_inputs, oracle

from kdjax.losses import LossSums, linear_topk_kd_loss, topk_kd_loss
from kdjax.losses.fused import linear
from kdjax.plan.flops import matmul_flops

SHAPE = B, T, V, K = (2, 7, 61, 5)
D = 3
SETTINGS: list[dict[str, Any]] = [
    {"kd_loss": "fwd_kl"},
    {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4, "logits_scale": 0.7},
    {"kd_loss": "jsd", "tail": "ghost", "sft_loss_weight": 0.2},
    {"kd_loss": "fwd_kl", "cross_tokenizer": "rank_match"},
    {"kd_loss": "fwd_kl", "tail": "label"},
    {"kd_loss": "fwd_kl", "targets": "sampled", "sft_loss_weight": 0.2},
]


def problem(dtype: Any = np.float32) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """Returns inputs whose logits are hidden @ unembed.T in float64, with hidden and unembed exact in `dtype`."""
    rng = np.random.default_rng(21)
    hidden = rng.normal(size=(B, T, D)).astype(dtype)
    unembed = rng.normal(size=(V, D)).astype(dtype)
    inputs = make_inputs(22, SHAPE, absent=True)
    inputs.logits = hidden.astype(np.float64) @ unembed.astype(np.float64).T
    return inputs, hidden, unembed


def run(
    inputs: Inputs, hidden: np.ndarray, unembed: np.ndarray, settings: dict[str, Any], **choice: Any
) -> tuple[LossSums, tuple[Any, Any]]:
    """Returns the sums and the gradients of 0.5 * loss."""

    def total(hidden: jax.Array, unembed: jax.Array) -> tuple[jax.Array, LossSums]:
        arguments = (*inputs.teaching, inputs.weight)
        sums = linear_topk_kd_loss(hidden, unembed, *arguments, **inputs.whole(settings), **settings, **choice)
        return 0.5 * sums.loss, sums

    gradient = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, sums), gradients = jax.block_until_ready(gradient(hidden, unembed))  # the tests change these in place
    return sums, gradients


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_and_gradients(implementation: str, settings: dict[str, Any], dtype: str) -> None:
    inputs, hidden, unembed = problem(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    *losses, by_logits = oracle(inputs, **settings)
    sums, gradients = run(inputs, hidden, unembed, settings, implementation=implementation)

    weight = inputs.weight.astype(np.float64)
    for ours, truth in zip(sums[:3], losses, strict=True):
        assert ours.dtype == jnp.float32
        assert_close(ours, (weight * truth).sum(), "float32", scale=weight.sum())
    np.testing.assert_allclose(sums.tokens, weight.sum(), rtol=1e-6)
    by_logits *= 0.5 * weight[..., None]
    truths = by_logits @ unembed.astype(np.float64), np.einsum("BTV,BTD->VD", by_logits, hidden.astype(np.float64))
    for ours, truth in zip(gradients, truths, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, truth, dtype, scale=4)  # sums of products with standard normal numbers


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_metrics(implementation: str) -> None:
    inputs, hidden, unembed = problem()
    inputs.topk_token_ids[0, 0, 0] = np.argmax(inputs.logits[0, 0])
    inputs.topk_token_ids, inputs.topk_logits = (  # the first entry is not the most likely one
        np.roll(x, 2, axis=-1) for x in (inputs.topk_token_ids, inputs.topk_logits)
    )
    z = 0.7 * inputs.logits
    probability = np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    present = np.isfinite(inputs.topk_logits)
    mass = (np.take_along_axis(probability, inputs.topk_token_ids, -1) * present).sum(-1)
    first = np.take_along_axis(inputs.topk_token_ids, inputs.topk_logits.argmax(-1)[..., None], -1)[..., 0]
    agrees = first == inputs.logits.argmax(-1)
    assert agrees[0, 0]

    sums, _ = run(inputs, hidden, unembed, {"logits_scale": 0.7}, implementation=implementation)
    np.testing.assert_allclose(sums.student_topk_mass, (inputs.weight * mass).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.top1_agreement, (inputs.weight * agrees).sum(), rtol=1e-6)

    by_rank, _ = run(inputs, hidden, unembed, SETTINGS[3], implementation=implementation)
    top = -np.sort(-inputs.logits, axis=-1)
    top = np.exp(top - np.log(np.exp(top).sum(-1, keepdims=True)))[..., :K]
    mass = (top * -np.sort(-present.astype(float), axis=-1)).sum(-1)
    np.testing.assert_allclose(by_rank.student_topk_mass, (inputs.weight * mass).sum(), rtol=1e-5)
    assert by_rank.top1_agreement == 0


def test_any_chunk_gives_the_same() -> None:
    """Chunks of one position, of sizes that divide the 14 positions or do not, of all, and of more than all."""
    expected = run(*problem(), SETTINGS[1], chunk_tokens=14)
    for chunk_tokens in (1, 3, 7, 8, 1000):
        ours = run(*problem(), SETTINGS[1], chunk_tokens=chunk_tokens)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "implementation", "chunk"),
    [("cpu", "xla", 128), ("cuda", "xla", 2048), ("cpu", "gathered", 32), ("cuda", "gathered", 256)],
)
def test_chunks_by_platform(monkeypatch: pytest.MonkeyPatch, platform: str, implementation: str, chunk: int) -> None:
    """As few chunks as the chunk size allows."""
    monkeypatch.setattr(linear, "platform", lambda: platform)

    def chunks(n: int) -> list[str]:
        loss = functools.partial(linear_topk_kd_loss, implementation=implementation)
        return re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(lambda *a: loss(*a).loss)(*arguments_of(n, V, D, K))))

    assert [chunks(n) for n in (1, chunk, chunk + 1, 3 * chunk)] == [["1"], ["1"], ["2"], ["3"]]


def test_undifferentiated_sums_are_the_same() -> None:
    inputs, hidden, unembed = problem()
    plain = jit(functools.partial(linear_topk_kd_loss, sft_loss_weight=0.4))(
        hidden, unembed, *inputs.teaching, inputs.weight
    )
    for a, b in zip(plain, run(inputs, hidden, unembed, {"sft_loss_weight": 0.4})[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_masked_positions_may_hold_anything() -> None:
    inputs, hidden, unembed = problem()
    expected = run(inputs, hidden, unembed, SETTINGS[1], chunk_tokens=3)
    masked = inputs.weight == 0
    hidden[masked], inputs.topk_logits[masked] = np.nan, np.nan
    inputs.topk_token_ids[masked], inputs.labels[masked] = -3, -100
    ours = run(inputs, hidden, unembed, SETTINGS[1], chunk_tokens=3)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours[1][0][masked], 0)


def test_all_masked() -> None:
    inputs, hidden, unembed = problem()
    inputs.weight[:] = 0
    for leaf in jax.tree.leaves(run(inputs, hidden, unembed, SETTINGS[1], chunk_tokens=3)):
        np.testing.assert_array_equal(leaf, 0)


def test_ids_out_of_range_are_loud() -> None:
    inputs, hidden, unembed = problem()
    inputs.weight[:] = 1
    inputs.labels[1, 3] = -100
    sums, _ = run(inputs, hidden, unembed, SETTINGS[1])
    np.testing.assert_array_equal(np.isnan(sums), [True, False, True, False, False, False])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_only_the_loss_has_a_gradient(implementation: str) -> None:
    inputs, hidden, unembed = problem()

    def metrics(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        arguments = (*inputs.teaching, inputs.weight)
        return sum(linear_topk_kd_loss(hidden, unembed, *arguments, implementation=implementation)[1:])

    for gradient in jit(jax.grad(metrics, argnums=(0, 1)))(hidden, unembed):
        np.testing.assert_array_equal(gradient, 0)


def test_mixed_dtypes_keep_the_wider() -> None:
    """With float32 weights and bfloat16 hidden states, the weights are not rounded."""
    inputs, hidden, unembed = problem()
    hidden = hidden.astype(ml_dtypes.bfloat16)
    exact = run(inputs, hidden.astype(np.float32), unembed, SETTINGS[1])
    sums, gradients = run(inputs, hidden, unembed, SETTINGS[1])
    np.testing.assert_allclose(sums, exact[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], exact[1][1], rtol=1e-5, atol=1e-5)
    assert gradients[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(gradients[0].astype(np.float32), exact[1][0], rtol=2.0**-8, atol=TOLERANCE["float32"])


def loss_of(*arguments: Any, **choice: Any) -> jax.Array:
    return linear_topk_kd_loss(*arguments, sft_loss_weight=0.4, **choice).loss


def test_one_matmul_forward_three_with_gradients() -> None:
    n, v, d, k = 1021, 4099, 64, 7
    loss = functools.partial(loss_of, chunk_tokens=128)
    one = 2 * n * v * d
    forward = matmul_flops(loss, *arguments_of(n, v, d, k))
    both = matmul_flops(jax.value_and_grad(loss, argnums=(0, 1)), *arguments_of(n, v, d, k))
    np.testing.assert_allclose([forward / one, both / one], [1.0, 3.0], rtol=0.02)


def test_memory() -> None:
    """At most a quarter of the memory of holding all logits, and the same for any number of tokens."""

    def temporaries(n: int, **choice: Any) -> int:
        gradient = jax.value_and_grad(functools.partial(loss_of, **choice), argnums=(0, 1))
        compiled = jax.jit(gradient).lower(*arguments_of(n, 32768, 512, 64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fused = temporaries(1024, implementation="xla")
    np.testing.assert_array_less(fused, 0.25 * temporaries(1024, implementation="reference"))
    np.testing.assert_array_less(temporaries(2048, implementation="xla"), 1.02 * fused)


def test_memory_of_logits() -> None:
    """On logits it takes a block of rows; for bfloat16 on a CPU, XLA also copies the bits of the gradient."""

    def temporaries(dtype: Any) -> int:
        n, v, k = 1024, 32768, 64
        shapes = [((1, n, v), dtype), ((1, n, k), jnp.float32), ((1, n, k), jnp.int32), ((1, n), jnp.int32)]

        def loss(logits: jax.Array, *teaching: jax.Array) -> jax.Array:
            return topk_kd_loss(logits, *teaching, sft_loss_weight=0.4, implementation="xla")[0].sum()

        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        memory = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes / (n * v * jnp.dtype(dtype).itemsize)

    np.testing.assert_array_less([temporaries(x) for x in (jnp.float32, jnp.float16)], 0.1)
    np.testing.assert_array_less(temporaries(jnp.bfloat16), 1.1)
