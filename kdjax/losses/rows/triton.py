"""`RowKernels` as two Triton kernels, called through jax-triton.

One program works on one row (`triton_kernels.py`). `sweep` reads the row once, in tiles, with a running maximum and sum
in each lane, so that no tile waits for a reduction; the K + 1 taught logits are loaded from memory by their columns,
and the same program evaluates the divergence. `spread` streams the softmax part and then overwrites the taught columns
with values that are summed in float32 before they are rounded. Together they make three passes over [N, V]: a read
forward, a read and a write backward.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.losses.closed_form import Picked
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.platform import varying
from kdjax.losses.rows import Exponentials, Rows, Swept
from kdjax.types import UserError

try:
    import jax_triton

    from kdjax.losses.rows import triton_kernels
except ImportError as error:
    raise UserError(
        f"implementation = 'triton' cannot be imported ({error}): it needs jax with its CUDA plugin (kdjax[cuda12],"
        " or kdjax[aot] to compile without a GPU) and versions of jax-triton and triton that work together"
        " (kdjax[triton]); install these or choose 'pallas'"
    ) from error

WARPS = 8
READ_BYTES = 32 * WARPS * 16  # that all threads read at a time, in their widest loads of 16 bytes
READS = 4  # per thread, before the sweep adds them to its lanes' maxima and sums
BLOCK = 4096  # logits in a block of the spread: 16 per thread
PAIRS = 4096  # of columns, compared at a time to find equal ones: 16 per thread

# Compute capabilities of GPUs that programs are compiled for on a machine without one, by a part of their names.
COMPUTE_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}


def sweep(
    objective: Objective, rows: Rows, *, log_sum: bool, supervision: Supervision | None = None, store: bool = False
) -> Swept:
    """Implements `RowKernels.sweep`."""
    del store  # recomputed instead
    *positions, w = rows.logits.shape
    number = jax.ShapeDtypeStruct(tuple(positions), jnp.float32)
    blanks = objective.ghost and log_sum
    topk, label, largest, row_log_sum, kd, without_entries = _launch(
        triton_kernels.sweep,
        rows,
        _teacher(objective, supervision),
        [
            jax.ShapeDtypeStruct((*positions, rows.columns.shape[-1] - 1), jnp.float32),
            *[number] * 4,
            jax.ShapeDtypeStruct(rows.logits.shape, rows.logits.dtype) if blanks else number,
        ],
        input_output_aliases={0: 5} if blanks else {},
        OBJECTIVE=_static(objective),
        R=READS,
        L=min(READ_BYTES // rows.logits.dtype.itemsize, _power_of_two(w)),
        LOG_SUM=log_sum,
        TAUGHT=supervision is not None,
    )
    if blanks:
        return Swept(Picked(topk, label, tail_max=largest, tail_log_sum=row_log_sum), None, None, without_entries)
    picked = Picked(topk, label, largest, row_log_sum) if log_sum else Picked(topk, label)
    return Swept(picked, None if supervision is None else kd, None)


def spread(
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
    """Implements `RowKernels.spread`.

    The result takes the logits' memory if the dtypes agree; XLA copies logits that are needed later. Rows whose
    cotangents are 0 are written without being read.
    """
    assert exponentials is None
    logits, entries = rows.logits, _power_of_two(rows.columns.shape[-1])
    (logits_ct,) = _launch(
        triton_kernels.spread,
        rows,
        (*_teacher(objective, supervision), *picked, kd_ct, sft_ct),
        [jax.ShapeDtypeStruct(logits.shape, dtype)],
        input_output_aliases={0: 0} if logits.dtype == dtype else {},
        OBJECTIVE=_static(objective),
        J=min(entries, max(1, PAIRS // entries)),
        BLOCK=min(BLOCK, _power_of_two(logits.shape[-1])),
    )
    return logits_ct


def _static(objective: Objective) -> Objective:
    """Returns the objective that the kernels are compiled for: its weights only say whether there is an SFT term."""
    return dataclasses.replace(
        objective,
        kd_loss_weight=1.0,
        sft_loss_weight=float(objective.sft_loss_weight != 0),
        logits_scale=float(objective.logits_scale),  # Triton's language does not know NumPy's numbers
        target_logits_scale=float(objective.target_logits_scale),
        jsd_beta=float(objective.jsd_beta),
    )


def _teacher(objective: Objective, supervision: Supervision | None) -> tuple[Array | None, ...]:
    """Returns what the kernels read of the supervision: the teacher's logits, its logsumexp, and the weights."""
    if supervision is None:
        return None, None, None
    log_sum = supervision.log_sum_exp_logits if objective.needs_teacher_log_sum else None
    return supervision.topk_logits, log_sum, supervision.topk_weights


def _launch(
    kernel: Any,
    rows: Rows,
    others: tuple[Array | None, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    input_output_aliases: Mapping[int, int],
    **settings: Any,
) -> list[Array]:
    """Runs the kernel on every row and the other inputs [*P, ...]; an axis that `jax.vmap` adds becomes more rows."""
    logits, columns, n_valid = rows
    positions, v, k = logits.shape[:-1], logits.shape[-1], columns.shape[-1] - 1
    assert logits.dtype.itemsize <= 4, logits.dtype  # the caller refuses float64
    name = f"kdjax_{kernel.__name__}"
    n_valid_P = None if n_valid is None else jnp.broadcast_to(n_valid.astype(jnp.int32), positions)
    settings |= {"V": v, "K": k, "E": _power_of_two(k + 1), "PADDED": n_valid is not None}

    @jax.custom_batching.custom_vmap
    def call(*inputs: Array) -> list[Array]:
        n = inputs[0].shape[0]
        shapes = [jax.ShapeDtypeStruct((n, *out.shape[len(positions) :]), out.dtype) for out in outputs]
        with jax.named_scope(name):
            made = jax_triton.triton_call(
                *inputs,
                kernel=kernel,
                out_shape=shapes,
                grid=(n,),
                name=name,
                num_warps=WARPS,
                compute_capability=_compute_capability(),
                input_output_aliases=input_output_aliases,
                **settings,
            )
        return _varying_like(made, inputs)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *inputs: Array) -> tuple[list[Array], list[bool]]:
        inputs = tuple(
            x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip(inputs, batched, strict=True)
        )
        made = call(*(x.reshape(-1, *x.shape[2:]) for x in inputs))
        return [x.reshape(axis_size, -1, *x.shape[1:]) for x in made], [True] * len(made)

    # The columns take the place of inputs that these settings do not read.
    arrays = [columns if x is None else _narrow(x) for x in (logits, columns, n_valid_P, *others)]
    made = call(*(x.reshape(-1, *x.shape[len(positions) :]) for x in arrays))
    return [x.reshape(out.shape) for x, out in zip(made, outputs, strict=True)]


def _varying_like(made: Sequence[Array], inputs: Sequence[Array]) -> list[Array]:
    """Returns the arrays `made`, typed as varying over the mesh axes of the inputs; jax-triton drops these types."""
    axes = frozenset[str]().union(*map(varying, inputs))
    return [jax.lax.pcast(x, tuple(sorted(axes)), to="varying") for x in made]


def _narrow(x: Array) -> Array:
    """Returns float64 arrays as float32, in which the kernels compute, and others as they are."""
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


def _power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _compute_capability() -> int:
    """Returns that of the GPUs of the mesh in context, else of this machine, else of an H100."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        for name, capability in COMPUTE_CAPABILITIES.items():
            if name in device.device_kind:
                return capability
    if jax.default_backend() == "gpu":
        return int(jax.local_devices()[0].compute_capability.replace(".", ""))
    return COMPUTE_CAPABILITIES["H100"]
