"""The Pallas kernels' arithmetic, interpreted on the CPU, against float64. See also test_compiled_kernels.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from loss_oracle import Inputs, assert_close, jit, logsumexp, make_inputs, oracle, quick_compilation

from kdjax.losses.closed_form import Picked, evaluate, term_cotangents, with_total
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.rows import Rows, pallas
from kdjax.losses.vocabulary import Vocabulary, join, taught_rows

# (dtype, (N, V, K), settings, traits for `make_inputs`). A tile is 4096 columns of float32, 8192 of 16-bit floats.
CASES: list[tuple[str, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    ("float32", (7, 2, 1), {"kd_loss": "fwd_kl", "sft_loss_weight": 0.4}, {}),
    ("float32", (5, 3, 3), {"kd_loss": "bwd_kl", "tail": "ghost", "sft_loss_weight": 0.4}, {}),
    ("bfloat16", (3, 17, 4), {"kd_loss": "jsd", "jsd_beta": 0.3, "sft_loss_weight": 0.4}, {}),
    ("float16", (5, 61, 61), {"kd_loss": "fwd_kl", "sft_loss_weight": 1.0, "kd_loss_weight": 0.0}, {}),
    ("float32", (3, 4099, 61), {"kd_loss": "fwd_kl", "tail": "ghost", "logits_scale": 0.7}, {}),
    ("float32", (2, 4096, 5), {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4}, {}),
    ("float32", (1, 12289, 5), {"kd_loss": "fwd_kl", "sft_loss_weight": 0.4}, {"absent": True}),
    ("bfloat16", (2, 8209, 100), {"kd_loss": "bwd_kl", "sft_loss_weight": 0.4}, {"duplicates": True}),
    ("float16", (3, 4099, 5), {"kd_loss": "jsd", "tail": "ghost"}, {"absent": True}),
    ("float32", (3, 61, 100), {"kd_loss": "jsd", "sft_loss_weight": 0.4}, {"duplicates": True, "absent": True}),
    ("float32", (3, 61, 5), {"kd_loss": "bwd_kl", "target_logits_scale": 1.5}, {"absent": True}),
    ("bfloat16", (5, 61, 5), {"kd_loss": "jsd"}, {"duplicates": True}),
    ("float32", (3, 61, 5), {"kd_loss": "fwd_kl", "tail": "ghost", "sft_loss_weight": 0.4}, {"offset": 1000.0}),
    ("float32", (3, 61, 5), {"kd_loss": "fwd_kl", "sft_loss_weight": 0.4}, {"offset": -1000.0}),
    ("bfloat16", (3, 8209, 100), {"kd_loss": "bwd_kl", "tail": "ghost", "sft_loss_weight": 0.4}, {"duplicates": True}),
    ("float32", (5, 4099, 61), {"tail": "label", "logits_scale": 0.7}, {"absent": True}),
    ("float16", (5, 61, 5), {"tail": "label", "sft_loss_weight": 0.4}, {"duplicates": True}),
    ("float32", (5, 4099, 61), {"targets": "sampled", "sft_loss_weight": 0.4}, {"duplicates": True}),
    ("bfloat16", (5, 61, 5), {"targets": "sampled", "logits_scale": 0.7}, {"absent": True}),
]


INTERPRETED = pallas.Kernels(interpret=True)


def interpret(
    objective: Objective, size: int, logits: jax.Array, supervision: Supervision, weight: jax.Array, dtype: Any = None
) -> tuple[Any, jax.Array]:
    """Returns (loss, kd, sft) [B, T] and the gradient of the loss summed with `weight`; `size` columns are valid."""
    vocabulary = Vocabulary(size)
    rows = taught_rows(objective, vocabulary, logits, supervision)
    for_kd = None if objective.ghost else supervision
    picked, kd, exponentials, without_entries = INTERPRETED.sweep(
        objective, rows, log_sum=objective.needs_log_sum, supervision=for_kd
    )
    assert (kd is None) == objective.ghost
    assert exponentials is None
    picked = join(objective, vocabulary, picked, rows, supervision)
    rows = rows if without_entries is None else rows._replace(logits=without_entries)
    zero = jnp.zeros_like(weight)
    term_cts = term_cotangents(objective, (weight, zero, zero))
    dtype = dtype or logits.dtype
    gradient = INTERPRETED.spread(objective, rows, picked, supervision, *term_cts, dtype=dtype)
    return evaluate(objective, picked, supervision, kd), gradient


compiled = jax.jit(interpret, static_argnums=(0, 1), static_argnames=("dtype",), compiler_options=quick_compilation())


def supervision_of(inputs: Inputs, **settings: Any) -> Supervision:
    return jax.tree.map(jnp.asarray, Supervision(*inputs.teaching, **inputs.whole(settings)))


def run(inputs: Inputs, size: int | None = None, dtype: Any = None, **settings: Any) -> tuple[Any, np.ndarray]:
    logits, weight = jnp.asarray(inputs.logits), jnp.asarray(inputs.weight)
    size = size or inputs.logits.shape[-1]
    supervision = supervision_of(inputs, **settings)
    losses, gradient = compiled(Objective(**settings), size, logits, supervision, weight, dtype=dtype)
    return [np.asarray(x) for x in losses], np.asarray(gradient)


def assert_right(inputs: Inputs, dtype: str, found: tuple[Any, np.ndarray], **settings: Any) -> None:
    losses, gradient = found
    *truths, slope = oracle(inputs, **settings)
    for ours, truth in zip(losses, truths, strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, "float32")
    assert gradient.dtype == dtype
    assert_close(gradient, slope * inputs.weight[..., None], dtype)


@pytest.mark.parametrize(("dtype", "shape", "settings", "kind"), CASES, ids=lambda x: str(x).replace(" ", ""))
def test_values_and_gradients(
    dtype: str, shape: tuple[int, int, int], settings: dict[str, Any], kind: dict[str, Any]
) -> None:
    n, v, k = shape
    inputs = make_inputs(n + v + k, (1, n, v, k), dtype, **kind)
    assert_right(inputs, dtype, run(inputs, **settings), **settings)


def test_a_masked_row_may_hold_anything_and_has_no_gradient() -> None:
    settings = {"kd_loss": "jsd", "tail": "ghost", "sft_loss_weight": 0.4}
    inputs = make_inputs(1, (1, 5, 61, 5))
    losses, gradient = run(inputs, **settings)
    masked = inputs.weight == 0
    assert 0 < masked.sum() < masked.size
    for array in (inputs.logits, inputs.topk_logits, inputs.log_sum_exp_logits):
        array[masked] = np.nan
    losses_beside, gradient_beside = run(inputs, **settings)
    np.testing.assert_array_equal(gradient_beside[masked], 0)
    np.testing.assert_array_equal(gradient_beside[~masked], gradient[~masked])
    for ours, before in zip(losses_beside, losses, strict=True):
        np.testing.assert_array_equal(ours[~masked], before[~masked])


@pytest.mark.parametrize("tail", ["renormalize", "ghost"])
def test_student_minus_infinity_weighs_nothing(tail: str) -> None:
    settings = {"kd_loss": "bwd_kl", "tail": tail, "sft_loss_weight": 0.4}
    inputs = make_inputs(6, (1, 3, 4099, 4))
    for at in np.ndindex(1, 3):
        inputs.logits[at][inputs.topk_token_ids[at][1]] = -np.inf
        untaught = np.setdiff1d(np.arange(4099), [*inputs.topk_token_ids[at], inputs.labels[at]])
        inputs.logits[at][untaught[:4000]] = -np.inf  # most lanes see nothing but -inf in the first tile
    found = run(inputs, **settings)
    inputs.logits = np.maximum(inputs.logits, -1e4)
    assert_right(inputs, "float32", found, **settings)


def test_an_id_outside_the_vocabulary_is_a_nan() -> None:
    inputs = make_inputs(2, (1, 3, 61, 5))
    inputs.topk_token_ids[0, 1, 2], inputs.labels[0, 2] = 61, -7
    (_, kd, sft), _ = run(inputs, sft_loss_weight=0.4)
    assert np.isnan(kd).tolist() == [[False, True, False]]
    assert np.isnan(sft).tolist() == [[False, False, True]]


@pytest.mark.parametrize("padding", [1e4, np.nan])
@pytest.mark.parametrize(("v", "columns"), [(61, 64), (4099, 8200)])
def test_padding_columns_stay_out(v: int, columns: int, padding: float) -> None:
    settings = {"tail": "ghost", "sft_loss_weight": 0.4}
    inputs = make_inputs(3, (1, 3, v, 5))
    padded = make_inputs(3, (1, 3, v, 5))
    padded.logits = np.pad(inputs.logits, [(0, 0), (0, 0), (0, columns - v)], constant_values=padding)
    losses, gradient = run(padded, size=v, **settings)
    np.testing.assert_array_equal(gradient[..., v:], 0)
    assert_right(inputs, "float32", (losses, gradient[..., :v]), **settings)


def test_a_row_of_padding_is_empty() -> None:
    """The last shards of a small vocabulary have such rows."""
    logits, columns = jnp.full((3, 17), jnp.nan), jnp.full((3, 5), 17, jnp.int32)
    picked, kd, _, _ = INTERPRETED.sweep(Objective(), Rows(logits, columns, jnp.int32(0)), log_sum=True)
    np.testing.assert_array_equal(picked.row_max, -np.inf)
    np.testing.assert_array_equal(picked.log_sum, -np.inf)
    np.testing.assert_array_equal(picked.topk, np.nan)
    assert kd is None
    picked = INTERPRETED.sweep(Objective(tail="ghost"), Rows(logits, columns, jnp.int32(0)), log_sum=True).picked
    np.testing.assert_array_equal(picked.tail_max, -np.inf)
    np.testing.assert_array_equal(picked.tail_log_sum, -np.inf)
    assert picked.row_max is None


def test_shards_of_the_vocabulary() -> None:
    """Each shard sweeps its columns, the picked numbers are joined, and each shard spreads to its columns."""
    settings = {"kd_loss": "bwd_kl", "tail": "ghost", "sft_loss_weight": 0.4}
    objective, v, w = Objective(**settings), 61, 21
    inputs = make_inputs(4, (1, 5, v, 7))
    supervision = supervision_of(inputs)
    padded = np.pad(inputs.logits, [(0, 0), (0, 0), (0, 3 * w - v)], constant_values=1e4)
    taught = np.concatenate([inputs.topk_token_ids, inputs.labels[..., None]], axis=-1)
    shards, parts = [], []
    for first in range(0, v, w):
        here = (taught >= first) & (taught < first + w)
        columns = jnp.asarray(np.where(here, taught - first, w).astype(np.int32))
        logits, n_valid = jnp.asarray(padded[..., first : first + w]), jnp.int32(min(w, v - first))
        rows = Rows(logits, columns, n_valid)
        picked, kd, _, without_entries = INTERPRETED.sweep(objective, rows, log_sum=True)
        shards.append(rows._replace(logits=without_entries))
        assert kd is None
        assert np.isnan(picked.topk).tolist() == (~here[..., :-1]).tolist()
        parts.append(picked)
    tail_max = np.max([part.tail_max for part in parts], axis=0)
    shifted = [part.tail_log_sum + part.tail_max - tail_max for part in parts]
    joined = Picked(
        jnp.asarray(np.nansum([part.topk for part in parts], axis=0)),
        jnp.asarray(np.nansum([part.label for part in parts], axis=0)),
        tail_max=jnp.asarray(tail_max),
        tail_log_sum=jnp.asarray(logsumexp(np.stack(shifted, axis=-1))),
    )
    joined = with_total(objective, joined, jnp.ones(supervision.topk_logits.shape, bool))
    weight = jnp.asarray(inputs.weight)
    term_cts = term_cotangents(objective, (weight, 0 * weight, 0 * weight))
    spread = functools.partial(INTERPRETED.spread, objective, dtype=padded.dtype)
    gradients = [spread(rows, joined, supervision, *term_cts) for rows in shards]
    gradient = np.concatenate(gradients, axis=-1)
    np.testing.assert_array_equal(gradient[..., v:], 0)
    losses = [np.asarray(x) for x in evaluate(objective, joined, supervision)]
    assert_right(inputs, "float32", (losses, gradient[..., :v]), **settings)


def test_without_the_log_sum_only_the_taught_logits_are_picked() -> None:
    inputs = make_inputs(5, (1, 3, 61, 5))
    rows = taught_rows(Objective(), Vocabulary(61), jnp.asarray(inputs.logits), supervision_of(inputs))
    picked = INTERPRETED.sweep(Objective(), rows, log_sum=False).picked
    assert picked.row_max is None
    assert picked.log_sum is None
    np.testing.assert_array_equal(picked.topk, np.take_along_axis(inputs.logits, inputs.topk_token_ids, axis=-1))


def test_the_cotangent_takes_the_dtype_asked_for() -> None:
    """It is rounded once: float32 logits of a chunk have a bfloat16 cotangent, for the matmuls."""
    settings = {"sft_loss_weight": 0.4}
    inputs = make_inputs(7, (1, 3, 4099, 5))
    assert_right(inputs, "bfloat16", run(inputs, dtype=jnp.bfloat16, **settings), **settings)


def test_many_entries_are_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates in different parts of the K entries add up too, and the label with them."""
    settings = {"kd_loss": "fwd_kl", "sft_loss_weight": 0.4}
    inputs = make_inputs(8, (1, 3, 17, 40), duplicates=True)
    inputs.labels[:] = inputs.topk_token_ids[..., -1]
    monkeypatch.setattr(pallas, "PAIRS", 512)  # 8 of the 64 at a time
    compiled.clear_cache()
    assert_right(inputs, "float32", run(inputs, **settings), **settings)
    compiled.clear_cache()


def test_under_vmap() -> None:
    inputs = make_inputs(9, (4, 3, 61, 5))
    whole = run(inputs, sft_loss_weight=0.4)
    mapped = functools.partial(interpret, Objective(sft_loss_weight=0.4), 61)
    rows = jit(jax.vmap(jax.vmap(mapped)))(
        jnp.asarray(inputs.logits), supervision_of(inputs), jnp.asarray(inputs.weight)
    )
    for ours, expected in zip(jax.tree.leaves(rows), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def kernels(logits: jax.Array, supervision: Supervision, weight: jax.Array) -> tuple[Any, jax.Array]:
    """Returns the kd term and the gradient from the kernels for a GPU."""
    objective = Objective(sft_loss_weight=0.4, tail="ghost")
    rows = taught_rows(objective, Vocabulary(logits.shape[-1]), logits, supervision)
    picked, _, _, without_entries = pallas.Kernels().sweep(objective, rows, log_sum=True)
    picked = join(objective, Vocabulary(logits.shape[-1]), picked, rows, supervision)
    rows = rows._replace(logits=without_entries)
    kd = evaluate(objective, picked, supervision)[1]
    cotangents = (weight, weight)
    return kd, pallas.Kernels().spread(objective, rows, picked, supervision, *cotangents, dtype=logits.dtype)


def lowered(f: Any, *arguments: Any, devices: int = 1) -> str:
    """Returns the program for GPUs as text, lowered on a machine without one."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


# JAX 0.11 and later warn whenever such a kernel is lowered; Python hides this warning by default.
deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@deprecated
@pytest.mark.parametrize("wrap", [lambda f: f, jax.vmap], ids=["whole", "vmap"])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lowers_for_a_gpu(dtype: str, x64: bool, wrap: Any) -> None:
    inputs = make_inputs(0, (2, 3, 4099, 5), dtype)
    with jax.enable_x64(x64):
        text = lowered(wrap(kernels), jnp.asarray(inputs.logits), supervision_of(inputs), jnp.asarray(inputs.weight))
    assert text.count("xla.gpu.triton") == 2
    # The logits without the entries take the logits' memory, and then the gradient takes it.
    assert text.count("#stablehlo.output_operand_alias") == 2


@deprecated
def test_under_shard_map() -> None:
    """Results vary over the mesh axes of the inputs; JAX's interpreted kernels work unchecked only."""
    inputs = make_inputs(10, (1, 8, 61, 5))
    split = P(None, "data")
    arguments = jnp.asarray(inputs.logits), supervision_of(inputs), jnp.asarray(inputs.weight)
    checked = jax.shard_map(kernels, in_specs=split, out_specs=split, check_vma=True)
    assert lowered(checked, *arguments, devices=8).count("xla.gpu.triton") == 2
    mesh = Mesh(np.array(jax.devices()), ("data",))
    f = functools.partial(interpret, Objective(sft_loss_weight=0.4), 61)
    unchecked = jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    for ours, whole in zip(jax.tree.leaves(unchecked(*arguments)), jax.tree.leaves(jit(f)(*arguments)), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


def test_float64_is_refused() -> None:
    with jax.enable_x64(True), pytest.raises(AssertionError, match="float64"):
        pallas.Kernels().sweep(Objective(), Rows(jnp.zeros((1, 3)), jnp.zeros((1, 2), jnp.int32)), log_sum=True)
