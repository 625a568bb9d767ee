"""Rows of logits as one GPU kernel a direction, in Pallas by its Triton lowering: the two functions of `xla.py`.

A program works on one row. Forward, it reads the row once, picks the taught logits from memory by their columns
and evaluates the divergence; backward, it reads the row once and writes its cotangent once, in place where the
logits die. Teacher and logits are never compared block by block: that would be K comparisons a logit.

The sweep keeps a maximum and a sum for each of L lanes; a lane is a column of the [R, L] tile that the program
reads at a time. The R logits of a lane lie in the registers of one thread, so the loop has no reduction across
threads, no shared memory and no barrier, and 1 + 1/R exponentials a logit; the lanes are joined after it. Whole
tiles are read without a mask, 16 bytes a load where rows are so aligned (V a multiple of 8 of 2-byte logits, of 4
of 4-byte ones), and the rest of the row with one. `docs/kernels.md` has what this compiles to.

Letters of the kernels' shapes: R and L as above; E the K entries padded to a power of two (Triton has no other
sizes), the padding as absent entries; J the entries that are compared with all E at a time.

XLA cannot partition a kernel: a program over several devices calls it within `jax.shard_map`, or its logits are
gathered on each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses.closed_form import Picked, PickedCotangents, differentiate, kd_term
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.platform import varying

THREADS = 256  # a program's
LOAD_BYTES = 16  # the widest load of a thread
LOADS = 4  # R: a thread's loads at a time; each spares exponentials and costs registers, 4 or (16-bit logits) 8
PAIRS = 4096  # J * E, unless E alone is more: 16 a thread
LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)


def sweep(
    objective: Objective,
    logits: Float[Array, "*P V"],
    columns: Int[Array, "*P K+1"],
    *,
    log_sum: bool,
    width: Int[Array, ""] | None = None,
    supervision: Supervision | None = None,
    store: bool = False,
    interpret: bool = False,
) -> tuple[Picked, Float[Array, "*P"] | None, None]:
    """What the objective needs of each row, reading it once; `xla.sweep` but for the following.

    Args:
      supervision: the kd term is evaluated from it in the same program; None: it is left to the caller.
      store: not read: no exponentials are kept.
      interpret: whether to run the kernel's arithmetic in plain JAX, on any platform; within `shard_map`, with
        check_vma=False only.
    """
    del store
    assert logits.dtype.itemsize <= 4, logits.dtype  # the caller refuses float64
    *positions, _ = logits.shape
    given = _Sweep(logits, columns, _of_each(width, positions))
    if supervision is not None:
        teacher_log_sum = supervision.log_sum_exp_logits if objective.ghost else None
        given = given._replace(topk_logits=supervision.topk_logits, teacher_log_sum=teacher_log_sum)
    number = jax.ShapeDtypeStruct(tuple(positions), jnp.float32)
    made = _Swept(
        topk=jax.ShapeDtypeStruct((*positions, columns.shape[-1] - 1), jnp.float32),
        label=number,
        row_max=number if log_sum else None,
        log_sum=number if log_sum else None,
        kd=None if supervision is None else number,
    )
    kernel = functools.partial(_sweep_kernel, objective)
    *picked, kd = _each_row("kdjax_sweep", kernel, len(positions), given, made, interpret=interpret)
    return Picked(*picked), kd, None


def spread(
    objective: Objective,
    logits: Float[Array, "*P V"],
    columns: Int[Array, "*P K+1"],
    picked: Picked,
    supervision: Supervision,
    kd_ct: Float[Array, "*P"],
    sft_ct: Float[Array, "*P"],
    *,
    dtype: jnp.dtype,
    width: Int[Array, ""] | None = None,
    cache: None = None,
    interpret: bool = False,
) -> Float[Array, "*P V"]:
    """The logits' cotangent in `dtype`, reading each row once and writing it once; else `xla.spread`.

    Rows whose cotangents are 0 are written only. Where `dtype` is the logits' the result takes their memory; XLA
    copies logits that are needed later.
    """
    assert cache is None
    assert logits.dtype.itemsize <= 4, logits.dtype
    *positions, _ = logits.shape
    given = _Spread(
        logits,
        columns,
        _of_each(width, positions),
        supervision.topk_logits,
        supervision.log_sum_exp_logits if objective.ghost else None,
        picked,
        kd_ct,
        sft_ct,
    )
    made = jax.ShapeDtypeStruct(logits.shape, dtype)
    kernel = functools.partial(_spread_kernel, objective, interpret)
    in_place = logits.dtype == dtype
    return _each_row("kdjax_spread", kernel, len(positions), given, made, in_place=in_place, interpret=interpret)


class _Sweep(NamedTuple):
    """What the forward kernel reads: arrays of all rows, and within the kernel refs to its own."""

    logits: Any  # V
    columns: Any  # K+1
    width: Any  # a number, or None
    topk_logits: Any = None  # K
    teacher_log_sum: Any = None  # a number, or None


class _Swept(NamedTuple):
    """What the forward kernel writes."""

    topk: Any
    label: Any
    row_max: Any  # a number, or None
    log_sum: Any  # likewise
    kd: Any  # likewise


class _Spread(NamedTuple):
    """What the backward kernel reads."""

    logits: Any
    columns: Any
    width: Any
    topk_logits: Any
    teacher_log_sum: Any
    picked: Picked
    kd_ct: Any
    sft_ct: Any


def _sweep_kernel(objective: Objective, given: _Sweep, made: _Swept) -> None:
    v, k = given.logits.shape[0], made.topk.shape[0]
    entries_E = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    columns_E = _load(given.columns, entries_E, entries_E < k, v)
    label_column = given.columns[k]
    picked = Picked(
        _load(given.logits, columns_E, columns_E < v, jnp.nan).astype(jnp.float32),
        _load(given.logits, label_column, label_column < v, jnp.nan).astype(jnp.float32),
    )
    plgpu.store(made.topk.at[entries_E], picked.topk, mask=entries_E < k)
    made.label[...] = picked.label
    if made.log_sum is not None:
        row_max, log_sum = _log_sum(objective, given.logits, _number(given.width))
        made.row_max[...], made.log_sum[...] = row_max, log_sum
        picked = picked._replace(row_max=row_max, log_sum=log_sum)
    if made.kd is not None:
        made.kd[...] = kd_term(objective, picked, _supervision(given, entries_E, columns_E))


def _spread_kernel(objective: Objective, interpret: bool, given: _Spread, logits_ct: Any) -> None:
    v, k = logits_ct.shape[0], given.topk_logits.shape[0]
    entries_E = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    columns_E = _load(given.columns, entries_E, entries_E < k, v)
    topk, *rest = given.picked
    picked = Picked(_load(topk, entries_E, entries_E < k, jnp.nan), *map(_number, rest))
    supervision = _supervision(given, entries_E, columns_E)
    cotangents = differentiate(objective, picked, supervision, given.kd_ct[...], given.sft_ct[...])
    dense = _Dense(objective.logits_scale, jnp.float32(0), jnp.float32(0))
    if cotangents.log_sum is not None:
        assert picked.row_max is not None
        assert picked.log_sum is not None
        factor = objective.logits_scale * cotangents.log_sum * jnp.exp(-picked.log_sum)
        dense = _Dense(objective.logits_scale, jnp.where(cotangents.log_sum == 0, 0, factor), picked.row_max)
    _stream(dense, None if cotangents.log_sum is None else given.logits, _number(given.width), logits_ct)
    if not interpret:  # one thread there, and no rule for barriers
        plgpu.debug_barrier()  # what follows replaces what other threads have just written
    _overwrite(dense, given, columns_E, cotangents, logits_ct)


def _supervision(given: _Sweep | _Spread, entries_E: Int[Array, "E"], columns_E: Int[Array, "E"]) -> Supervision:
    """Of this row; entries from K on are absent."""
    k = given.topk_logits.shape[0]
    topk_logits_E = _load(given.topk_logits, entries_E, entries_E < k, -jnp.inf)
    return Supervision(topk_logits_E, columns_E, given.columns[k], _number(given.teacher_log_sum))


class _Dense(NamedTuple):
    """What a column receives through the log-sum: factor exp(scale (z - row_max)), and 0 if the factor is."""

    scale: float
    factor: Float[Array, ""]
    row_max: Float[Array, ""]

    def at(self, z: Float[Array, "*S"]) -> Float[Array, "*S"]:
        return jnp.where(self.factor == 0, 0, self.factor * _exp(self.scale, z - self.row_max))


def _log_sum(objective: Objective, logits: Any, width: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`Picked`'s row_max and log_sum."""
    scale = objective.logits_scale

    def step(columns_RxL: Array, mask: Array | None, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        largest_L, total_L = carry
        z_RxL = _real(width, columns_RxL, _load(logits, columns_RxL, mask, -jnp.inf))
        new_L = jnp.maximum(largest_L, z_RxL.max(axis=0))
        kept_L = total_L * _exp(scale, largest_L - new_L)
        return new_L, kept_L + _exp(scale, z_RxL - new_L).sum(axis=0)

    # From a finite number, so that a lane of -inf only adds exp(-inf - LOWEST) = 0 to its sum, not a NaN.
    lanes = _lanes(logits.dtype)
    start = jnp.full((lanes,), LOWEST, jnp.float32), jnp.zeros((lanes,), jnp.float32)
    largest_L, total_L = _each_tile(logits, step, start)
    row_max = largest_L.max()
    total = (total_L * _exp(scale, largest_L - row_max)).sum()
    # A shard's row may hold no token; then neither of the two may set the scale of the other shards.
    return jnp.where(total == 0, -jnp.inf, row_max), jnp.log(total)


def _stream(dense: _Dense, logits: Any | None, width: Any, logits_ct: Any) -> None:
    """Write the dense part, or zeros where there are no logits."""

    def step(columns_RxL: Array, mask: Array | None, carry: tuple[()]) -> tuple[()]:
        dense_RxL = jnp.zeros(columns_RxL.shape, jnp.float32)
        if logits is not None:
            live = jnp.broadcast_to(dense.factor != 0, columns_RxL.shape)  # rows of zeros need not be read
            live = live if mask is None else live & mask
            z_RxL = _load(logits, columns_RxL, live, -jnp.inf)
            dense_RxL = dense.at(_real(width, columns_RxL, z_RxL))
        plgpu.store(logits_ct.at[columns_RxL], dense_RxL.astype(logits_ct.dtype), mask=mask)
        return carry

    _each_tile(logits_ct, step, ())


def _overwrite(
    dense: _Dense, given: _Spread, columns_E: Int[Array, "E"], cotangents: PickedCotangents, logits_ct: Any
) -> None:
    """Write the taught columns: the dense part and the cotangents of all entries, and the label, with that column."""
    v, k, e = logits_ct.shape[0], given.topk_logits.shape[0], columns_E.shape[0]
    label_column, dtype = given.columns[k], logits_ct.dtype
    j = min(e, max(1, PAIRS // e))

    def step(i: Array, carry: tuple[()]) -> tuple[()]:
        entries_J = i * j + jnp.arange(j, dtype=jnp.int32)
        columns_J = _load(given.columns, entries_J, entries_J < k, v)
        z_J = _load(given.picked.topk, entries_J, entries_J < k, 0)
        same_JxE = columns_J[:, None] == columns_E[None, :]
        value_J = dense.at(z_J) + jnp.where(same_JxE, cotangents.topk[None, :], 0).sum(axis=1)
        value_J += jnp.where(columns_J == label_column, cotangents.label, 0)
        plgpu.store(logits_ct.at[columns_J], value_J.astype(dtype), mask=columns_J < v)
        return carry

    jax.lax.fori_loop(np.int32(0), np.int32(pl.cdiv(k, j)), step, ())
    alone = (label_column < v) & (jnp.where(columns_E == label_column, 1, 0).max() == 0)
    value = dense.at(given.picked.label[...]) + cotangents.label
    plgpu.store(logits_ct.at[label_column], value.astype(dtype), mask=alone)


_Carry = TypeVar("_Carry")


def _each_tile(
    row: Any, step: Callable[[Int[Array, "R L"], Bool[Array, "R L"] | None, _Carry], _Carry], carry: _Carry
) -> _Carry:
    """Carry through `step` for the columns of each tile, and for the rest of the row with a mask."""
    v, lanes = row.shape[0], _lanes(row.dtype)
    tile = LOADS * lanes
    columns_RxL = jax.lax.broadcasted_iota(jnp.int32, (LOADS, lanes), 0) * lanes
    columns_RxL += jax.lax.broadcasted_iota(jnp.int32, (LOADS, lanes), 1)
    whole = v // tile
    carry = jax.lax.fori_loop(
        np.int32(0), np.int32(whole), lambda i, carry: step(i * tile + columns_RxL, None, carry), carry
    )
    if v % tile:
        columns_RxL += whole * tile
        carry = step(columns_RxL, columns_RxL < v, carry)
    return carry


def _lanes(dtype: jnp.dtype) -> int:
    """L: every thread's widest load, side by side."""
    return THREADS * LOAD_BYTES // dtype.itemsize


def _exp(scale: float, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """exp(scale * x), as the power of two that is one instruction where `exp` takes nine."""
    return jnp.exp2((scale * LOG2_E) * x)


def _real(width: Any, columns: Int[Array, "*S"], z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """The logits in float32, -inf in place of padding: here, since a mask of any number would narrow the loads."""
    z = z.astype(jnp.float32)
    return z if width is None else jnp.where(columns < width, z, -jnp.inf)


def _load(ref: Any, at: Int[Array, "*S"], mask: Bool[Array, "*S"] | None, fill: float) -> Array:
    """The elements there, `fill` where the mask is False."""
    return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else fill)


def _number(ref: Any) -> Any:
    """The row's number, or None where there is none."""
    return None if ref is None else ref[...]


def _of_each(width: Int[Array, ""] | None, positions: Sequence[int]) -> Int[Array, "*P"] | None:
    return None if width is None else jnp.broadcast_to(width, positions)


def _each_row(
    name: str,
    kernel: Callable[[Any, Any], None],
    axes: int,
    given: Any,
    made: Any,
    *,
    in_place: bool = False,
    interpret: bool,
) -> Any:
    """What `kernel` makes of each row of `given`, as arrays described by `made`; the first `axes` axes number rows.

    In place, it takes the memory of the first array given.
    """
    positions = jax.tree.leaves(made)[0].shape[:axes]
    kind = jax.sharding.ManualAxisType(varying=frozenset().union(*map(varying, jax.tree.leaves(given))))

    def flat(x: Any) -> tuple[int, ...]:
        return math.prod(positions), *x.shape[axes:]

    def row(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[axes:]), lambda n: (n, *(0 for _ in x.shape[axes:])))

    call = pl.pallas_call(
        kernel,
        out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(flat(x), x.dtype, manual_axis_type=kind), made),),
        grid=(math.prod(positions),),
        in_specs=(jax.tree.map(row, given),),
        out_specs=(jax.tree.map(row, made),),
        input_output_aliases={0: 0} if in_place else {},
        compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        interpret=interpret,
        name=name,
    )
    (rows,) = call(jax.tree.map(lambda x: x.reshape(flat(x)), given))
    return jax.tree.map(lambda x: x.reshape(*positions, *x.shape[1:]), rows)
