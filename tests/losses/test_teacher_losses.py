"""A teacher beside the student, over the whole vocabulary, against float64 and complex-step derivatives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from loss_oracle import jit

from kdjax.losses import Objective, TeacherStates, teacher_losses
from kdjax.types import UserError

B, T, D, E, V = 3, 7, 5, 9, 29
SUMS = ("loss", "kd_loss", "sft_loss", "tokens", "top1_agreement", "teacher_entropy")
CASES: list[dict[str, Any]] = [
    {"kd_loss": kd_loss, "sft_loss_weight": sft, "logits_scale": 0.7, "target_logits_scale": 1.3}
    for kd_loss in ("fwd_kl", "bwd_kl", "jsd")
    for sft in (0.0, 0.4)
] + [
    {"kd_loss": "jsd", "jsd_beta": 0.2, "kd_loss_weight": 2.0},
    {"kd_loss": "bwd_kl", "kd_loss_weight": 0.0, "sft_loss_weight": 1.0},
]


class Problem(NamedTuple):
    hidden: np.ndarray
    unembed: np.ndarray
    teacher: TeacherStates
    labels: np.ndarray
    mask: np.ndarray


@functools.cache
def problem(rows: int = V, offset: float = 0.0) -> Problem:
    """Masked positions, a third, hold garbage on every side; rows from V on hold large numbers."""
    rng = np.random.default_rng(7)
    mask = np.where(rng.random((B, T)) < 1 / 3, 0, rng.uniform(0.5, 1.5, (B, T))).astype(np.float32)
    mask[0, 0] = 1.25
    gone = mask == 0

    def side(width: int) -> tuple[np.ndarray, np.ndarray]:
        hidden, unembed = rng.normal(size=(B, T, width)), rng.normal(size=(rows, width))
        hidden[..., 0], unembed[:, 0] = 1, offset + unembed[:, 0]
        unembed[V:] = 40
        hidden[gone] = np.array([np.nan, np.inf, -np.inf] * width)[: int(gone.sum())][:, None]
        return hidden.astype(np.float32), unembed.astype(np.float32)

    (hidden, unembed), teacher = side(D), TeacherStates(*side(E))
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[gone] = 2**30
    return Problem(hidden, unembed, teacher, labels, mask)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.real.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def terms(z: np.ndarray, t: np.ndarray, labels: np.ndarray, s: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """kd and sft [N] from unscaled logits [N, V] in float64, or complex for a step into the imaginary."""
    log_q, log_p = log_softmax(s.get("logits_scale", 1) * z), log_softmax(s.get("target_logits_scale", 1) * t)
    p, q, b = np.exp(log_p), np.exp(log_q), s.get("jsd_beta", 0.5)
    log_m = np.log(b * p + (1 - b) * q)
    kd = {
        "fwd_kl": p * (log_p - log_q),
        "bwd_kl": q * (log_q - log_p),
        "jsd": b * p * (log_p - log_m) + (1 - b) * q * (log_q - log_m),
    }[s["kd_loss"]].sum(-1)
    return kd, -log_q[np.arange(len(z)), labels]


def oracle(given: Problem, s: dict[str, Any]) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The sums, and the derivatives of the loss by hidden states and unembedding."""
    kept = given.mask != 0
    h, w, labels = given.hidden[kept].astype(np.float64), given.mask[kept].astype(np.float64), given.labels[kept]
    u, taught = given.unembed[:V].astype(np.float64), given.teacher.unembed[:V].astype(np.float64)
    z, t = h @ u.T, given.teacher.hidden[kept].astype(np.float64) @ taught.T
    weights = s.get("kd_loss_weight", 1.0), s.get("sft_loss_weight", 0.0)
    kd, sft = terms(z, t, labels, s)
    logits_ct = np.zeros_like(z)
    for v in range(V):
        step = z.astype(np.complex128)
        step[:, v] += 1e-30j
        stepped = terms(step, t, labels, s)
        logits_ct[:, v] = w * sum(a * x.imag / 1e-30 for a, x in zip(weights, stepped, strict=True))
    log_p = log_softmax(s.get("target_logits_scale", 1) * t)
    sums = {
        "loss": (w * (weights[0] * kd + weights[1] * sft)).sum(),
        "kd_loss": (w * kd).sum(),
        "sft_loss": (w * sft).sum() if weights[1] else 0.0,
        "tokens": w.sum(),
        "top1_agreement": (w * (z.argmax(-1) == t.argmax(-1))).sum(),
        "teacher_entropy": -(w * (np.exp(log_p) * log_p).sum(-1)).sum(),
    }
    hidden_ct, unembed_ct = np.zeros(given.hidden.shape), np.zeros(given.unembed.shape)
    hidden_ct[kept], unembed_ct[:V] = logits_ct @ u, logits_ct.T @ h
    return sums, hidden_ct, unembed_ct


def gradient(s: dict[str, Any], **how: Any) -> Any:
    """The function (hidden, unembed, teacher, labels, mask) -> sums, and both gradients."""

    def sums(hidden: Any, unembed: Any, *rest: Any) -> tuple[Any, Any]:
        found = teacher_losses(Objective(**s), hidden, unembed, *rest, **how)
        return found.loss, found

    return jax.grad(sums, argnums=(0, 1), has_aux=True)


def compare(given: Problem, s: dict[str, Any], found: Any, tolerance: float = 1e-5) -> None:
    (hidden_ct, unembed_ct), sums = found
    expected, *gradients = oracle(given, s)
    assert sums._fields == SUMS
    for name in SUMS:
        np.testing.assert_allclose(getattr(sums, name), expected[name], rtol=tolerance, err_msg=name)
    for ct, truth in zip((hidden_ct, unembed_ct), gradients, strict=True):
        assert np.abs(ct - truth).max() <= tolerance * np.abs(truth).max()
    assert not np.asarray(hidden_ct)[given.mask == 0].any()
    assert not np.asarray(unembed_ct)[V:].any()


@pytest.mark.parametrize("s", CASES, ids=str)
@pytest.mark.parametrize(("implementation", "chunk"), [(None, None), ("xla", 4), ("reference", None)], ids=str)
def test_sums_and_gradients(s: dict[str, Any], implementation: str | None, chunk: int | None) -> None:
    """In one chunk and in several ragged ones, with three rows of padding."""
    given = problem(V + 3)
    how = {"vocab_size": V, "chunk_tokens": chunk, "implementation": implementation}
    compare(given, s, jit(gradient(s, **how))(*given))


@pytest.mark.parametrize("s", CASES, ids=str)
def test_shards(s: dict[str, Any]) -> None:
    """Eight shards, of which one holds padding only, over two axes."""
    given = problem(32 + 8)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows = P(("a", "b"))
    specs = P(), rows, TeacherStates(P(), rows), P(), P()
    f = gradient(s, vocab_size=V, axis_name=("a", "b"), chunk_tokens=10)
    outs = (P(), rows), P()
    for check in (False, True):
        sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=check)
        compare(given, s, jit(sharded)(*given))


def test_without_gradients() -> None:
    for s in CASES[:6:2]:
        given, objective = problem(), Objective(**s)
        found = jit(lambda *arrays, objective=objective: teacher_losses(objective, *arrays, chunk_tokens=4))(*given)
        expected, *_ = oracle(given, s)
        for name in SUMS:
            np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-5, err_msg=name)


def test_far_from_zero() -> None:
    """Logits near 1000 on both sides, whose rounding, 6e-5, is all that is lost."""
    for s in CASES[::2]:
        given = problem(V, 1000.0)
        (_, unembed_ct), sums = jit(gradient(s, chunk_tokens=8))(*given)
        expected, _, truth = oracle(given, s)
        np.testing.assert_allclose(sums.loss, expected["loss"], rtol=1e-3)
        assert np.abs(unembed_ct - truth).max() <= 1e-3 * np.abs(truth).max()


def test_twins() -> None:
    """A student that is its teacher has nothing to learn."""
    given = problem()
    twin = TeacherStates(given.hidden, given.unembed)
    for kd_loss in ("fwd_kl", "bwd_kl", "jsd"):
        (hidden_ct, unembed_ct), sums = jit(gradient({"kd_loss": kd_loss}))(*given[:2], twin, *given[3:])
        assert abs(sums.kd_loss) < 1e-5
        assert sums.top1_agreement == sums.tokens
        assert max(np.abs(hidden_ct).max(), np.abs(unembed_ct).max()) < 1e-6


def test_bfloat16() -> None:
    given = problem()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (given.hidden, given.unembed))
    same = given._replace(hidden=np.float32(low[0]), unembed=np.float32(low[1]))
    s = CASES[1]
    (hidden_ct, unembed_ct), sums = jit(gradient(s))(*low, *given[2:])
    assert hidden_ct.dtype == unembed_ct.dtype == jnp.bfloat16
    expected, *truths = oracle(same, s)
    np.testing.assert_allclose(sums.loss, expected["loss"], rtol=1e-5)
    for ct, truth in zip((hidden_ct, unembed_ct), truths, strict=True):
        assert np.abs(np.float64(ct) - truth).max() < 2e-2 * np.abs(truth).max()


def test_memory_is_a_chunks() -> None:
    """No array of all positions by the vocabulary, and in the compiled program not much more than a chunk's logits."""
    n, v, d, chunk = 1024, 4096, 8, 16
    side = jax.ShapeDtypeStruct((1, n, d), jnp.float32), jax.ShapeDtypeStruct((v, d), jnp.float32)
    shapes = *side, TeacherStates(*side), *(jax.ShapeDtypeStruct((1, n), x) for x in (jnp.int32, jnp.float32))
    for kd_loss in ("fwd_kl", "bwd_kl", "jsd"):
        f = gradient({"kd_loss": kd_loss, "sft_loss_weight": 1.0}, chunk_tokens=chunk)
        program = jax.jit(f).lower(*shapes).compile()
        assert program.memory_analysis().temp_size_in_bytes < 10 * 4 * chunk * v < 4 * n * v / 6
        for unlike in (f"[{n},{v}]", f"[1,{n},{v}]", f"[{n // chunk},{chunk},{v}]"):
            assert unlike not in program.as_text()


@pytest.mark.parametrize(
    ("s", "how", "message"),
    [
        ({"tail": "ghost"}, {}, "tail = 'ghost' is about cached entries.*set tail = 'renormalize'"),
        ({"targets": "sampled"}, {}, "targets = 'sampled' is about cached entries"),
        ({"cross_tokenizer": True}, {}, "cross_tokenizer = 'rank_match' is about cached entries"),
        ({}, {"implementation": "gathered"}, "implementation = 'gathered' works on cached entries.*'reference', 'xla'"),
        ({"kd_loss": "kl"}, {}, "kd_loss = 'kl' is unknown"),
    ],
)
def test_refused_settings(s: dict[str, Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        teacher_losses(Objective(**s), *problem(), **how)


def test_refused_arrays() -> None:
    given = problem()
    taught = given.teacher
    for wrong, message in (
        (TeacherStates(taught.hidden, taught.unembed[:-1]), "28 rows and the student's 29"),
        (TeacherStates(taught.hidden[:, :-1], taught.unembed), r"loss_mask has shape \[3, 7\]"),
        (TeacherStates(taught.hidden, given.unembed), "differ in width"),
    ):
        with pytest.raises(UserError, match=message):
            teacher_losses(Objective(), *given._replace(teacher=wrong))
