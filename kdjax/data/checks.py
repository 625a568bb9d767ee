"""What a decoded record must satisfy before the loss may see it, and what is mended on the way.

Refused (RecordError): ids outside the vocabulary, NaN and +inf, positions without a teacher entry, mask
values outside 0 and 1, values that are not of the kind that data.kind names. Mended, and counted: unsorted
rows, duplicate ids. Where the loss mask is 0 nothing of the teacher is looked at: it is zeroed.
"""

import dataclasses

import numpy as np

from kdjax.config import DataConfig
from kdjax.data.records import Record, RecordError, located
from kdjax.data.repair import merge_repeats, sort_entries

# How far above 1 a sum of probabilities may be: bfloat16 moves log-probabilities of -8 to -16 by up to 0.03,
# and raw logits and logsumexps of 32 to 64 by up to 0.125 each.
MASS_TOLERANCE = 0.05
LSE_TOLERANCE = 0.5
ROUNDING = 1e-5  # a sum of probabilities beyond 1 by less is float32's rounding, not worth counting
ENOUGH_ENTRIES = 8  # from which on values that all look like probabilities are no accident


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the records of a set are held against."""

    data: DataConfig
    vocab_size: int  # the student's true vocabulary
    need_log_sum_exp: bool = False
    ignore_teacher_ids: bool = False  # another vocabulary's: only values and their ranks are used


@dataclasses.dataclass(frozen=True)
class Findings:
    """Positions of a record, or of several, that were mended or are worth counting."""

    unsorted: int = 0
    repeated: int = 0  # had an id twice
    over_unity: int = 0  # stored entries sum to more than the stored logsumexp; the loss clamps
    mass: float = 0.0  # the entries' share of the teacher's probability, summed over positions
    weighed: int = 0  # positions with a known logsumexp

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def check(record: Record, rules: Rules, where: str) -> tuple[Record, Findings]:
    """The record as the loss may use it, and what was found: logits, descending, cut to `data.top_k` entries.

    `where` (file and record number) starts every error, a RecordError.
    """
    with located(where):
        return _check(record, rules)


def _check(record: Record, rules: Rules) -> tuple[Record, Findings]:
    data = rules.data
    live_S = _live(record, data)
    tokens_S = _tokens(record, live_S, rules.vocab_size)
    _require_range(record.labels, live_S, rules.vocab_size, "labels")
    if rules.need_log_sum_exp and record.log_sum_exp_logits is None and data.kind == "logits":
        raise RecordError(
            "no field log_sum_exp_logits, and loss.tail = 'ghost' needs it; cache the teacher's logits "
            "with it, or set loss.tail=renormalize"
        )
    logits_SxK, ids_SxK = _entries(record, live_S, rules)
    logits_SxK, lse_S = _as_logits(logits_SxK, record.log_sum_exp_logits, live_S, rules)
    logits_SxK, ids_SxK, unsorted = sort_entries(logits_SxK, ids_SxK, data.strict)
    repeated = 0
    if not rules.ignore_teacher_ids:
        logits_SxK, ids_SxK, repeated = merge_repeats(logits_SxK, ids_SxK, live_S, data.strict)
    logits_SxK, ids_SxK = logits_SxK[:, : data.top_k], ids_SxK[:, : data.top_k]
    mass_S = _mass(logits_SxK[live_S], 0.0 if lse_S is None else lse_S[live_S, None])
    checked = Record(
        tokens_S,
        np.where(live_S, record.labels, 0),
        record.loss_mask,
        np.ascontiguousarray(logits_SxK),
        np.ascontiguousarray(ids_SxK),
        lse_S,
        record.index,
    )
    if lse_S is None:
        return checked, Findings(unsorted, repeated)
    over_unity = int(np.sum(mass_S > 1 + ROUNDING))
    return checked, Findings(unsorted, repeated, over_unity, float(mass_S.sum()), len(mass_S))


def _live(record: Record, data: DataConfig) -> np.ndarray:
    """Where the loss mask is above 0."""
    mask_S = record.loss_mask
    outside = ~((mask_S >= 0) & (mask_S <= 1))  # so that NaN is outside
    if outside.any():
        t = int(np.argmax(outside))
        raise RecordError(f"loss_mask[{t}] = {mask_S[t]:g}; it must be 0 or 1: correct it in the file")
    between = (mask_S > 0) & (mask_S < 1)
    if between.any() and not data.weighted_mask:
        t = int(np.argmax(between))
        raise RecordError(
            f"loss_mask[{t}] = {mask_S[t]:g}, neither 0 nor 1; if these are weights, say so with "
            "data.weighted_mask=True"
        )
    return mask_S > 0


def _tokens(record: Record, live_S: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens. Those after the last unmasked position are padding that nothing reads: any id will do."""
    read_S = np.arange(len(record)) <= (np.flatnonzero(live_S)[-1] if live_S.any() else -1)
    _require_range(record.tokens, read_S, vocab_size, "tokens")
    in_range_S = (record.tokens >= 0) & (record.tokens < vocab_size)
    return np.where(in_range_S, record.tokens, 0)


def _require_range(ids: np.ndarray, counts: np.ndarray, vocab_size: int, name: str) -> None:
    """Raise unless every id that counts is in [0, vocab_size)."""
    outside = counts & ((ids < 0) | (ids >= vocab_size))
    if outside.any():
        position = np.argwhere(outside)[0]
        place = "".join(f"[{step}]" for step in position)
        raise RecordError(
            f"{name}{place} = {ids[tuple(position)]} is outside the student's vocabulary, 0 to "
            f"{vocab_size - 1}; teacher and student must share a tokenizer (if they do not, see "
            "loss.cross_tokenizer), or this record is damaged"
        )


def _entries(record: Record, live_S: np.ndarray, rules: Rules) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's values and ids: checked where unmasked, (0, 0) where masked; ids 0 where absent."""
    values_SxK, ids_SxK = record.topk_logits, record.topk_token_ids
    live_Sx1 = live_S[:, None]
    damaged = live_Sx1 & (np.isnan(values_SxK) | np.isposinf(values_SxK))
    if damaged.any():
        t, k = np.argwhere(damaged)[0]
        raise RecordError(
            f"topk_logits[{t}][{k}] = {values_SxK[t, k]} where loss_mask is not 0; the teacher's output "
            "was not finite there: write this record again, or allow it to be left out with "
            "data.max_bad_records"
        )
    present_SxK = values_SxK > -np.inf
    empty_S = live_S & ~present_SxK.any(axis=1)
    if empty_S.any():
        t = int(np.argmax(empty_S))
        raise RecordError(
            f"topk_logits[{t}] = {record.topk_logits[t].tolist()} has no finite entry where loss_mask is "
            "not 0; the teacher must name at least one token: write this record again, or mask the position"
        )
    if not rules.ignore_teacher_ids:
        _require_range(ids_SxK, live_Sx1 & present_SxK, rules.vocab_size, "topk_token_ids")
    return (
        np.where(live_Sx1, values_SxK, np.float32(0)),
        np.where(live_Sx1 & present_SxK & (ids_SxK >= 0) & (ids_SxK < rules.vocab_size), ids_SxK, 0),
    )


def _as_logits(
    values_SxK: np.ndarray, lse_S: np.ndarray | None, live_S: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of the declared kind as logits, with their logsumexp (0 for what is normalised already)."""
    kind = rules.data.kind
    if kind == "logits":
        _refuse_probabilities(values_SxK, live_S)
        return values_SxK, None if lse_S is None else _checked_lse(values_SxK, lse_S, live_S, rules)
    if kind == "probs":
        values_SxK = _log(values_SxK, live_S)
    mass_S = _mass(values_SxK, 0.0)
    over_S = live_S & (mass_S > 1 + MASS_TOLERANCE)
    if over_S.any():
        t = int(np.argmax(over_S))
        what = "probabilities" if kind == "probs" else "log-probabilities"
        raise RecordError(
            f"topk_logits[{t}], read as {what} (data.kind = {kind!r}), sums to {mass_S[t]:.4g}, above 1; if "
            "these are logits, set data.kind=logits"
        )
    return values_SxK, np.zeros(len(values_SxK), np.float32)


def _log(probs_SxK: np.ndarray, live_S: np.ndarray) -> np.ndarray:
    """Logarithms where unmasked, -inf for 0; 0 where masked."""
    live_Sx1 = live_S[:, None]
    outside = live_Sx1 & (probs_SxK > -np.inf) & ((probs_SxK < 0) | (probs_SxK > 1 + MASS_TOLERANCE))
    if outside.any():
        t, k = np.argwhere(outside)[0]
        raise RecordError(
            f"topk_logits[{t}][{k}] = {probs_SxK[t, k]:g} is no probability, and data.kind = 'probs'; set "
            "data.kind=logits or data.kind=log_probs"
        )
    positive = live_Sx1 & (probs_SxK > 0)
    empty_S = live_S & ~positive.any(axis=1)
    if empty_S.any():
        t = int(np.argmax(empty_S))
        raise RecordError(
            f"topk_logits[{t}] holds no probability above 0 where loss_mask is not 0; write this record "
            "again, or mask the position"
        )
    absent = np.where(live_Sx1, np.float32(-np.inf), np.zeros_like(probs_SxK))
    return np.log(probs_SxK, out=absent, where=positive)


def _checked_lse(logits_SxK: np.ndarray, lse_S: np.ndarray, live_S: np.ndarray, rules: Rules) -> np.ndarray:
    """The stored logsumexp, 0 where masked; refused if it is needed and cannot belong to these logits."""
    lse_S = np.where(live_S, lse_S, np.float32(0))
    if not np.isfinite(lse_S).all():
        t = int(np.argmin(np.isfinite(lse_S)))
        raise RecordError(
            f"log_sum_exp_logits[{t}] = {lse_S[t]} where loss_mask is not 0; write this record again, or "
            "allow it to be left out with data.max_bad_records"
        )
    mass_S = _mass(logits_SxK, lse_S[:, None])
    over_S = live_S & (mass_S > 1 + LSE_TOLERANCE)
    if over_S.any() and rules.need_log_sum_exp:
        t = int(np.argmax(over_S))
        raise RecordError(
            f"topk_logits[{t}] sums to {mass_S[t]:.4g} of exp(log_sum_exp_logits[{t}] = {lse_S[t]:g}), and "
            "a part cannot exceed the whole; both must be shifted alike (NeMo-Aligner subtracts each "
            "position's maximum from both): write the records again, or set loss.tail=renormalize"
        )
    return lse_S


def _refuse_probabilities(values_SxK: np.ndarray, live_S: np.ndarray) -> None:
    """Raise if what should be logits is all within [0, 1] with rows that sum to no more than 1."""
    rows = values_SxK[live_S]
    present = rows > -np.inf
    if np.count_nonzero(present) < ENOUGH_ENTRIES:
        return
    if (rows[present] < 0).any() or (rows > 1).any() or not rows[present].any():
        return
    sums = np.where(present, rows, 0).sum(axis=1)
    if (sums <= 1 + MASS_TOLERANCE).all():
        t = int(np.flatnonzero(live_S)[0])
        raise RecordError(
            f"topk_logits looks like probabilities (all within 0 and 1, position {t} sums to "
            f"{sums[0]:.4g}), and data.kind = 'logits'; set data.kind=probs, or store logits or "
            "log-probabilities"
        )


def _mass(logits_SxK: np.ndarray, lse_Sx1: np.ndarray | float) -> np.ndarray:
    """Sum of exp(logit - lse) at each position; inf where float32 cannot hold it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(logits_SxK - lse_Sx1).sum(axis=1)
