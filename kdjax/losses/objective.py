"""The settings of a loss, the arrays it learns from, the sums it returns, and the checks of the first two."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from kdjax.types import UserError

# The choices of the settings that have names.
KD_LOSSES = ("fwd_kl", "bwd_kl", "jsd")
TAILS = ("renormalize", "ghost", "label")
TARGETS = ("topk", "sampled")
CROSS_TOKENIZERS = (None, "rank_match")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static settings of a loss, as `kdjax.losses.topk_kd_loss` explains them. Hashable.

    `cross_tokenizer` also takes NeMo-Aligner's True and False, and stores them as "rank_match" and None.
    """

    kd_loss: str = "fwd_kl"
    kd_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    logits_scale: float = 1.0
    target_logits_scale: float = 1.0
    cross_tokenizer: str | bool | None = None
    tail: str = "renormalize"
    jsd_beta: float = 0.5
    targets: str = "topk"

    def __post_init__(self) -> None:
        if isinstance(self.cross_tokenizer, bool):
            object.__setattr__(self, "cross_tokenizer", "rank_match" if self.cross_tokenizer else None)

    @classmethod
    def from_settings(cls, settings: object) -> "Objective":
        """Returns the objective that the attributes of these names describe, such as those of a `LossConfig`."""
        return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def for_records(cls, settings: object) -> "Objective":
        """Returns `from_settings` for records as training reads them.

        Where the loss reads the logsumexp of the teacher's logits, the records' logits are multiplied by
        `target_logits_scale` already, because the logsumexp belongs to the product.
        """
        objective = cls.from_settings(settings)
        if objective.needs_teacher_log_sum and not objective.sampled:
            return dataclasses.replace(objective, target_logits_scale=1.0)
        return objective

    @property
    def rank_match(self) -> bool:
        """Whether the student's K largest logits are compared with the teacher's by rank instead of by id."""
        return self.cross_tokenizer == "rank_match"

    @property
    def ghost(self) -> bool:
        """Whether the mass outside the top-k forms one more bucket."""
        return self.tail == "ghost"

    @property
    def label_tail(self) -> bool:
        """Whether the teacher's mass outside the top-k goes to the label."""
        return self.tail == "label"

    @property
    def sampled(self) -> bool:
        """Whether entries carry weights of their own, with which they stand for the teacher's whole vocabulary."""
        return self.targets == "sampled"

    @property
    def needs_teacher_log_sum(self) -> bool:
        """Whether the loss reads the teacher's probabilities over its whole vocabulary."""
        return self.ghost or self.label_tail or self.sampled

    @property
    def needs_log_sum(self) -> bool:
        """Whether the loss depends on the student's whole vocabulary and not on the picked logits alone."""
        return self.sft_loss_weight != 0 or self.needs_teacher_log_sum

    @property
    def reads_labels(self) -> bool:
        """Whether a term depends on the labels."""
        return self.sft_loss_weight != 0 or self.label_tail

    def check(self, prefix: str = "") -> None:
        """Raises UserError for the first setting that cannot work, with its value, the reason and the remedy.

        `prefix` is put before the names in the message: "loss." for the keys of a configuration.
        """

        def fail(name: str, reason: str) -> NoReturn:
            raise UserError(f"{prefix}{name} = {getattr(self, name)!r} {reason}")

        named = {"kd_loss": KD_LOSSES, "tail": TAILS, "cross_tokenizer": CROSS_TOKENIZERS, "targets": TARGETS}
        for name, choices in named.items():
            if not isinstance(getattr(self, name), str | None) or getattr(self, name) not in choices:
                fail(name, f"is unknown; choose one of {', '.join(map(repr, choices))}")
        for name in ("kd_loss_weight", "sft_loss_weight", "logits_scale", "target_logits_scale", "jsd_beta"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
                kind = type(value).__name__
                fail(name, f"is a {kind}; it is compiled into the program, so give a finite Python number")
        for name in ("kd_loss_weight", "sft_loss_weight"):
            if getattr(self, name) < 0:
                fail(name, "would maximise its term; give a positive weight, or 0 to leave the term out")
        if self.kd_loss_weight == 0 and self.sft_loss_weight == 0:
            fail("kd_loss_weight", f"and {prefix}sft_loss_weight = 0 leave no loss; give at least one a positive value")
        for name in ("logits_scale", "target_logits_scale"):
            if getattr(self, name) <= 0:
                fail(name, "would flatten or invert the logits; give a value above 0 (1 / temperature)")
        if not 0 < self.jsd_beta < 1:
            fail("jsd_beta", "does not mix teacher and student; give a value strictly between 0 and 1")
        if self.needs_teacher_log_sum:
            self._check_whole_vocabulary(prefix, fail)

    def _check_whole_vocabulary(self, prefix: str, fail: Callable[[str, str], NoReturn]) -> None:
        """Checks what goes with a loss that reads the teacher's probabilities over its whole vocabulary."""
        if self.sampled and self.tail != "renormalize":
            fail(
                "tail",
                f"does not work with {prefix}targets = 'sampled', whose weights stand for the tail too; leave"
                f" {prefix}tail = 'renormalize', which is then not read, or set {prefix}targets = 'topk'",
            )
        chosen, way_out = (f"{prefix}tail = {self.tail!r}", f"{prefix}tail = 'renormalize'")
        if self.sampled:
            chosen, way_out = f"{prefix}targets = 'sampled'", f"{prefix}targets = 'topk'"
        if self.target_logits_scale != 1:
            why = "the ids were drawn from" if self.sampled else "the stored logsumexp belongs to"
            fail(
                "target_logits_scale",
                f"does not work with {chosen}: {why} the unscaled logits; set {prefix}target_logits_scale = 1 or"
                f" {way_out}",
            )
        if not self.ghost and self.kd_loss != "fwd_kl":
            fail(
                "kd_loss",
                f"does not work with {chosen}, which is a forward KL; set {prefix}kd_loss = 'fwd_kl' or {way_out}",
            )
        if not self.ghost and self.rank_match:
            fail(
                "cross_tokenizer",
                f"does not work with {chosen}, which compares by id; set {prefix}cross_tokenizer = None or {way_out}",
            )

    def check_whole(self, prefix: str = "") -> None:
        """Raises UserError for a setting about cached entries, which a teacher beside the student has none of."""
        for name, default in (("tail", "renormalize"), ("targets", "topk"), ("cross_tokenizer", None)):
            if getattr(self, name) != default:
                raise UserError(
                    f"{prefix}{name} = {getattr(self, name)!r} is about cached entries, and a teacher that runs beside"
                    f" the student is compared with it over the whole vocabulary; set {prefix}{name} = {default!r}"
                )


class Supervision(NamedTuple):
    """What each position learns from. An entry of -inf is absent, and its id is ignored."""

    topk_logits: Float[Array, "*P K"]
    topk_token_ids: Int[Array, "*P K"]
    labels: Int[Array, "*P"]
    log_sum_exp_logits: Float[Array, "*P"] | None = None  # of the teacher, over its whole vocabulary
    topk_weights: Float[Array, "*P K"] | None = None  # the share of the target that each entry carries, if sampled


class TeacherStates(NamedTuple):
    """A teacher that runs beside the student: what its logits hidden @ unembed.T are made of, for the same token ids.

    Its width E need not be the student's.
    """

    hidden: Float[Array, "B T E"]  # after the final norm
    unembed: Float[Array, "V E"]


class LossSums(NamedTuple):
    """Sums over positions, each weighted by `loss_mask`; divide by `tokens` for means in nats per token.

    Only `loss` has a gradient. The last two measure how far the student follows the teacher's ids. Rank matching
    ignores these: `top1_agreement` is then 0, and the mass is that of the student's own K largest logits.
    """

    loss: Float[Array, ""]  # kd_loss_weight * kd + sft_loss_weight * sft
    kd_loss: Float[Array, ""]  # unweighted
    sft_loss: Float[Array, ""]  # unweighted; 0 when sft_loss_weight = 0
    tokens: Float[Array, ""]  # the sum of the mask
    # Positions where no student logit exceeds the one at the teacher's most likely id, and the probability that the
    # student gives the K ids at logits_scale; None on the gathered path, which does not see the other logits.
    top1_agreement: Float[Array, ""] | None
    student_topk_mass: Float[Array, ""] | None


class TeacherSums(NamedTuple):
    """`LossSums` where a teacher runs beside the student, whose ids are then all ids. Only `loss` has a gradient."""

    loss: Float[Array, ""]
    kd_loss: Float[Array, ""]
    sft_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    top1_agreement: Float[Array, ""]
    teacher_entropy: Float[Array, ""]  # over the whole vocabulary


def supervise(objective: Objective, supervision: Supervision) -> Supervision:
    """Returns the supervision as JAX arrays with ids of at least 32 bits; for rank matching sorted, largest first."""
    topk_logits, ids, labels = map(jnp.asarray, supervision[:3])
    if objective.rank_match:
        topk_logits = jnp.sort(topk_logits, axis=-1, descending=True)
    ids, labels = (
        x.astype(jnp.int32) if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4 else x
        for x in (ids, labels)
    )
    lse, weights = (None if x is None else jnp.asarray(x) for x in supervision[3:])
    return Supervision(topk_logits, ids, labels, lse, weights)


def computation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns float32, or float64 if one of the arrays is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def check_logits(student_logits: jax.Array) -> None:
    """Raises UserError unless the student's logits are floats [B, T, V]."""
    _check_array("student_logits", student_logits, 3, jnp.floating)


def check_linear(hidden: jax.Array, unembed: jax.Array, loss_mask: jax.Array) -> None:
    """Raises UserError unless hidden [B, T, D], unembed [V, D] and loss_mask [B, T] fit together."""
    _check_array("hidden", hidden, 3, jnp.floating)
    _check_array("unembed", unembed, 2, jnp.floating)
    if unembed.shape[1] != hidden.shape[2]:
        raise UserError(
            f"unembed {unembed.shape} and hidden {hidden.shape} differ in width; give unembed as [V, D]"
            f" with D = {hidden.shape[2]} (is it transposed?)"
        )
    _check_shape("loss_mask", loss_mask, hidden.shape[:2])


def check_teacher(teacher: TeacherStates, unembed: jax.Array, labels: jax.Array, loss_mask: jax.Array) -> None:
    """Raises UserError unless the teacher's arrays fit each other, the student's unembedding and the labels."""
    check_linear(teacher.hidden, teacher.unembed, loss_mask)
    _check_shape("labels", labels, loss_mask.shape)
    if teacher.unembed.shape[0] != unembed.shape[0]:
        raise UserError(
            f"the teacher's unembedding has {teacher.unembed.shape[0]} rows and the student's {unembed.shape[0]}; cut"
            " or pad one of them, so that a shard of the vocabulary has the same token ids of both"
        )


def check_supervision(objective: Objective, supervision: Supervision, positions: tuple[int, ...], v: int) -> None:
    """Raises UserError unless the teacher's arrays and the labels fit `positions` (B, T) and v token ids."""
    topk_logits, ids, labels, log_sum_exp_logits, topk_weights = supervision
    _check_array("topk_logits", topk_logits, 3, jnp.floating)
    _check_array("topk_token_ids", ids, 3, jnp.integer)
    _check_array("labels", labels, 2, jnp.integer)
    k = topk_logits.shape[-1]
    _check_shape("topk_logits", topk_logits, (*positions, k))
    _check_shape("topk_token_ids", ids, (*positions, k))
    _check_shape("labels", labels, positions)
    if not 1 <= k <= v:
        raise UserError(
            f"the teacher has K = {k} entries per position and the student a vocabulary of V = {v}; K must be between 1"
            " and V: was this cache made with another tokenizer?"
        )
    if log_sum_exp_logits is not None:
        _check_array("log_sum_exp_logits", log_sum_exp_logits, 2, jnp.floating)
        _check_shape("log_sum_exp_logits", log_sum_exp_logits, positions)
    elif objective.needs_teacher_log_sum:
        chosen, other = f"tail = {objective.tail!r}", "tail = 'renormalize'"
        if objective.sampled:
            chosen, other = "targets = 'sampled'", "targets = 'topk'"
        raise UserError(
            f"{chosen} needs log_sum_exp_logits [B, T], the teacher's logsumexp over its whole vocabulary, which is"
            f" None; give it or choose {other}"
        )
    if topk_weights is not None and not objective.sampled:
        raise UserError(
            "topk_weights are given, which targets = 'topk' does not read; choose targets = 'sampled' or leave them out"
        )
    if topk_weights is not None:
        _check_array("topk_weights", topk_weights, 3, jnp.floating)
        _check_shape("topk_weights", topk_weights, (*positions, k))
    elif objective.sampled:
        raise UserError(
            "targets = 'sampled' needs topk_weights [B, T, K], the share of the target that each entry carries, which"
            " is None; give them or choose targets = 'topk'"
        )


def check_ids(
    objective: Objective, supervision: Supervision, v: int, loss_mask: Float[Array, "B T"] | None = None
) -> None:
    """Fails, in checked mode, on an id outside [0, v) that a term reads at an unmasked position.

    Ids are values, which are unknown while a program is traced. Checked mode is JAX's: the function
    `jax.experimental.checkify.checkify(f, errors=checkify.user_checks)` returns the first failure inside f beside its
    result; anywhere else the check costs nothing.
    """
    read_BxT = jnp.ones(supervision.labels.shape, bool) if loss_mask is None else loss_mask != 0
    if not objective.rank_match:
        present_BxTxK = (supervision.topk_logits != -jnp.inf) & read_BxT[..., None]
        _check_ids("topk_token_ids", supervision.topk_token_ids, present_BxTxK, v)
    if objective.reads_labels:
        _check_ids("labels", supervision.labels, read_BxT, v)


def _check_ids(name: str, ids: jax.Array, read: jax.Array, v: int) -> None:
    wrong = read & ((ids < 0) | (ids >= v))
    first = jnp.argmax(wrong)
    at = jnp.unravel_index(first, ids.shape)
    checkify.debug_check(
        ~wrong.any(),
        f"{name} holds {{id}} at row {{row}}, position {{position}}, outside the vocabulary of V = {v}: was this cache"
        " made with another tokenizer? A teacher value of -inf leaves out an entry, a loss_mask of 0 a position",
        id=ids.reshape(-1)[first],
        row=at[0],
        position=at[1],
    )


def _check_array(name: str, array: jax.Array, rank: int, kind: type) -> None:
    if array.ndim != rank or not jnp.issubdtype(array.dtype, kind):
        raise UserError(
            f"{name} is {array.dtype} {list(array.shape)}; it must have {rank} dimensions and a"
            f" {'floating-point' if kind is jnp.floating else 'integer'} dtype"
        )


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UserError(f"{name} has shape {list(array.shape)}; the student's positions require {list(shape)}")
