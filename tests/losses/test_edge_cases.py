"""Inputs where NeMo-Aligner's loss goes wrong, and other edge cases: each gives the right value or a loud NaN."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from loss_oracle import Inputs, assert_close, jit, make_inputs, oracle, vanishing_tail

from kdjax.losses import topk_kd_loss
from kdjax.losses.reference import ABSENT

each = pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])


SHAPE = (1, 3, 19, 4)  # of most tests, which then share their compiled programs


@functools.cache
def program(implementation: str, settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Returns a compiled function for (loss, kd, sft) and the gradient, which tests of the same settings share."""

    def total(logits: jax.Array, teaching: Any, whole: Any, weight: jax.Array) -> tuple[jax.Array, Any]:
        choice = {**whole, "implementation": implementation, **dict(settings)}
        losses = topk_kd_loss(logits, *teaching, **choice)
        return jnp.where(weight == 0, 0, losses[0]).sum(), losses

    return jit(jax.value_and_grad(total, has_aux=True))


def loss_and_gradient(implementation: str, inputs: Inputs, **settings: Any) -> tuple[Any, np.ndarray]:
    """Returns (loss, kd, sft) [B, T] and the gradient of the sum of the unmasked losses."""
    run = program(implementation, tuple(sorted(settings.items())))
    (_, losses), gradient = run(inputs.logits, inputs.teaching, inputs.whole(settings), inputs.weight)
    return [np.asarray(x) for x in losses], np.asarray(gradient)


def assert_right(implementation: str, inputs: Inputs, **settings: Any) -> None:
    inputs.weight[:] = 1
    *truths, slope = oracle(inputs, **settings)
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    for ours, truth in zip(losses, truths, strict=True):
        assert_close(ours, truth, "float32")
    assert_close(gradient, slope, "float32")


@each
@pytest.mark.parametrize("shift", [500.0, -500.0])
def test_teacher_values_of_any_size(implementation: str, shift: float) -> None:
    """NeMo exponentiates the raw teacher values: above 88 gives infinity, all below -104 gives 0/0."""
    inputs = make_inputs(3, SHAPE)
    inputs.topk_logits += np.float32(shift)
    assert_right(implementation, inputs)


@each
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl", "jsd"])
def test_topk_far_below_the_student_maximum(implementation: str, kd_loss: str) -> None:
    """NeMo subtracts the maximum over the vocabulary first: if all K are 150 below it, they underflow to log 0."""
    inputs = make_inputs(4, SHAPE)
    for at in np.ndindex(1, 3):
        inputs.logits[at][inputs.topk_token_ids[at]] -= 150
    assert_right(implementation, inputs, kd_loss=kd_loss)


@each
def test_one_student_entry_underflows(implementation: str) -> None:
    """NeMo's backward KL multiplies 0 by log 0 in this case."""
    inputs = make_inputs(5, SHAPE)
    for at in np.ndindex(1, 3):
        inputs.logits[at][inputs.topk_token_ids[at][1]] = -200
    assert_right(implementation, inputs, kd_loss="bwd_kl")


@each
@pytest.mark.parametrize("kd_loss", ["bwd_kl", "jsd"])
@pytest.mark.parametrize("tail", ["renormalize", "ghost"])
def test_student_minus_infinity_weighs_nothing(implementation: str, kd_loss: str, tail: str) -> None:
    """q log q is 0 at q = 0, in value and derivative; a column that is not taught may be -inf too."""
    inputs = make_inputs(6, SHAPE)
    for at in np.ndindex(1, 3):
        inputs.logits[at][inputs.topk_token_ids[at][1]] = -np.inf
        inputs.logits[at][np.setdiff1d(np.arange(19), inputs.topk_token_ids[at])[0]] = -np.inf
    settings = {"kd_loss": kd_loss, "tail": tail}
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    inputs.logits = np.maximum(inputs.logits, -1e4)
    expected, slope = loss_and_gradient(implementation, inputs, **settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("choice", [{}, {"tail": "ghost"}, {"tail": "label"}, {"targets": "sampled"}], ids=str)
def test_masked_positions_may_hold_anything(choice: dict[str, Any], poison: float) -> None:
    """NeMo multiplies by a mask of 0, and NaN times 0 is NaN."""
    inputs = make_inputs(7, (2, 3, 19, 4))
    settings = {"sft_loss_weight": 0.4, **choice}
    *_, slope = oracle(inputs, **settings)
    masked = inputs.weight == 0
    assert masked.any()
    inputs.logits[masked] = poison
    inputs.topk_logits[masked] = poison
    inputs.log_sum_exp_logits[masked] = poison
    inputs.topk_weights[masked] = poison
    inputs.topk_token_ids[masked] = -7
    inputs.labels[masked] = -100
    _, gradient = loss_and_gradient("xla", inputs, **settings)
    np.testing.assert_array_equal(gradient[masked], 0)
    assert_close(gradient[~masked], slope[~masked], "float32")


@each
@pytest.mark.parametrize("shape", [(3, 1, 19, 4), SHAPE, (1, 1, 19, 1)])
def test_one_position_or_one_row(implementation: str, shape: tuple[int, int, int, int]) -> None:
    """NeMo squeezes [B, 1] to [B] and broadcasts it to [B, B]."""
    assert_right(implementation, make_inputs(8, shape), sft_loss_weight=0.4)


@each
@pytest.mark.parametrize("bad", [-1, -100, 19, 2**31 - 1])
def test_ids_out_of_range_are_loud(implementation: str, bad: int) -> None:
    """NeMo gives such an id the largest logit; NumPy indexing would take a negative id for another token."""
    inputs = make_inputs(9, SHAPE)
    good, _ = loss_and_gradient(implementation, inputs, sft_loss_weight=0.4)
    inputs.topk_token_ids[0, 0, 2] = bad
    inputs.labels[0, 1] = bad
    losses, _ = loss_and_gradient(implementation, inputs, sft_loss_weight=0.4)
    expected = np.array([[[1, 1, 0]], [[1, 0, 0]], [[0, 1, 0]]], bool)  # loss, kd, sft of the three positions
    np.testing.assert_array_equal(np.isnan(losses), expected)
    np.testing.assert_array_equal(np.array(losses)[~expected], np.array(good)[~expected])


@each
def test_small_integer_ids(implementation: str) -> None:
    """Ids may be unsigned, and of a dtype that cannot count the vocabulary."""
    inputs = make_inputs(10, (1, 2, 300, 4))
    inputs.topk_token_ids %= 250
    inputs.labels %= 250
    expected, _ = loss_and_gradient(implementation, inputs, sft_loss_weight=0.4)
    inputs.topk_token_ids, inputs.labels = inputs.topk_token_ids.astype("u1"), inputs.labels.astype("i2")
    losses, _ = loss_and_gradient(implementation, inputs, sft_loss_weight=0.4)
    np.testing.assert_array_equal(losses, expected)


@each
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl", "jsd"])
def test_duplicate_ids_add(implementation: str, kd_loss: str) -> None:
    """In NeMo the gradient of one of two equal ids overwrites the other."""
    inputs = make_inputs(11, SHAPE)
    inputs.topk_token_ids[..., 2:] = inputs.topk_token_ids[..., :2]
    inputs.labels = inputs.topk_token_ids[..., 1].copy()
    assert_right(implementation, inputs, kd_loss=kd_loss, sft_loss_weight=0.4)


def test_bfloat16_gradient_is_rounded_once() -> None:
    """Where label, teacher id and duplicate coincide, softmax - 1 + 2 (q - p) must not be summed in bfloat16."""
    inputs = make_inputs(12, (4, 4, 67, 4), jnp.bfloat16)
    inputs.topk_token_ids[..., 2] = inputs.topk_token_ids[..., 0]
    inputs.labels = inputs.topk_token_ids[..., 0].copy()
    inputs.weight[:] = 1
    *_, slope = oracle(inputs, sft_loss_weight=1.0)
    _, gradient = loss_and_gradient("xla", inputs, sft_loss_weight=1.0)
    np.testing.assert_allclose(gradient.astype(np.float64), slope, rtol=2.0**-8, atol=1e-6)


@each
def test_logits_scale_reaches_both_terms(implementation: str) -> None:
    inputs = make_inputs(13, SHAPE)
    scaled = loss_and_gradient(implementation, inputs, sft_loss_weight=0.4, logits_scale=0.5)[0]
    inputs.logits *= np.float32(0.5)
    np.testing.assert_array_equal(scaled, loss_and_gradient(implementation, inputs, sft_loss_weight=0.4)[0])


@each
@pytest.mark.parametrize("settings", [{}, {"kd_loss": "jsd"}, {"tail": "ghost"}, {"cross_tokenizer": "rank_match"}])
def test_absent_entries_change_nothing(implementation: str, settings: dict[str, Any]) -> None:
    """In any place and with any id."""
    inputs = make_inputs(14, SHAPE)
    settings = {**settings, "sft_loss_weight": 0.4}
    expected, slope = loss_and_gradient(implementation, inputs, **settings)
    gaps = np.full((1, 3, 1), -np.inf, np.float32)
    inputs.topk_logits = np.concatenate([gaps, inputs.topk_logits[..., :2], gaps, inputs.topk_logits[..., 2:]], -1)
    ids = inputs.topk_token_ids
    bad, taken = np.full((1, 3, 1), -5, ids.dtype), ids[..., :1]
    inputs.topk_token_ids = np.concatenate([bad, ids[..., :2], taken, ids[..., 2:]], -1)
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("tail", ["renormalize", "ghost"])
def test_a_position_without_any_entry_teaches_nothing(implementation: str, tail: str) -> None:
    inputs = make_inputs(15, SHAPE)
    inputs.weight[:] = 1
    expected, slope = loss_and_gradient(implementation, inputs, tail=tail)
    inputs.topk_logits[0, 0] = -np.inf
    losses, gradient = loss_and_gradient(implementation, inputs, tail=tail)
    np.testing.assert_array_equal(losses[1], [[0, *expected[1][0, 1:]]])
    np.testing.assert_array_equal(gradient[0], [np.zeros(19), *slope[0, 1:]])


@each
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl", "jsd"])
def test_no_tail(implementation: str, kd_loss: str) -> None:
    """Where every id is taught (K = V) there is no bucket for the rest, in value and gradient."""
    inputs = make_inputs(16, (4, 16, 7, 7))
    assert_right(implementation, inputs, kd_loss=kd_loss, tail="ghost", sft_loss_weight=0.4)


@each
def test_an_impossible_tail(implementation: str) -> None:
    """Nor where every logit that is not taught is -inf."""
    inputs = make_inputs(16, SHAPE)
    inputs.weight[:] = 1
    inputs.labels = inputs.topk_token_ids[..., 2].copy()
    for z, ids in zip(inputs.logits[0], inputs.topk_token_ids[0], strict=True):
        z[np.setdiff1d(np.arange(19), ids)] = -np.inf
    settings = {"tail": "ghost", "sft_loss_weight": 0.4}
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    first = Inputs(
        np.take_along_axis(inputs.logits, inputs.topk_token_ids, axis=-1),
        inputs.topk_logits,
        np.broadcast_to(np.arange(4, dtype=np.int32), (1, 3, 4)).copy(),
        np.full((1, 3), 2, np.int32),
        inputs.weight,
        inputs.log_sum_exp_logits,
    )
    *truths, slope = oracle(first, **settings)  # of a vocabulary of the four ids
    for ours, truth in zip(losses, truths, strict=True):
        assert_close(ours, truth, "float32")
    assert_close(np.take_along_axis(gradient, inputs.topk_token_ids, axis=-1), slope, "float32")


GAPS = [28, 46, 69, 1000]  # tails of about 1e-12, 1e-20, 1e-30, and below float32's and float64's smallest number


@each
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl", "jsd"])
@pytest.mark.parametrize("gap", GAPS)
def test_vanishing_tail(implementation: str, kd_loss: str, gap: int) -> None:
    """Loss and gradient are exact for a tail of any mass, with duplicate ids too."""
    assert_right(implementation, vanishing_tail(make_inputs(18, SHAPE), gap), kd_loss=kd_loss, tail="ghost")


@each
@pytest.mark.parametrize("gap", GAPS)
def test_a_vanishing_tail_is_pulled_back(implementation: str, gap: int) -> None:
    """With the teacher's tail mass, 0.3, however far the student has forgotten it."""
    inputs = vanishing_tail(make_inputs(18, SHAPE), gap)
    inputs.weight[:] = 1
    _, gradient = loss_and_gradient(implementation, inputs, tail="ghost")
    for at in np.ndindex(1, 3):
        rest = np.setdiff1d(np.arange(19), inputs.topk_token_ids[at])
        np.testing.assert_allclose(gradient[at][rest].sum(), -0.3, rtol=1e-5)
        share = np.exp(inputs.logits[at][rest].astype(np.float64))
        np.testing.assert_allclose(gradient[at][rest], -0.3 * share / share.sum(), rtol=1e-5)


WHOLE: list[dict[str, Any]] = [
    {"tail": "ghost"},
    {"tail": "ghost", "kd_loss": "bwd_kl", "logits_scale": 0.7},
    {"tail": "ghost", "kd_loss": "jsd"},
    {"tail": "label", "sft_loss_weight": 0.3, "logits_scale": 0.7},
    {"targets": "sampled", "sft_loss_weight": 0.3, "logits_scale": 0.7},
]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("settings", WHOLE, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("gap", [0, 12, 40])
def test_finite_differences(implementation: str, settings: dict[str, Any], gap: int) -> None:
    """Of float64, with a tail of about exp(-gap), duplicate ids and a label inside and outside of the entries."""
    inputs = vanishing_tail(make_inputs(18, SHAPE), gap)
    inputs.labels[0] = inputs.topk_token_ids[0, 0, 0], np.setdiff1d(np.arange(19), inputs.topk_token_ids[0, 1])[0], 7
    with jax.enable_x64(True):

        @jax.jit
        def total(z: jax.Array) -> jax.Array:
            choice = {**settings, **inputs.whole(settings), "implementation": implementation}
            return topk_kd_loss(z, *inputs.teaching, **choice)[0].sum()

        logits = inputs.logits.astype(np.float64)
        jax.test_util.check_grads(total, (logits,), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


@each
@pytest.mark.parametrize("inside", [False, True])
def test_label_tail(implementation: str, inside: bool) -> None:
    """The missing mass goes to the label, whether or not it is an entry, without an SFT term."""
    inputs = make_inputs(21, SHAPE, duplicates=True)
    free = [np.setdiff1d(np.arange(19), ids)[3] for ids in inputs.topk_token_ids[0]]
    inputs.labels[0] = inputs.topk_token_ids[0, :, 1] if inside else free
    assert_right(implementation, inputs, tail="label")


@each
def test_label_tail_without_missing_mass(implementation: str) -> None:
    """Where the entries' probabilities add up to 1 or, rounded, to more, the label is left out, even if it is no id."""
    inputs = make_inputs(22, SHAPE)
    inputs.log_sum_exp_logits -= np.float32(2)
    inputs.weight[:] = 1
    *truths, slope = oracle(inputs, tail="label")
    inputs.labels[:] = -100
    losses, gradient = loss_and_gradient(implementation, inputs, tail="label")
    assert_close(losses[1], truths[1], "float32", scale=10)  # probabilities that add up to more than 4
    assert_close(gradient, slope, "float32", scale=10)


@each
def test_label_tail_without_entries_is_cross_entropy(implementation: str) -> None:
    inputs = make_inputs(23, SHAPE)
    inputs.topk_logits[:] = -np.inf
    inputs.weight[:] = 1
    losses, gradient = loss_and_gradient(implementation, inputs, tail="label")
    plain, slope = loss_and_gradient(implementation, inputs, kd_loss_weight=0.0, sft_loss_weight=1.0)
    np.testing.assert_allclose(losses[1], plain[2], rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("settings", [{"tail": "label"}, {"targets": "sampled"}], ids=["label", "sampled"])
def test_ids_out_of_range_are_loud_in_the_whole_softmax(implementation: str, settings: dict[str, Any]) -> None:
    inputs = make_inputs(24, SHAPE)
    good, _ = loss_and_gradient(implementation, inputs, **settings)
    inputs.topk_token_ids[0, 0, 2] = 19
    inputs.labels[0, 1] = -1
    (_, kd, _), _ = loss_and_gradient(implementation, inputs, **settings)
    expected = np.array([[True, "tail" in settings, False]])
    np.testing.assert_array_equal(np.isnan(kd), expected)
    np.testing.assert_array_equal(kd[~expected], good[1][~expected])


@each
def test_sampled_entries_without_weight(implementation: str) -> None:
    """Absent entries teach nothing whatever their weights, nor do entries of weight 0 whatever their values."""
    inputs = make_inputs(25, SHAPE)
    inputs.weight[:] = 1
    settings = {"targets": "sampled"}
    inputs.topk_weights[..., 1:3] = 0
    expected, slope = loss_and_gradient(implementation, inputs, **settings)
    inputs.topk_logits[..., 1], inputs.topk_weights[..., 1], inputs.topk_token_ids[..., 1] = -np.inf, 0.7, -3
    inputs.topk_logits[..., 2] = 1e30
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    np.testing.assert_array_equal(losses, expected)
    np.testing.assert_array_equal(gradient, slope)
    inputs.topk_logits[:] = -np.inf
    losses, gradient = loss_and_gradient(implementation, inputs, **settings)
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_a_term_of_weight_zero_stays_out() -> None:
    """Even if it is NaN: with kd_loss_weight = 0 the teacher's ids do not affect the loss or the gradient."""
    inputs = make_inputs(17, SHAPE)
    settings = {"kd_loss_weight": 0.0, "sft_loss_weight": 1.0}
    expected, slope = loss_and_gradient("xla", inputs, **settings)
    inputs.topk_token_ids[:] = 99
    losses, gradient = loss_and_gradient("xla", inputs, **settings)
    np.testing.assert_array_equal(losses[0], expected[0])
    np.testing.assert_array_equal(gradient, slope)
    np.testing.assert_array_equal(losses[1], np.nan)


def test_absent_weight_is_zero() -> None:
    assert np.exp(np.float32(ABSENT)) == 0
    assert np.isfinite(np.float32(ABSENT))
