"""The forward and backward passes over rows of student logits: `RowKernels`, implemented by XLA, Pallas and Triton."""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kdjax.losses.closed_form import Picked
from kdjax.losses.objective import Objective, Supervision


class Rows(NamedTuple):
    """Logits, one row per position, and the columns that the position is taught."""

    logits: Float[Array, "*P W"]
    columns: Int[Array, "*P K+1"]  # of the teacher's entries, then of the label; W: there is no such column here
    n_valid: Int[Array, ""] | None = None  # columns from this one on are padding; None: there is no padding


class Exponentials(NamedTuple):
    """The exponentials that a sweep computed, for the spread that follows it."""

    values: Float[Array, "*P W"]  # exp(logits_scale (z - largest)); for a ghost objective 0 at the entries
    largest: Float[
        Array, "*P"
    ]  # of the columns summed, which may be those of one shard of the vocabulary; -inf if none


class Swept(NamedTuple):
    """The result of `RowKernels.sweep`."""

    picked: Picked
    kd: Float[Array, "*P"] | None  # None if the kernel does not evaluate it
    exponentials: Exponentials | None  # None if the kernel computes them again
    # The logits, if the kernel has written -inf over those of the entries, to sum the tail of a ghost objective without
    # them; `spread` takes these in place of the logits, whose memory they have.
    without_entries: Float[Array, "*P W"] | None = None


class RowKernels(Protocol):
    """The two passes over rows of logits. `xla`, `pallas.Kernels` and `triton` implement them."""

    def sweep(
        self,
        objective: Objective,
        rows: Rows,
        *,
        log_sum: bool,
        supervision: Supervision | None = None,
        store: bool = False,
    ) -> Swept:
        """Returns what the objective needs of each row: the logits at the taught columns, NaN for W, and the log-sum.

        Args:
          log_sum: whether to compute `row_max` and `log_sum`, for which the whole row is read; for a ghost objective,
            `tail_max` and `tail_log_sum` over the columns without an entry. They are -inf if no logit there is finite,
            as in a shard that is all padding.
          supervision: what a GPU kernel evaluates the kd term from while it has the row. None leaves the term to the
            caller, who must first join the shards of the vocabulary. `xla` always leaves it to the caller, and so does
            every kernel for a ghost objective.
          store: a hint that `spread` follows at once, so that keeping the exponentials may pay. Only `xla` keeps them;
            a GPU computes them again faster than it reads them.
        """

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
        """Returns the cotangent of the logits in `dtype`, from those of the kd and the sft term.

        `picked` is what `vocabulary.join` returned; `exponentials` is what the sweep returned.
        """
