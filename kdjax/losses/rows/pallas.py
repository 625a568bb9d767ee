"""`RowKernels` as one GPU kernel per direction, written in Pallas and lowered through Triton.

A program works on one row. Forward, it reads the row once, loads the taught logits from memory by their columns and
evaluates the divergence; backward, it reads the row once and writes its cotangent once, in place if nothing else needs
the logits. Logits are never compared with the teacher's ids block by block, which would take K comparisons a logit.

The sweep keeps a maximum and a sum for each of L lanes; a lane is a column of the [R, L] tile that the program reads
at a time. The R logits of a lane lie in the registers of one thread, so the loop needs no reduction across threads, no
shared memory and no barrier, and 1 + 1/R exponentials a logit; the lanes are joined after the loop. Whole tiles are
read without a mask, in 16-byte loads where rows are aligned to them (V a multiple of 8 for 2-byte logits, of 4 for
4-byte logits); the rest of the row is read with a mask. `docs/kernels.md` lists what this compiles to.

Letters in the kernels' shapes: R and L as above; E the K entries padded with absent ones to a power of two, because
Triton has no other sizes; J the entries that are compared with all E at a time.

XLA cannot partition a kernel: a program over several devices must call it within `jax.shard_map`, or every device
gathers the logits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, PyTree

from kdjax.losses.closed_form import Dense, Picked, PickedCotangents, differentiate, kd_term
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.platform import varying
from kdjax.losses.rows import Exponentials, Rows, Swept

THREADS = 256  # per program
LOAD_BYTES = 16  # the widest load of a thread
LOADS = 4  # R: a thread's loads at a time; more save exponentials but take 4, or for 16-bit logits 8, registers each
PAIRS = 4096  # J * E, unless E alone is more: 16 per thread
LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Implements `RowKernels`.

    `interpret` runs the kernels' arithmetic in plain JAX, on any platform; within `shard_map`, with check_vma=False
    only.
    """

    interpret: bool = False

    def sweep(
        self,
        objective: Objective,
        rows: Rows,
        *,
        log_sum: bool,
        supervision: Supervision | None = None,
        store: bool = False,
    ) -> Swept:
        """Implements `RowKernels.sweep`."""
        del store  # recomputed instead
        *positions, _ = rows.logits.shape
        inputs = _SweepInputs(*_with_n_valid_per_row(rows))
        if supervision is not None:
            inputs = _SweepInputs(*inputs[:3], *_teacher(objective, supervision))
        number = jax.ShapeDtypeStruct(tuple(positions), jnp.float32)
        blanks = objective.ghost and log_sum
        outputs = _SweepOutputs(
            without_entries=jax.ShapeDtypeStruct(rows.logits.shape, rows.logits.dtype) if blanks else None,
            topk=jax.ShapeDtypeStruct((*positions, rows.columns.shape[-1] - 1), jnp.float32),
            label=number,
            largest=number if log_sum else None,
            log_sum=number if log_sum else None,
            kd=None if supervision is None else number,
        )
        kernel = functools.partial(_sweep_kernel, objective, self.interpret)
        made = self._launch("kdjax_sweep", kernel, len(positions), inputs, outputs, in_place=blanks)
        if blanks:
            picked = Picked(made.topk, made.label, tail_max=made.largest, tail_log_sum=made.log_sum)
        else:
            picked = Picked(made.topk, made.label, made.largest, made.log_sum)
        return Swept(picked, made.kd, None, made.without_entries)

    def spread(
        self,
        objective: Objective,
        rows: Rows,
        picked: Picked,
        supervision: Supervision,
        kd_ct: Float[Array, "*P"],
        sft_ct: Float[Array, "*P"],
        *,
        dtype: jnp.dtype,
        exponentials: Exponentials | None = None,
    ) -> Float[Array, "*P W"]:
        """Implements `RowKernels.spread`, reading each row once and writing it once.

        Rows whose cotangents are 0 are written without being read. If `dtype` is the logits', the result takes their
        memory; XLA copies logits that are needed later.
        """
        assert exponentials is None
        *positions, _ = rows.logits.shape
        rows = _with_n_valid_per_row(rows)
        topk_logits, teacher_log_sum, topk_weights = _teacher(objective, supervision)
        inputs = _SpreadInputs(
            rows.logits,
            rows.columns,
            rows.n_valid,
            topk_logits,
            teacher_log_sum,
            topk_weights,
            *picked,
            kd_ct,
            sft_ct,
        )
        outputs = jax.ShapeDtypeStruct(rows.logits.shape, dtype)
        kernel = functools.partial(_spread_kernel, objective, self.interpret)
        in_place = rows.logits.dtype == dtype
        return self._launch("kdjax_spread", kernel, len(positions), inputs, outputs, in_place=in_place)

    def _launch(
        self,
        name: str,
        kernel: Callable[[Any, Any], None],
        axes: int,
        inputs: "_SweepInputs[Array] | _SpreadInputs[Array]",
        outputs: PyTree[jax.ShapeDtypeStruct],
        *,
        in_place: bool = False,
    ) -> PyTree[Array]:
        """Runs `kernel` once per row of the inputs and returns the outputs; the first `axes` axes number the rows.

        In place, the first output takes the memory of the first input, the logits.
        """
        assert inputs.logits.dtype.itemsize <= 4, inputs.logits.dtype  # the caller refuses float64
        positions = inputs.logits.shape[:axes]
        kind = jax.sharding.ManualAxisType(varying=frozenset().union(*map(varying, jax.tree.leaves(inputs))))

        def flat(x: Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
            return math.prod(positions), *x.shape[axes:]

        def row(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
            return pl.BlockSpec((None, *x.shape[axes:]), lambda n: (n, *(0 for _ in x.shape[axes:])))

        call = pl.pallas_call(
            kernel,
            out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(flat(x), x.dtype, manual_axis_type=kind), outputs),),
            grid=(math.prod(positions),),
            in_specs=(jax.tree.map(row, inputs),),
            out_specs=(jax.tree.map(row, outputs),),
            input_output_aliases={0: 0} if in_place else {},
            compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32, num_stages=1),
            interpret=self.interpret,
            name=name,
        )
        (made,) = call(jax.tree.map(lambda x: x.reshape(flat(x)), inputs))
        return jax.tree.map(lambda x: x.reshape(*positions, *x.shape[1:]), made)


# The kernels' arguments are of type T: `Array` for all rows outside a kernel, `Ref` for its own row inside, and
# `ShapeDtypeStruct` where outputs are described. "A number" is one per row.
T = TypeVar("T")


class _SweepInputs(NamedTuple, Generic[T]):
    logits: T  # W
    columns: T  # K+1
    n_valid: T | None  # a number
    topk_logits: T | None = None  # K
    teacher_log_sum: T | None = None  # a number
    topk_weights: T | None = None  # K


class _SweepOutputs(NamedTuple, Generic[T]):
    without_entries: T | None  # W, in the logits' memory
    topk: T  # K
    label: T  # a number, like the following
    largest: T | None
    log_sum: T | None
    kd: T | None


class _SpreadInputs(NamedTuple, Generic[T]):
    logits: T  # W
    columns: T  # K+1
    n_valid: T | None  # a number
    topk_logits: T  # K
    teacher_log_sum: T | None  # a number
    topk_weights: T | None  # K
    topk: T  # K, the student's
    label: T  # a number, like the following
    row_max: T | None
    log_sum: T | None
    tail_max: T | None
    tail_log_sum: T | None
    kd_ct: T
    sft_ct: T


def _sweep_kernel(
    objective: Objective, interpret: bool, inputs: _SweepInputs[Ref], outputs: _SweepOutputs[Ref]
) -> None:
    w, k = inputs.logits.shape[0], outputs.topk.shape[0]
    entries_E = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    columns_E = _load(inputs.columns, entries_E, entries_E < k, w)
    label_column = inputs.columns[k]
    picked = Picked(
        _load(inputs.logits, columns_E, columns_E < w, jnp.nan).astype(jnp.float32),
        _load(inputs.logits, label_column, label_column < w, jnp.nan).astype(jnp.float32),
    )
    plgpu.store(outputs.topk.at[entries_E], picked.topk, mask=entries_E < k)
    outputs.label[...] = picked.label
    logits = inputs.logits
    if outputs.without_entries is not None:
        logits = outputs.without_entries
        _barrier(interpret)  # all threads have loaded the entries
        plgpu.store(logits.at[columns_E], jnp.full_like(picked.topk, -jnp.inf, logits.dtype), mask=columns_E < w)
        _barrier(interpret)  # and read what others have written
    if outputs.largest is not None and outputs.log_sum is not None:
        row_max, log_sum = _log_sum(objective, logits, _number(inputs.n_valid))
        outputs.largest[...], outputs.log_sum[...] = row_max, log_sum
        picked = picked._replace(row_max=row_max, log_sum=log_sum)
    if outputs.kd is not None:
        outputs.kd[...] = kd_term(objective, picked, _supervision(inputs, entries_E, columns_E))


def _spread_kernel(objective: Objective, interpret: bool, inputs: _SpreadInputs[Ref], logits_ct: Ref) -> None:
    w, k = logits_ct.shape[0], inputs.topk.shape[0]
    entries_E = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    columns_E = _load(inputs.columns, entries_E, entries_E < k, w)
    topk_E = _load(inputs.topk, entries_E, entries_E < k, jnp.nan)
    log_sums = (inputs.row_max, inputs.log_sum, inputs.tail_max, inputs.tail_log_sum)
    picked = Picked(topk_E, inputs.label[...], *map(_number, log_sums))
    supervision = _supervision(inputs, entries_E, columns_E)
    cotangents = differentiate(objective, picked, supervision, inputs.kd_ct[...], inputs.sft_ct[...])
    _stream(objective.logits_scale, cotangents.elsewhere, inputs.logits, _number(inputs.n_valid), logits_ct)
    _barrier(interpret)  # what follows replaces what other threads have just written
    _overwrite(objective.logits_scale, inputs, columns_E, cotangents, logits_ct)


def _supervision(
    inputs: _SweepInputs[Ref] | _SpreadInputs[Ref], entries_E: Int[Array, "E"], columns_E: Int[Array, "E"]
) -> Supervision:
    """Returns the supervision of this row, with columns as ids; entries from K on are absent."""
    assert inputs.topk_logits is not None
    k = inputs.topk_logits.shape[0]
    topk_logits_E = _load(inputs.topk_logits, entries_E, entries_E < k, -jnp.inf)
    weights = inputs.topk_weights
    weights_E = None if weights is None else _load(weights, entries_E, entries_E < k, 0)
    return Supervision(topk_logits_E, columns_E, inputs.columns[k], _number(inputs.teacher_log_sum), weights_E)


def _teacher(objective: Objective, supervision: Supervision) -> tuple[Array, Array | None, Array | None]:
    """Returns what the objective reads of the teacher: logits, logsumexp and weights."""
    log_sum = supervision.log_sum_exp_logits if objective.needs_teacher_log_sum else None
    return supervision.topk_logits, log_sum, supervision.topk_weights


def _dense_at(scale: float, dense: Dense | None, z: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns what columns with the logits z receive through the logsumexps."""
    if dense is None:
        return jnp.zeros(z.shape, jnp.float32)
    return jnp.where(dense.factor == 0, 0, dense.factor * _exp(scale, z - dense.centre))


def _log_sum(
    objective: Objective, logits: Ref, n_valid: Int[Array, ""] | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the largest z of the row and log sum exp(scale (z - largest)), both -inf if no logit is finite."""
    scale = objective.logits_scale

    def step(columns_RxL: Array, mask: Array | None, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        largest_L, total_L = carry
        z_RxL = _without_padding(n_valid, columns_RxL, _load(logits, columns_RxL, mask, -jnp.inf))
        new_L = jnp.maximum(largest_L, z_RxL.max(axis=0))
        kept_L = total_L * _exp(scale, largest_L - new_L)
        return new_L, kept_L + _exp(scale, z_RxL - new_L).sum(axis=0)

    # The maxima start finite, so that a lane of -inf adds exp(-inf - LOWEST) = 0 to its sum and not a NaN.
    lanes = _lanes(logits.dtype)
    start = jnp.full((lanes,), LOWEST, jnp.float32), jnp.zeros((lanes,), jnp.float32)
    largest_L, total_L = _each_tile(logits, step, start)
    row_max = largest_L.max()
    total = (total_L * _exp(scale, largest_L - row_max)).sum()
    # A shard's row may be all padding; then neither number may set the scale of the other shards.
    return jnp.where(total == 0, -jnp.inf, row_max), jnp.log(total)


def _stream(scale: float, dense: Dense | None, logits: Ref, n_valid: Int[Array, ""] | None, logits_ct: Ref) -> None:
    """Writes the dense part of the row, or zeros without reading the logits if there is none."""

    def step(columns_RxL: Array, mask: Array | None, carry: tuple[()]) -> tuple[()]:
        dense_RxL = jnp.zeros(columns_RxL.shape, jnp.float32)
        if dense is not None:
            live = jnp.broadcast_to(dense.factor != 0, columns_RxL.shape)  # rows of zeros need not be read
            live = live if mask is None else live & mask
            z_RxL = _load(logits, columns_RxL, live, -jnp.inf)
            dense_RxL = _dense_at(scale, dense, _without_padding(n_valid, columns_RxL, z_RxL))
        plgpu.store(logits_ct.at[columns_RxL], dense_RxL.astype(logits_ct.dtype), mask=mask)
        return carry

    _each_tile(logits_ct, step, ())


def _overwrite(
    scale: float,
    inputs: _SpreadInputs[Ref],
    columns_E: Int[Array, "E"],
    cotangents: PickedCotangents,
    logits_ct: Ref,
) -> None:
    """Writes the taught columns: the dense part plus the cotangents of all entries and of the label at that column."""
    w, k, e = logits_ct.shape[0], inputs.topk.shape[0], columns_E.shape[0]
    label_column, dtype = inputs.columns[k], logits_ct.dtype
    j = min(e, max(1, PAIRS // e))

    def step(i: Array, carry: tuple[()]) -> tuple[()]:
        entries_J = i * j + jnp.arange(j, dtype=jnp.int32)
        columns_J = _load(inputs.columns, entries_J, entries_J < k, w)
        z_J = _load(inputs.topk, entries_J, entries_J < k, 0)
        same_JxE = columns_J[:, None] == columns_E[None, :]
        value_J = _dense_at(scale, cotangents.at_topk, z_J) + jnp.where(same_JxE, cotangents.topk[None, :], 0).sum(
            axis=1
        )
        value_J += jnp.where(columns_J == label_column, cotangents.label, 0)
        plgpu.store(logits_ct.at[columns_J], value_J.astype(dtype), mask=columns_J < w)
        return carry

    jax.lax.fori_loop(np.int32(0), np.int32(pl.cdiv(k, j)), step, ())
    alone = (label_column < w) & (jnp.where(columns_E == label_column, 1, 0).max() == 0)
    value = _dense_at(scale, cotangents.elsewhere, inputs.label[...]) + cotangents.label
    plgpu.store(logits_ct.at[label_column], value.astype(dtype), mask=alone)


_Carry = TypeVar("_Carry")


def _each_tile(
    row: Ref, step: Callable[[Int[Array, "R L"], Bool[Array, "R L"] | None, _Carry], _Carry], carry: _Carry
) -> _Carry:
    """Calls `step` with the columns of each tile, then with those of the rest of the row and a mask; passes a carry."""
    w, lanes = row.shape[0], _lanes(row.dtype)
    tile = LOADS * lanes
    columns_RxL = jax.lax.broadcasted_iota(jnp.int32, (LOADS, lanes), 0) * lanes
    columns_RxL += jax.lax.broadcasted_iota(jnp.int32, (LOADS, lanes), 1)
    whole = w // tile
    carry = jax.lax.fori_loop(
        np.int32(0), np.int32(whole), lambda i, carry: step(i * tile + columns_RxL, None, carry), carry
    )
    if w % tile:
        columns_RxL += whole * tile
        carry = step(columns_RxL, columns_RxL < w, carry)
    return carry


def _lanes(dtype: jnp.dtype) -> int:
    """Returns L, the logits that all threads load at a time, each with its widest load."""
    return THREADS * LOAD_BYTES // dtype.itemsize


def _exp(scale: float, x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns exp(scale * x), computed as a power of two: one instruction where `exp` takes nine."""
    return jnp.exp2((scale * LOG2_E) * x)


def _without_padding(n_valid: Int[Array, ""] | None, columns: Int[Array, "*S"], z: Float[Array, "*S"]) -> Array:
    """Returns the logits in float32, -inf in place of padding. Masking the load by a variable would narrow it."""
    z = z.astype(jnp.float32)
    return z if n_valid is None else jnp.where(columns < n_valid, z, -jnp.inf)


def _load(ref: Ref, at: Int[Array, "*S"], mask: Bool[Array, "*S"] | None, fill: float) -> Array:
    """Returns the elements at these places, `fill` where the mask is False."""
    return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else fill)


def _barrier(interpret: bool) -> None:
    """Makes the threads of a program wait for each other and see what they have written."""
    if not interpret:  # an interpreted program has one thread, and JAX has no rule to interpret a barrier
        plgpu.debug_barrier()


def _number(ref: Ref | None) -> Array | None:
    """Returns the number that the ref holds for this row, None for None."""
    return None if ref is None else ref[...]


def _with_n_valid_per_row(rows: Rows) -> Rows:
    return (
        rows if rows.n_valid is None else rows._replace(n_valid=jnp.broadcast_to(rows.n_valid, rows.logits.shape[:-1]))
    )
