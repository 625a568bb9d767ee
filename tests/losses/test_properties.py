"""Properties of the losses that hold for any input, and under JAX's transformations."""

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from loss_oracle import Inputs, jit, make_inputs, takes

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss

SHAPE = B, T, V, K = (1, 2, 11, 4)
SETTINGS: list[dict[str, Any]] = [
    {"kd_loss": "fwd_kl"},
    {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4, "logits_scale": 0.7},
    {"kd_loss": "jsd", "jsd_beta": 0.3, "tail": "ghost", "sft_loss_weight": 0.4},
    {"kd_loss": "fwd_kl", "cross_tokenizer": "rank_match", "sft_loss_weight": 0.4},
]
# The losses that are no divergence, which is 0 where the student is the teacher and never below.
WHOLE: list[dict[str, Any]] = [
    {"kd_loss": "fwd_kl", "tail": "label", "logits_scale": 0.7},
    {"kd_loss": "fwd_kl", "targets": "sampled", "sft_loss_weight": 0.4, "logits_scale": 0.7},
]
values = st.floats(-20, 20, width=32)
problems = st.builds(
    Inputs,
    logits=hnp.arrays(np.float32, (B, T, V), elements=values),
    topk_logits=hnp.arrays(np.float32, (B, T, K), elements=values | st.just(-np.inf)).filter(
        lambda t: np.isfinite(t).any(-1).all()
    ),
    topk_token_ids=st.permutations(range(V)).map(lambda ids: np.tile(np.int32(ids[:K]), (B, T, 1))),
    labels=hnp.arrays(np.int32, (B, T), elements=st.integers(0, V - 1)),
    weight=st.just(np.ones((B, T), np.float32)),
    log_sum_exp_logits=st.just(np.full((B, T), 25, np.float32)),  # above any logsumexp of four values up to 20
    topk_weights=hnp.arrays(np.float32, (B, T, K), elements=st.floats(0, 1, width=32)),
)
quick = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s['kd_loss']}-{len(s)}")


def compiled(implementation: str = "xla", **settings: Any) -> Callable[[Inputs], tuple[np.ndarray, np.ndarray]]:
    """Returns a function for (loss, kd, sft) and the gradient, compiled once for all examples of a test."""

    def total(z: jax.Array, teaching: Any, whole: Any) -> tuple[jax.Array, Any]:
        if implementation in ("linear", "gathered"):  # the identity as unembedding gives sums of the same losses
            name = "xla" if implementation == "linear" else "gathered"
            choice = {"implementation": name, "chunk_tokens": 1, **whole, **settings}
            sums = linear_topk_kd_loss(z, jnp.eye(V), *teaching, jnp.ones((B, T)), **choice)
            return sums.loss, sums[:3]
        losses = topk_kd_loss(z, *teaching, implementation=implementation, **whole, **settings)
        return losses[0].sum(), losses

    run = jit(jax.value_and_grad(total, has_aux=True))

    def apply(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        (_, losses), gradient = run(inputs.logits, inputs.teaching, inputs.whole(settings))
        return np.array(losses), np.asarray(gradient)

    return apply


@pytest.mark.parametrize(
    ("settings", "implementation"),
    [
        pytest.param(settings, name, id=f"{name}-{settings['kd_loss']}-{len(settings)}")
        for name in ("xla", "linear", "gathered", "pallas_interpret")
        for settings in SETTINGS + WHOLE
        if takes(name, settings)
    ],
)
def test_invariances(settings: dict[str, Any], implementation: str) -> None:
    """Reordering the K entries changes nothing, nor does shifting all logits of the teacher or the student."""
    run = compiled(implementation, **settings)

    @quick
    @hypothesis.given(problems, st.permutations(range(K)), st.integers(-64, 64), st.integers(-64, 64))
    def check(inputs: Inputs, order: list[int], teacher_shift: int, student_shift: int) -> None:
        losses, gradient = run(inputs)
        moved = Inputs(
            inputs.logits + np.float32(student_shift),
            inputs.topk_logits[..., order] + np.float32(teacher_shift),
            inputs.topk_token_ids[..., order],
            inputs.labels,
            inputs.weight,
            inputs.log_sum_exp_logits + np.float32(teacher_shift),
            None if inputs.topk_weights is None else inputs.topk_weights[..., order],
        )
        # adding 64 to a value below 32 rounds it by 2^-18, half a unit in the last place; a loss adds up a few of these
        moved_losses, moved_gradient = run(moved)
        np.testing.assert_allclose(moved_losses, losses, rtol=2.0**-16, atol=2.0**-14)
        if not settings.get("cross_tokenizer"):  # rounding may create a tie, and so another K-th largest id
            np.testing.assert_allclose(moved_gradient, gradient, rtol=2.0**-14, atol=2.0**-12)

    check()


@each_setting
def test_divergences_are_not_negative(settings: dict[str, Any]) -> None:
    run = compiled(**settings)

    @quick
    @hypothesis.given(problems)
    def check(inputs: Inputs) -> None:
        (_, kd, sft), gradient = run(inputs)
        assert kd.min() >= -1e-6  # rounding of about K terms
        assert sft.min() >= -1e-6
        assert np.isfinite(gradient).all()

    check()


@each_setting
def test_zero_where_student_is_teacher(settings: dict[str, Any]) -> None:
    run = compiled(**settings | {"kd_loss_weight": 1.0, "sft_loss_weight": 0.0, "logits_scale": 1.0})

    @quick
    @hypothesis.given(problems)
    def check(inputs: Inputs) -> None:
        z = inputs.logits
        top_ids = np.argsort(-z, axis=-1, kind="stable")[..., :K].astype(np.int32)
        top = np.take_along_axis(z, top_ids, axis=-1)
        z64 = z.astype(np.float64)
        lse = np.log(np.exp(z64).sum(-1)).astype(np.float32)
        losses, gradient = run(Inputs(z, top, top_ids, inputs.labels, inputs.weight, lse))
        # The rounded logsumexp is off by 2^-20, which may be as much as the whole tail.
        np.testing.assert_allclose(losses[1], 0, atol=5e-6)
        np.testing.assert_allclose(gradient, 0, atol=5e-6)

    check()


@pytest.mark.parametrize("settings", SETTINGS + WHOLE, ids=lambda s: "-".join(map(str, s.values())))
def test_finite_differences(settings: dict[str, Any]) -> None:
    """The hand-written derivative of a mix of the three results, in float64."""
    inputs = make_inputs(1, SHAPE, "float64")
    with jax.enable_x64(True):

        @jax.jit
        def mix(z: jax.Array) -> jax.Array:
            loss, kd, sft = topk_kd_loss(z, *inputs.teaching, **inputs.whole(settings), **settings)
            assert loss.dtype == jnp.float64
            return jnp.sum(loss * 0.3 - kd * 1.7 + sft * jnp.arange(1.0, 1 + T))

        jax.test_util.check_grads(mix, (inputs.logits,), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)

        @jax.jit
        def linear(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
            whole = inputs.whole(settings)
            arguments = (*inputs.teaching, inputs.weight)
            sums = linear_topk_kd_loss(hidden, unembed, *arguments, chunk_tokens=1, **whole, **settings)
            return 0.3 * sums.loss

        rng = np.random.default_rng(2)
        arguments = rng.normal(size=(B, T, 3)), rng.normal(size=(V, 3))
        jax.test_util.check_grads(linear, arguments, order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("implementation", ["reference", "xla", "linear", "gathered", "pallas_interpret"])
def test_transformations_agree(implementation: str) -> None:
    """jit, vmap, remat and a second call give the same results as a plain call, and leave the arguments unchanged."""
    inputs = make_inputs(3, (2, 3, 17, 5))
    settings = {} if implementation == "gathered" else {"sft_loss_weight": 0.4}
    unembed = jax.random.normal(jax.random.key(1), (17, 17))
    logits = jnp.asarray(inputs.logits)

    def total(z: jax.Array, t: jax.Array, ids: jax.Array, labels: jax.Array) -> jax.Array:
        if implementation not in ("linear", "gathered"):
            return topk_kd_loss(z, t, ids, labels, implementation=implementation, **settings)[0].sum()
        name = "xla" if implementation == "linear" else "gathered"
        choice = {"implementation": name, "chunk_tokens": 2, **settings}
        return linear_topk_kd_loss(z, unembed, t, ids, labels, jnp.ones(labels.shape), **choice).loss

    def row_by_row(z: jax.Array, *teaching: jax.Array) -> jax.Array:
        rows = [x[:, None] for x in (z, *teaching)]  # under vmap each row is a batch of one
        return jax.vmap(total)(*rows).sum()

    arguments = logits, *inputs.teaching
    run = jit(jax.value_and_grad(total))
    loss, gradient = run(*arguments)
    others = [jax.value_and_grad(other) for other in (jax.remat(total), row_by_row)]
    results = [run(*arguments), *jit(lambda *arguments: [other(*arguments) for other in others])(*arguments)]
    if implementation in ("xla", "linear"):  # one operation at a time, which takes the kernels minutes
        results.append(jax.value_and_grad(total)(*arguments))
    for again, and_gradient in results:
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        np.testing.assert_allclose(and_gradient, gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, inputs.logits)
