"""What goes into a loss and comes out: static settings, the arrays beside the student's, and the sums."""

import dataclasses
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from kdjax.types import UserError

KD_LOSSES = ("fwd_kl", "bwd_kl", "jsd")
TAILS = ("renormalize", "ghost")
CROSS_TOKENIZERS = (None, False, True, "rank_match")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static settings of a loss, named as its keywords are. Hashable: it can be a static argument."""

    kd_loss: str = "fwd_kl"
    kd_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    logits_scale: float = 1.0
    target_logits_scale: float = 1.0
    cross_tokenizer: str | bool | None = None
    tail: str = "renormalize"
    jsd_beta: float = 0.5

    @property
    def rank_match(self) -> bool:
        """Whether the student's own K largest logits meet the teacher's by rank."""
        return bool(self.cross_tokenizer)

    @property
    def ghost(self) -> bool:
        """Whether the mass outside the top-k is one more bucket."""
        return self.tail == "ghost"

    @property
    def needs_log_sum(self) -> bool:
        """Whether the loss depends on the student's whole vocabulary, not on the picked logits alone."""
        return self.sft_loss_weight != 0 or self.ghost

    def check(self) -> None:
        """Raise UserError for the first setting that cannot work: its value, the reason, the remedy."""
        _check_choice("kd_loss", self.kd_loss, KD_LOSSES)
        _check_choice("tail", self.tail, TAILS)
        _check_choice("cross_tokenizer", self.cross_tokenizer, CROSS_TOKENIZERS)
        for name in ("kd_loss_weight", "sft_loss_weight", "logits_scale", "target_logits_scale", "jsd_beta"):
            _check_number(name, getattr(self, name))
        for name in ("kd_loss_weight", "sft_loss_weight"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} would train away from its term;"
                    " give 0 (leave the term out) or more"
                )
        if self.kd_loss_weight == 0 and self.sft_loss_weight == 0:
            raise UserError(
                "kd_loss_weight = 0 and sft_loss_weight = 0 leave no loss; give at least one a positive value"
            )
        for name in ("logits_scale", "target_logits_scale"):
            if getattr(self, name) <= 0:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} would flatten or invert the logits;"
                    " give a value above 0 (1 / temperature)"
                )
        if not 0 < self.jsd_beta < 1:
            raise UserError(
                f"jsd_beta = {self.jsd_beta!r} is no mixture of teacher and student;"
                " give a value between 0 and 1, both excluded"
            )
        if self.ghost and self.target_logits_scale != 1:
            raise UserError(
                f"target_logits_scale = {self.target_logits_scale!r} with tail = 'ghost': the stored logsumexp"
                " belongs to the unscaled logits; give target_logits_scale = 1 or tail = 'renormalize'"
            )


class Supervision(NamedTuple):
    """What each position is taught. An entry of -inf is absent and its id ignored."""

    topk_logits: Float[Array, "*P K"]
    topk_token_ids: Int[Array, "*P K"]
    labels: Int[Array, "*P"]
    log_sum_exp_logits: Float[Array, "*P"] | None = None  # of the teacher, over its whole vocabulary


class LossSums(NamedTuple):
    """Sums over positions, each weighted by `loss_mask`; divide by `tokens` for means in nats per token.

    Only `loss` carries a gradient. The last two describe how far the student follows the teacher's ids, which
    rank matching ignores: there `top1_agreement` is 0, and the mass is that of the student's own K largest.
    """

    loss: Float[Array, ""]  # kd_loss_weight * kd + sft_loss_weight * sft
    kd_loss: Float[Array, ""]  # unweighted
    sft_loss: Float[Array, ""]  # unweighted; 0 when sft_loss_weight = 0
    tokens: Float[Array, ""]  # the mask's sum
    # Positions where no student logit exceeds that of the teacher's first id, and the probability, at
    # logits_scale, that the student gives the K ids; None on the gathered path, which never sees the other logits.
    top1_agreement: Float[Array, ""] | None
    student_topk_mass: Float[Array, ""] | None


def supervise(
    objective: Objective,
    topk_logits: Array,
    topk_token_ids: Array,
    labels: Array,
    log_sum_exp_logits: Array | None,
) -> Supervision:
    """The arrays on JAX, ids at least 32 bits wide; for rank matching the teacher's values, largest first."""
    topk_logits = jnp.asarray(topk_logits)
    if objective.rank_match:
        topk_logits = jnp.sort(topk_logits, axis=-1, descending=True)
    ids, labels = (
        x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4 else x
        for x in (jnp.asarray(topk_token_ids), jnp.asarray(labels))
    )
    lse = None if log_sum_exp_logits is None else jnp.asarray(log_sum_exp_logits)
    return Supervision(topk_logits, ids, labels, lse)


def computation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 where one of the arrays is."""
    return jnp.result_type(jnp.float32, *arrays)


def check_logits(student_logits: jax.Array) -> None:
    """Raise UserError unless the student's logits are floats [B, T, V]."""
    _check_array("student_logits", student_logits, 3, jnp.floating)


def check_linear(hidden: jax.Array, unembed: jax.Array, loss_mask: jax.Array) -> None:
    """Raise UserError unless hidden [B, T, D], unembed [V, D] and loss_mask [B, T] fit together."""
    _check_array("hidden", hidden, 3, jnp.floating)
    _check_array("unembed", unembed, 2, jnp.floating)
    if unembed.shape[1] != hidden.shape[2]:
        raise UserError(
            f"unembed {unembed.shape} and hidden {hidden.shape} differ in width; give unembed as [V, D]"
            f" with D = {hidden.shape[2]} (transposed?)"
        )
    _check_shape("loss_mask", loss_mask, hidden.shape[:2])


def check_supervision(objective: Objective, supervision: Supervision, positions: tuple[int, ...], v: int) -> None:
    """Raise UserError unless the teacher's arrays and the labels fit `positions` (B, T) and v token ids."""
    topk_logits, ids, labels, log_sum_exp_logits = supervision
    _check_array("topk_logits", topk_logits, 3, jnp.floating)
    _check_array("topk_token_ids", ids, 3, jnp.integer)
    _check_array("labels", labels, 2, jnp.integer)
    k = topk_logits.shape[-1]
    _check_shape("topk_logits", topk_logits, (*positions, k))
    _check_shape("topk_token_ids", ids, (*positions, k))
    _check_shape("labels", labels, positions)
    if not 1 <= k <= v:
        raise UserError(
            f"the teacher has K = {k} entries a position, the student a vocabulary of V = {v};"
            " K must be between 1 and V: is this the cache of another tokenizer?"
        )
    if log_sum_exp_logits is not None:
        _check_array("log_sum_exp_logits", log_sum_exp_logits, 2, jnp.floating)
        _check_shape("log_sum_exp_logits", log_sum_exp_logits, positions)
    elif objective.ghost:
        raise UserError(
            "tail = 'ghost' needs log_sum_exp_logits [B, T], the teacher's logsumexp over its whole"
            " vocabulary, and it is None; give it or choose tail = 'renormalize'"
        )


def check_ids(
    objective: Objective, supervision: Supervision, v: int, loss_mask: Float[Array, "B T"] | None = None
) -> None:
    """In checked mode, fail on an id outside [0, v) that a term reads at an unmasked position.

    Ids are values, unknown while a program is traced. Checked mode is JAX's: what is inside of
    `jax.experimental.checkify.checkify(f, errors=checkify.user_checks)` returns its first failure beside its
    result; anywhere else this costs nothing.
    """
    read_BxT = jnp.ones(supervision.labels.shape, bool) if loss_mask is None else loss_mask != 0
    if not objective.rank_match:
        present_BxTxK = (supervision.topk_logits != -jnp.inf) & read_BxT[..., None]
        _check_ids("topk_token_ids", supervision.topk_token_ids, present_BxTxK, v)
    if objective.sft_loss_weight != 0:
        _check_ids("labels", supervision.labels, read_BxT, v)


def _check_ids(name: str, ids: jax.Array, read: jax.Array, v: int) -> None:
    wrong = read & ((ids < 0) | (ids >= v))
    first = jnp.argmax(wrong)
    at = jnp.unravel_index(first, ids.shape)
    checkify.debug_check(
        ~wrong.any(),
        f"{name} holds {{id}} at row {{row}}, position {{position}}, which is no id of a vocabulary of V = {v}: is"
        " this the cache of another tokenizer? Leave entries out by a teacher value of -inf, positions by the mask",
        id=ids.reshape(-1)[first],
        row=at[0],
        position=at[1],
    )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not isinstance(value, str | bool | None) or value not in choices:
        raise UserError(f"{name} = {value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(
            f"{name} = {value!r} is a {type(value).__name__}; settings are compiled in, give a finite Python number"
        )


def _check_array(name: str, array: jax.Array, rank: int, kind: type) -> None:
    if array.ndim != rank or not jnp.issubdtype(array.dtype, kind):
        raise UserError(
            f"{name} is {array.dtype} {list(array.shape)}; it must have {rank} dimensions and a"
            f" {'floating-point' if kind is jnp.floating else 'integer'} dtype"
        )


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UserError(f"{name} has shape {list(array.shape)}; the student's positions ask for {list(shape)}")
