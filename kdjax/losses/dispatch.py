"""Who computes a loss: what there is, what can run here, and what is chosen when the caller leaves it open."""

import dataclasses
import functools
import logging
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from kdjax.losses.objective import Objective
from kdjax.losses.platform import on_one_device, platform
from kdjax.losses.rows import xla
from kdjax.losses.vocabulary import Vocabulary
from kdjax.types import UserError

log = logging.getLogger("kdjax")

# Of each operation; "pallas_interpret" runs the Pallas kernels' arithmetic anywhere, slowly, to check it.
LOGITS = ("reference", "xla", "pallas", "triton", "pallas_interpret")
LINEAR = (*LOGITS, "gathered")
KERNELS = ("pallas", "triton", "pallas_interpret")

# The share of the vocabulary's rows below which gathering K of them is cheaper than multiplying by all. On two
# cores, N = 1024, K / V = 1/16 took 0.33 of the dense time at D = 128 and 0.80 at D = 1024, 1/64 took 0.33 at either.
# An H100 moves about 18 K D bytes a token for the rows, at 3.35 TB/s, against 6 V D operations, at 790 TFLOP/s:
# equal at 1/700 (arithmetic, not measured).
GATHER_BELOW = {"cpu": 1 / 16}
GATHER_BELOW_ELSEWHERE = 1 / 700


@dataclasses.dataclass(frozen=True)
class Call:
    """All that is static in one call of a loss. Hashable."""

    objective: Objective
    vocabulary: Vocabulary
    implementation: str


class Rows(NamedTuple):
    """An implementation of `xla.sweep` and `xla.spread`."""

    sweep: Any
    spread: Any


def rows(implementation: str) -> Rows:
    """The implementation of that name; kernels are imported when first asked for."""
    if implementation == "xla":
        return Rows(xla.sweep, xla.spread)
    module = _kernels(implementation)
    if implementation == "pallas_interpret":
        return Rows(functools.partial(module.sweep, interpret=True), functools.partial(module.spread, interpret=True))
    return Rows(module.sweep, module.spread)


def _kernels(implementation: str) -> ModuleType:
    if implementation == "triton":
        from kdjax.losses.rows import triton

        return triton
    from kdjax.losses.rows import pallas

    return pallas


def choose_logits(implementation: str | None, objective: Objective, dtype: jnp.dtype) -> str:
    """The implementation for logits of `dtype`: the one asked for, if it can run here, or the fastest that can.

    Raises UserError for one that there is not or that cannot run.
    """
    if implementation is not None:
        return _checked(implementation, LOGITS, "topk_kd_loss", dtype)
    return _logged("topk_kd_loss", _row_implementation(dtype) if objective.needs_log_sum else "xla")


def choose_linear(implementation: str | None, objective: Objective, k: int, v: int, dtype: jnp.dtype) -> str:
    """The implementation for hidden states and an unembedding whose logits are of `dtype`; as `choose_logits`.

    `v` counts the rows of the unembedding on this shard.
    """
    if implementation == "gathered":
        if (why := not_gathered(objective)) is not None:
            raise UserError(f"implementation = 'gathered' reads K rows of the unembedding only, and {why}")
        return "gathered"
    if implementation is not None:
        return _checked(implementation, LINEAR, "linear_topk_kd_loss", dtype)
    if not_gathered(objective) is None and k / v <= GATHER_BELOW.get(platform(), GATHER_BELOW_ELSEWHERE):
        return _logged("linear_topk_kd_loss", "gathered")
    return _logged("linear_topk_kd_loss", _row_implementation(dtype))


def not_gathered(objective: Objective) -> str | None:
    """Why this objective depends on more than the K taught logits; None if it does not."""
    if objective.sft_loss_weight != 0:
        return f"sft_loss_weight = {objective.sft_loss_weight!r} asks for all; choose 'xla' or set it to 0"
    if objective.ghost:
        return "tail = 'ghost' asks for all; choose 'xla' or tail = 'renormalize'"
    if objective.rank_match:
        return "cross_tokenizer = 'rank_match' ranks all; choose 'xla'"
    return None


def _row_implementation(dtype: jnp.dtype) -> str:
    """Pallas on CUDA, whose kernel reads the logits once where XLA reads them twice; XLA elsewhere.

    XLA cannot split a kernel over devices: under plain `jit` it would gather the logits that are split over some.
    """
    return "pallas" if platform() == "cuda" and on_one_device() and dtype != jnp.float64 else "xla"


def _checked(implementation: str, there_are: tuple[str, ...], operation: str, dtype: jnp.dtype) -> str:
    if implementation not in there_are:
        raise UserError(
            f"implementation = {implementation!r} is not available; choose one of"
            f" {', '.join(map(repr, there_are))}, or None to let {operation} choose"
        )
    if implementation in KERNELS and dtype == jnp.float64:
        raise UserError(f"implementation = {implementation!r} computes in float32; for float64 choose 'xla'")
    if implementation in ("pallas", "triton") and platform() != "cuda":
        raise UserError(
            f"implementation = {implementation!r} is a kernel for NVIDIA GPUs and this is {platform()};"
            " choose 'xla' or None"
        )
    return implementation


@functools.cache
def _log_choice(operation: str, chosen: str) -> None:
    log.info("%s: implementation %r chosen", operation, chosen)


def _logged(operation: str, chosen: str) -> str:
    _log_choice(operation, chosen)
    return chosen
