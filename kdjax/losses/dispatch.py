"""The choice of an implementation: which there are, which of them can run here, and the default."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import jax.numpy as jnp

from kdjax.losses.objective import Objective
from kdjax.losses.platform import on_one_device, platform
from kdjax.losses.rows import RowKernels, xla
from kdjax.losses.vocabulary import Vocabulary
from kdjax.types import UserError

log = logging.getLogger("kdjax")

# The implementations of `topk_kd_loss` and those of `linear_topk_kd_loss`.
LOGITS_IMPLEMENTATIONS = ("reference", "xla", "pallas", "triton", "pallas_interpret")
IMPLEMENTATIONS = (*LOGITS_IMPLEMENTATIONS, "gathered")
TEACHER_IMPLEMENTATIONS = (None, "reference", "xla")  # those of `teacher_losses`; None is "xla"
KERNELS = ("pallas", "triton", "pallas_interpret")

# The share K / V of the vocabulary below which gathering K rows is cheaper than multiplying by all. On two cores,
# N = 1024, K / V = 1/16 took 0.33 of the dense time at D = 128 and 0.80 at D = 1024; 1/64 took 0.33 at either. An H100
# moves about 18 K D bytes per token for the rows, at 3.35 TB/s, against 6 V D operations, at 790 TFLOP/s: equal at
# 1/700 (arithmetic, not measured).
GATHER_BELOW = {"cpu": 1 / 16}
GATHER_BELOW_ELSEWHERE = 1 / 700


@dataclasses.dataclass(frozen=True)
class LossCall:
    """Everything static in one call of a loss. Hashable."""

    objective: Objective
    vocabulary: Vocabulary
    implementation: str

    @property
    def kd_in_sweep(self) -> bool:
        """Whether a row of logits holds all that its kd depends on.

        It does not on a shard of the vocabulary, nor for a ghost tail, which sums over a row what `join` adds up.
        """
        return not self.vocabulary.axis_names and not self.objective.ghost

    @property
    def kernels(self) -> RowKernels:
        """The passes over rows of logits; the GPU kernels are imported when first asked for."""
        if self.implementation == "xla":
            return xla
        if self.implementation == "triton":
            from kdjax.losses.rows import triton

            return triton
        from kdjax.losses.rows import pallas

        return pallas.Kernels(interpret=self.implementation == "pallas_interpret")


def choose_logits(implementation: str | None, objective: Objective, dtype: jnp.dtype) -> str:
    """Returns the implementation for logits of `dtype`: the one asked for, or for None the fastest that can run here.

    Raises UserError if the one asked for does not exist or cannot run here.
    """
    if implementation is not None:
        check_implementation(implementation, objective, LOGITS_IMPLEMENTATIONS)
        _check_runs_here(implementation, dtype)
        return implementation
    return _logged("topk_kd_loss", _row_implementation(dtype) if objective.needs_log_sum else "xla")


def choose_linear(implementation: str | None, objective: Objective, k: int, v: int, dtype: jnp.dtype) -> str:
    """Returns the implementation for hidden states and an unembedding whose logits have `dtype`; see `choose_logits`.

    `v` is the number of rows of the unembedding on this shard.
    """
    if implementation is not None:
        check_implementation(implementation, objective)
        _check_runs_here(implementation, dtype)
        return implementation
    few = k / v <= GATHER_BELOW.get(platform(), GATHER_BELOW_ELSEWHERE)
    if few and _why_not_gathered(objective) is None:
        return _logged("linear_topk_kd_loss", "gathered")
    return _logged("linear_topk_kd_loss", _row_implementation(dtype))


def check_implementation(
    implementation: str, objective: Objective, choices: Sequence[str] = IMPLEMENTATIONS, prefix: str = ""
) -> None:
    """Raises UserError unless `implementation` is one of `choices` and can compute this objective on some platform.

    `prefix` is put before the names of settings in the message: "loss." for the keys of a configuration.
    """
    if implementation not in choices:
        raise UserError(
            f"{prefix}implementation = {implementation!r} is not available; choose one of"
            f" {', '.join(map(repr, choices))}, or None for the fastest that can run"
        )
    if implementation == "gathered" and (why := _why_not_gathered(objective, prefix)) is not None:
        raise UserError(
            f"{prefix}implementation = 'gathered' computes the K taught logits only, but {why} needs all of them;"
            f" change that or set {prefix}implementation = None"
        )


def _why_not_gathered(objective: Objective, prefix: str = "") -> str | None:
    """Returns the setting that makes the loss depend on more than the K taught logits, or None if none does."""
    if objective.sft_loss_weight != 0:
        return f"{prefix}sft_loss_weight = {objective.sft_loss_weight!r}"
    if objective.ghost or objective.label_tail:
        return f"{prefix}tail = {objective.tail!r}"
    if objective.sampled:
        return f"{prefix}targets = 'sampled'"
    if objective.rank_match:
        return f"{prefix}cross_tokenizer = 'rank_match'"
    return None


def _row_implementation(dtype: jnp.dtype) -> str:
    """Returns "pallas" on CUDA, where its kernel reads the logits once and XLA reads them twice; "xla" elsewhere.

    XLA cannot split a kernel over devices: under plain `jit` it would gather sharded logits on every device.
    """
    return "pallas" if platform() == "cuda" and on_one_device() and dtype != jnp.float64 else "xla"


def _check_runs_here(implementation: str, dtype: jnp.dtype) -> None:
    """Raises UserError unless the implementation can run on this platform in `dtype`."""
    if implementation in KERNELS and dtype == jnp.float64:
        raise UserError(f"implementation = {implementation!r} computes in float32; for float64 choose 'xla'")
    if implementation in ("pallas", "triton") and platform() != "cuda":
        raise UserError(
            f"implementation = {implementation!r} is a kernel for NVIDIA GPUs and this is {platform()};"
            " choose 'xla' or None"
        )


@functools.cache
def _log_choice(operation: str, chosen: str) -> None:
    log.info("%s: implementation %r chosen", operation, chosen)


def _logged(operation: str, chosen: str) -> str:
    _log_choice(operation, chosen)
    return chosen
