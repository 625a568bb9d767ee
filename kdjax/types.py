"""Batches, sums with their counts, and the error for a user's mistake: the types that every layer shares.

The shape legend, used in names (`logits_BxTxV`) and in annotations (`Float[Array, "B T V"]`):

    B batch            T query positions   S key positions    D model width
    N heads            G query groups      H head width       F MLP width
    V vocabulary       K teacher's top-k   L layers           M microbatches
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int

MIB, GIB = 2**20, 2**30  # bytes


class UserError(ValueError):
    """A mistake in the user's input. The message names the value, says why it cannot work, and what would."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens with the teacher's cached top-k, as NumPy arrays on the host or JAX arrays on devices.

    At position t every field except `tokens` describes the *next* token: the teacher read `tokens[..t]`, its
    `topk_logits[t]` predict `labels[t]`. Nothing is shifted again anywhere.
    """

    tokens: Int[Any, "B T"]
    labels: Int[Any, "B T"]
    loss_mask: Float[Any, "B T"]  # weight of each position; 0 excludes it
    topk_logits: Float[Any, "B T K"]  # -inf where the teacher has fewer than K entries
    topk_token_ids: Int[Any, "B T K"]
    log_sum_exp_logits: Float[Any, "B T"] | None = None  # over the teacher's whole vocabulary
    positions: Int[Any, "B T"] | None = None  # None: 0 .. T-1
    segment_ids: Int[Any, "B T"] | None = None  # None: each row is one document
    topk_weights: Float[Any, "B T K"] | None = None  # sampled targets: the share that an entry carries, 0 where absent
    teacher_hidden: Float[Any, "B T E"] | None = None  # of a teacher on the mesh, which the step adds on the devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumCount:
    """A mean before its division: sum and count are added up over positions, microbatches and devices first."""

    sum: Any
    count: Any

    def __add__(self, other: "SumCount") -> "SumCount":
        return SumCount(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> Any:
        """sum / count; 0 where the count is 0."""
        return self.sum / (self.count + (self.count == 0))
