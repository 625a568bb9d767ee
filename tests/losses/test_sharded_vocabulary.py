"""The vocabulary split over mesh axes gives the unsharded result, with few collectives."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from loss_oracle import assert_close, jit, make_inputs, oracle, vanishing_tail

from kdjax.losses import linear_topk_kd_loss, topk_kd_loss
from kdjax.types import UserError

pytestmark = pytest.mark.slow  # compiles for eight devices

SHAPE = B, T, V, K = (2, 5, 61, 7)
D = 3
AXES = ("tensor", "pipe")  # tensor is the major one
SETTINGS: list[dict[str, Any]] = [
    {"kd_loss": "fwd_kl"},
    {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4, "logits_scale": 0.7},
    {"kd_loss": "jsd", "tail": "ghost", "sft_loss_weight": 0.3},
    {"kd_loss": "fwd_kl", "tail": "ghost"},
    {"kd_loss": "bwd_kl", "cross_tokenizer": "rank_match", "sft_loss_weight": 0.4},
    {"kd_loss": "fwd_kl", "cross_tokenizer": "rank_match", "tail": "ghost"},
    {"kd_loss": "fwd_kl", "kd_loss_weight": 0.0, "sft_loss_weight": 1.0},
    {"tail": "label"},
    {"tail": "label", "sft_loss_weight": 0.3, "logits_scale": 0.7},
    {"targets": "sampled", "logits_scale": 0.7},
    {"targets": "sampled", "sft_loss_weight": 0.3},
]


def make_mesh(tensor: int, pipe: int, data: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: data * tensor * pipe]).reshape(data, tensor, pipe)
    return Mesh(devices, ("data", *AXES), axis_types=(AxisType.Auto,) * 3)


def padded(x: np.ndarray, axis: int, shards: int) -> np.ndarray:
    """Returns x with its vocabulary axis padded to a multiple of the shards by large numbers, which must not matter."""
    missing = -x.shape[axis] % shards
    filling = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return np.pad(x, filling, constant_values=77)


def problem() -> Any:
    """Returns inputs with absent and duplicate entries and labels outside the vocabulary at masked positions."""
    inputs = make_inputs(11, SHAPE, absent=True)
    inputs.topk_token_ids[0, 1, 1:3] = inputs.topk_token_ids[0, 1, 0]
    rng = np.random.default_rng(12)
    hidden, unembed = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    inputs.labels[inputs.weight == 0] = -100
    return inputs, hidden, unembed


def logits_loss(settings: dict[str, Any], logits: jax.Array, inputs: Any, **choice: Any) -> tuple[jax.Array, Any]:
    """Returns a mix of the three results over the unmasked positions, and the results."""
    losses = topk_kd_loss(logits, *inputs.teaching, **inputs.whole(settings), **settings, **choice)
    loss, kd, sft = (jnp.where(inputs.weight == 0, 0, inputs.weight * x).sum() for x in losses)
    return loss + 0.3 * kd - 0.2 * sft, (loss, kd, sft)


# Every setting on eight shards, the last of which has fewer tokens than K, and on one of the other meshes in turn.
LOGITS_MESHES = [(1, 1), (2, 1), (2, 2)]
LOGITS = [(i, sizes) for i in range(len(SETTINGS)) for sizes in ((2, 4), LOGITS_MESHES[i % 3])]


@functools.cache
def unsharded_logits(i: int) -> Any:
    """Returns logits, and results and gradient of `logits_loss` by them with the i-th settings, on one device."""
    inputs, hidden, unembed = problem()
    logits = np.einsum("BTD,VD->BTV", hidden, unembed)
    loss = functools.partial(logits_loss, SETTINGS[i], inputs=inputs, implementation="xla")
    return logits, *jit(jax.value_and_grad(loss, has_aux=True))(logits)


@pytest.mark.parametrize(("i", "sizes"), LOGITS, ids=str)
def test_logits(i: int, sizes: tuple[int, int]) -> None:
    inputs, *_ = problem()
    logits, expected, slope = unsharded_logits(i)

    def sharded(logits: jax.Array) -> Any:
        return logits_loss(SETTINGS[i], logits, inputs, axis_name=AXES, vocab_size=V, implementation="xla")

    columns = P(None, None, AXES)
    mesh, shards = make_mesh(*sizes), sizes[0] * sizes[1]
    outside = jax.value_and_grad(
        jax.shard_map(sharded, mesh=mesh, in_specs=columns, out_specs=P()), has_aux=True
    )  # check_vma=True: the derivative is taken through shard_map
    inside = jax.shard_map(
        jax.value_and_grad(sharded, has_aux=True),
        mesh=mesh,
        in_specs=columns,
        out_specs=(P(), columns),
        check_vma=False,
    )
    for f in (outside, inside) if shards == 8 else (outside,):
        ours, gradient = jit(f)(padded(logits, 2, shards))
        np.testing.assert_allclose(jax.tree.leaves(ours), jax.tree.leaves(expected), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[..., :V], slope, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[..., V:], 0)


def linear_loss(settings: dict[str, Any], hidden: Any, unembed: Any, rows: Any, **choice: Any) -> Any:
    *teaching, weight, lse, topk_weights = rows
    whole = {"log_sum_exp_logits": lse, "topk_weights": topk_weights if "targets" in settings else None}
    arguments = {**whole, "chunk_tokens": 4, **settings, **choice}
    return linear_topk_kd_loss(hidden, unembed, *teaching, weight, **arguments)


# Every setting with the positions split too, and on one of the other meshes in turn.
LINEAR_MESHES = [(2, 4), (1, 2), (2, 2), (1, 1, 2)]
LINEAR = [
    *((i, "xla", sizes) for i in range(len(SETTINGS)) for sizes in ((2, 2, 2), LINEAR_MESHES[i % 4])),
    *((0, "gathered", sizes) for sizes in ((2, 2, 2), (2, 4))),
]


@functools.cache
def unsharded_linear(i: int) -> Any:
    """Returns the sums and gradients of `linear_loss` with the i-th settings, on one device."""
    inputs, hidden, unembed = problem()
    rows = (*inputs.teaching, inputs.weight, inputs.log_sum_exp_logits, inputs.topk_weights)

    def loss(hidden: jax.Array, unembed: jax.Array) -> Any:
        sums = linear_loss(SETTINGS[i], hidden, unembed, rows, implementation="xla")
        return sums.loss, sums

    (_, sums), gradients = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembed)
    return sums, gradients


@pytest.mark.parametrize(("i", "implementation", "sizes"), LINEAR, ids=str)
def test_linear(i: int, implementation: str, sizes: tuple[int, ...]) -> None:
    """The unembedding is split over AXES, and the positions over "data"."""
    settings = SETTINGS[i]
    inputs, hidden, unembed = problem()
    rows = (*inputs.teaching, inputs.weight, inputs.log_sum_exp_logits, inputs.topk_weights)
    expected, slopes = unsharded_linear(i)
    choice = {"axis_name": AXES, "vocab_size": V, "implementation": implementation}
    batch, vocabulary = P("data"), P(AXES)

    def outside(hidden: jax.Array, unembed: jax.Array) -> Any:
        def total(*shards: Any) -> Any:
            return jax.lax.psum(linear_loss(settings, shards[0], shards[1], shards[2:], **choice), "data")

        specs = (batch, vocabulary, *[batch] * len(rows))
        sums = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())(hidden, unembed, *rows)
        return sums.loss, sums

    def inside(hidden: jax.Array, unembed: jax.Array) -> Any:
        def total(hidden: jax.Array, unembed: jax.Array, *rows: Any) -> Any:
            def loss(hidden: jax.Array, unembed: jax.Array) -> Any:
                sums = linear_loss(settings, hidden, unembed, rows, **choice)
                return sums.loss, sums

            (_, sums), (by_hidden, by_unembed) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, unembed)
            sums, by_unembed = jax.lax.psum((sums, by_unembed), "data")
            return (sums.loss, sums), (by_hidden, by_unembed)

        specs = (batch, vocabulary, *[batch] * len(rows))
        out_specs = (P(), (batch, vocabulary))
        return jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(
            hidden, unembed, *rows
        )

    mesh = make_mesh(*sizes)
    ways = [jax.value_and_grad(outside, argnums=(0, 1), has_aux=True)]
    for f in [*ways, inside] if sizes in ((2, 2, 2), (2, 4)) else ways:
        (_, ours), (by_hidden, by_unembed) = jit(f)(hidden, padded(unembed, 0, sizes[0] * sizes[1]))
        for name, value in ours._asdict().items():
            if value is not None:
                np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(by_hidden, slopes[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(by_unembed[:V], slopes[1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(by_unembed[V:], 0)


@pytest.mark.parametrize("offset", [0.0, -1000.0, 1000.0])
def test_a_shard_without_any_token(offset: float) -> None:
    """Three ids on eight shards: padding never sets the scale of the exponentials, wherever the logits lie."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(1, 2, 8)) + offset).astype(np.float32)
    topk_logits = rng.normal(size=(1, 2, 2)).astype(np.float32)
    ids, labels = np.array([[[2, 0], [1, 2]]]), np.array([[0, 2]])

    def total(z: jax.Array, **choice: Any) -> jax.Array:
        return topk_kd_loss(z, topk_logits, ids, labels, sft_loss_weight=0.5, implementation="xla", **choice)[0].sum()

    expected, slope = jit(jax.value_and_grad(total))(logits[..., :3])
    on_shards = functools.partial(total, axis_name=AXES, vocab_size=3)
    sharded = jax.shard_map(on_shards, mesh=make_mesh(4, 2), in_specs=P(None, None, AXES), out_specs=P())
    loss, gradient = jit(jax.value_and_grad(sharded))(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :3], slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., 3:], 0)


@pytest.mark.parametrize("gap", [0, 28, 69, 1000])
@pytest.mark.parametrize("kd_loss", ["fwd_kl", "bwd_kl", "jsd"])
def test_a_vanishing_tail(kd_loss: str, gap: int) -> None:
    """It is summed over the shards, some of which hold nothing else, against float64; masked positions hold NaN."""
    inputs = vanishing_tail(make_inputs(13, (1, 5, 13, 4)), gap)
    settings = {"kd_loss": kd_loss, "tail": "ghost", "sft_loss_weight": 0.3}
    *_, slope = oracle(inputs, **settings)
    inputs.logits[inputs.weight == 0] = np.nan

    def total(logits: jax.Array) -> jax.Array:
        arguments = {**settings, **inputs.whole(settings), "axis_name": AXES, "vocab_size": 13}
        loss = topk_kd_loss(logits, *inputs.teaching, implementation="xla", **arguments)[0]
        return jnp.where(inputs.weight == 0, 0, inputs.weight * loss).sum()

    for sizes in ((2, 1), (2, 2)):
        on_shards = jax.shard_map(total, mesh=make_mesh(*sizes), in_specs=P(None, None, AXES), out_specs=P())
        gradient = jit(jax.grad(on_shards))(padded(inputs.logits, 2, sizes[0] * sizes[1]))
        assert_close(gradient[..., :13], slope * inputs.weight[..., None], "float32", scale=0.02)


def test_a_taught_vocabulary() -> None:
    """With K = V there is no tail on any shard."""
    inputs = make_inputs(14, (1, 3, 7, 7))
    settings = {"tail": "ghost", "sft_loss_weight": 0.3}
    loss = functools.partial(logits_loss, settings, inputs=inputs, implementation="xla")
    (expected, _), slope = jit(jax.value_and_grad(loss, has_aux=True))(inputs.logits)
    on_shards = functools.partial(loss, axis_name=AXES, vocab_size=7)
    sharded = jax.shard_map(on_shards, mesh=make_mesh(2, 2), in_specs=P(None, None, AXES), out_specs=P())
    (ours, _), gradient = jit(jax.value_and_grad(sharded, has_aux=True))(padded(inputs.logits, 2, 4))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :7], slope, rtol=1e-5, atol=1e-6)


def all_reduced(program: str) -> list[int]:
    """Returns the number of elements of each all-reduce in an optimised program; fails on other collectives."""
    assert not re.search(r" (all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", program)
    sizes = []
    for result in re.findall(r"= (\(?[^=]*?\)?) all-reduce(?:-start)?\(", program):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes.append(sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes))
    return sizes


@pytest.mark.parametrize(
    "settings", [SETTINGS[i] for i in (0, 2, 4, 7, 9)], ids=lambda s: "-".join(map(str, s.values()))
)
def test_collectives(settings: dict[str, Any]) -> None:
    """Forward one all-reduce of K + 1 + 2 shards numbers per position, backward one of the hidden states.

    Rank matching has another one forward, of the K candidates of each shard.
    """
    inputs, hidden, unembed = problem()
    mesh = make_mesh(2, 2)
    rows = (*inputs.teaching, inputs.weight, inputs.log_sum_exp_logits, inputs.topk_weights)

    def sharded(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        choice = {"axis_name": AXES, "vocab_size": V, "chunk_tokens": B * T, "implementation": "xla"}
        return linear_loss(settings, hidden, unembed, rows, **choice).loss

    loss = jax.shard_map(sharded, mesh=mesh, in_specs=(P(), P(AXES)), out_specs=P())
    arguments = hidden, padded(unembed, 0, 4)
    forward = all_reduced(jax.jit(loss).lower(*arguments).compile().as_text())
    label = 1 if settings.get("sft_loss_weight") or settings.get("tail") == "label" else 0
    expected = [B * T * (K + label + 2 * 4)]
    expected += [B * T * 4 * K] if settings.get("cross_tokenizer") else []
    assert sorted(forward) == sorted(expected)
    both = all_reduced(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text())
    assert sorted(both) == sorted([*expected, B * T * D])

    def on_logits(logits: jax.Array) -> jax.Array:
        return logits_loss(settings, logits, inputs, axis_name=AXES, vocab_size=V, implementation="xla")[0]

    logits = padded(np.einsum("BTD,VD->BTV", hidden, unembed), 2, 4)
    loss = jax.shard_map(on_logits, mesh=mesh, in_specs=P(None, None, AXES), out_specs=P())
    assert len(all_reduced(jax.jit(jax.grad(loss)).lower(logits).compile().as_text())) == len(expected)


def test_the_specification_takes_the_whole_vocabulary() -> None:
    inputs, *_ = problem()

    def loss(logits: jax.Array) -> jax.Array:
        return topk_kd_loss(logits, *inputs.teaching, axis_name=AXES, implementation="reference")[0].sum()

    with pytest.raises(UserError, match=r"'reference' needs the whole vocabulary, not shards over \('tensor',"):
        jax.shard_map(loss, mesh=make_mesh(2, 1), in_specs=P(None, None, AXES), out_specs=P())(jnp.ones((B, T, 64)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_without_shards(implementation: str) -> None:
    """Padded columns on one device, with `vocab_size` alone."""
    inputs, hidden, unembed = problem()
    rows = (*inputs.teaching, inputs.weight, inputs.log_sum_exp_logits, inputs.topk_weights)

    def loss(unembed: jax.Array, **choice: Any) -> jax.Array:
        return linear_loss(SETTINGS[2], hidden, unembed, rows, implementation=implementation, **choice).loss

    expected, slope = jit(jax.value_and_grad(loss))(unembed)
    ours, gradient = jit(jax.value_and_grad(functools.partial(loss, vocab_size=V)))(padded(unembed, 0, 8))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:V], slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[V:], 0)
