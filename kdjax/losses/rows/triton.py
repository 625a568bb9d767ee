"""Rows of logits on a GPU, by Triton kernels called through jax-triton: the two functions of `xla.py`.

One program a row (`triton_kernels.py`). `sweep` reads the row once, in blocks of a power of two, with a running
maximum and sum in every lane, so that no block waits for a reduction; the K + 1 taught logits are gathered from
memory by their columns, and the divergence is evaluated in the same program. `spread` streams the softmax part
and then overwrites the taught columns with values summed in float32 before they are rounded. Together three
passes over [N, V]: read; read and write.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Picked
from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.platform import varying
from kdjax.types import UserError

try:
    import jax_triton

    from kdjax.losses.rows import triton_kernels
except ImportError as error:
    raise UserError(
        f"implementation = 'triton' cannot be imported ({error}): it needs jax with its CUDA plugin (kdjax[cuda12],"
        " or kdjax[aot] to compile without a GPU) and kdjax[triton], whose versions fit together; or choose 'pallas'"
    ) from error

WARPS = 8
READ_BYTES = 32 * WARPS * 16  # by all threads at a time, 16 each, which is the widest load there is
READS = 4  # of a thread before the sweep joins them to its lanes' maxima and sums
BLOCK = 4096  # logits of a block of the spread, 16 a thread
PAIRS = 4096  # of columns, compared at a time to find equal ones: 16 a thread

# Of GPUs that a program is compiled for on a machine without them, by what their names contain.
COMPUTE_CAPABILITIES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}


def sweep(
    objective: Objective,
    logits: Float[Array, "*P V"],
    columns: Int[Array, "*P K+1"],
    *,
    log_sum: bool,
    width: Int[Array, ""] | None = None,
    supervision: Supervision | None = None,
    store: bool = False,
) -> tuple[Picked, Float[Array, "*P"] | None, None]:
    """What the objective needs of each row, reading it once, and the divergence where `supervision` is given.

    As `xla.sweep`, except that there is nothing to `store`: `spread` had better compute the exponentials again
    than read them. A row without a finite logit has the maximum and the log-sum -inf.
    """
    positions, k = logits.shape[:-1], columns.shape[-1] - 1
    row = jax.ShapeDtypeStruct(positions, jnp.float32)
    topk, label, row_max, row_log_sum, kd = _launch(
        triton_kernels.sweep,
        (logits, columns, width, *_teaching(objective, supervision)),
        [jax.ShapeDtypeStruct((*positions, k), jnp.float32), row, row, row, row],
        input_output_aliases={},
        OBJECTIVE=_static(objective),
        R=READS,
        L=min(READ_BYTES // logits.dtype.itemsize, _power_of_two(logits.shape[-1])),
        LOG_SUM=log_sum,
        TAUGHT=supervision is not None,
    )
    picked = Picked(topk, label, row_max, row_log_sum) if log_sum else Picked(topk, label)
    return picked, None if supervision is None else kd, None


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
) -> Float[Array, "*P V"]:
    """The logits' cotangent in `dtype`, as `xla.spread`.

    It takes the logits' buffer where the dtypes agree; if they are still needed, XLA copies them first. Rows
    whose cotangent is 0 are not read.
    """
    entries = _power_of_two(columns.shape[-1])
    (logits_ct,) = _launch(
        triton_kernels.spread,
        (logits, columns, width, *_teaching(objective, supervision), *picked, kd_ct, sft_ct),
        [jax.ShapeDtypeStruct(logits.shape, dtype)],
        input_output_aliases={0: 0} if logits.dtype == dtype else {},
        OBJECTIVE=_static(objective),
        J=min(entries, max(1, PAIRS // entries)),
        BLOCK=min(BLOCK, _power_of_two(logits.shape[-1])),
    )
    return logits_ct


def _static(objective: Objective) -> Objective:
    """The objective as the kernels are compiled for it: of the weights they know whether there is an SFT term."""
    return dataclasses.replace(
        objective,
        kd_loss_weight=1.0,
        sft_loss_weight=float(objective.sft_loss_weight != 0),
        logits_scale=float(objective.logits_scale),  # may be NumPy's, which Triton's language does not know
        target_logits_scale=float(objective.target_logits_scale),
        jsd_beta=float(objective.jsd_beta),
    )


def _teaching(objective: Objective, supervision: Supervision | None) -> tuple[Array | None, Array | None]:
    """What the kernels read of the supervision: the teacher's logits and, beside a ghost's tail, its logsumexp."""
    if supervision is None:
        return None, None
    return supervision.topk_logits, supervision.log_sum_exp_logits if objective.ghost else None


def _launch(
    kernel: Any,
    inputs: tuple[Array | None, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    input_output_aliases: Mapping[int, int],
    **settings: Any,
) -> list[Array]:
    """The kernel on every row of its inputs: logits [*P, V], columns [*P, K + 1], the width, and more [*P, ...].

    An axis that `jax.vmap` adds becomes more rows.
    """
    logits, columns, width, *more = inputs
    assert logits is not None
    assert columns is not None
    positions, v, k = logits.shape[:-1], logits.shape[-1], columns.shape[-1] - 1
    assert logits.dtype.itemsize <= 4, logits.dtype  # the caller refuses float64
    name = f"kdjax_{kernel.__name__}"
    width_P = None if width is None else jnp.broadcast_to(width.astype(jnp.int32), positions)
    settings |= {"V": v, "K": k, "E": _power_of_two(k + 1), "PADDED": width is not None}

    @jax.custom_batching.custom_vmap
    def call(*rows: Array) -> list[Array]:
        n = rows[0].shape[0]
        shapes = [jax.ShapeDtypeStruct((n, *out.shape[len(positions) :]), out.dtype) for out in outputs]
        with jax.named_scope(name):
            made = jax_triton.triton_call(
                *rows,
                kernel=kernel,
                out_shape=shapes,
                grid=(n,),
                name=name,
                num_warps=WARPS,
                compute_capability=_compute_capability(),
                input_output_aliases=input_output_aliases,
                **settings,
            )
        return _varying_like(made, rows)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *rows: Array) -> tuple[list[Array], list[bool]]:
        rows = tuple(x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip(rows, batched, strict=True))
        made = call(*(x.reshape(-1, *x.shape[2:]) for x in rows))
        return [x.reshape(axis_size, -1, *x.shape[1:]) for x in made], [True] * len(made)

    # An input that these settings leave unread is stood in for by the columns.
    arrays = [columns if x is None else _narrow(x) for x in (logits, columns, width_P, *more)]
    made = call(*(x.reshape(-1, *x.shape[len(positions) :]) for x in arrays))
    return [x.reshape(out.shape) for x, out in zip(made, outputs, strict=True)]


def _varying_like(made: Sequence[Array], rows: Sequence[Array]) -> list[Array]:
    """What was `made`, of the type that `jax.shard_map` gives to what depends on `rows`; jax-triton forgets it."""
    axes = frozenset[str]().union(*map(varying, rows))
    return [jax.lax.pcast(x, tuple(sorted(axes)), to="varying") for x in made]


def _narrow(x: Array) -> Array:
    """The kernels compute in float32 and read no float64."""
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


def _power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def _compute_capability() -> int:
    """Of the GPUs of the mesh in context, else of this machine's, else of an H100."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        for name, capability in COMPUTE_CAPABILITIES.items():
            if name in device.device_kind:
                return capability
    if jax.default_backend() == "gpu":
        return int(jax.local_devices()[0].compute_capability.replace(".", ""))
    return COMPUTE_CAPABILITIES["H100"]
