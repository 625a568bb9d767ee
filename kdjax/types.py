"""What travels between the layers: batches, sums with their counts, and the user's mistakes.

The shape legend, used in names (`logits_BxTxV`) and in annotations (`Float[Array, "B T V"]`):

    B batch            T query positions   S key positions    D model width
    N heads            G query groups      H head width       F MLP width
    V vocabulary       K teacher's top-k   L layers           M microbatches
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int


class UserError(ValueError):
    """A mistake in what the user gave: the message says which value, why it cannot work, and what would."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens with the teacher's cached top-k beside them, NumPy on the host or JAX on the devices.

    Position t of every field but `tokens` speaks of the *next* token: `labels[t]` is what the teacher's
    `topk_logits[t]` predict after reading `tokens[..t]`. There is no further shift anywhere.
    """

    tokens: Int[Any, "B T"]
    labels: Int[Any, "B T"]
    loss_mask: Float[Any, "B T"]  # weight of each position; 0 leaves it out
    topk_logits: Float[Any, "B T K"]  # -inf where the teacher has fewer than K entries
    topk_token_ids: Int[Any, "B T K"]
    log_sum_exp_logits: Float[Any, "B T"] | None = None  # over the teacher's whole vocabulary
    positions: Int[Any, "B T"] | None = None  # None: 0 .. T-1
    segment_ids: Int[Any, "B T"] | None = None  # None: one document a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumCount:
    """A mean on its way: summed over positions, microbatches and devices, and divided once, at the end."""

    sum: Any
    count: Any

    def __add__(self, other: "SumCount") -> "SumCount":
        return SumCount(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> Any:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / (self.count + (self.count == 0))
