"""Checks a decoded record before the loss may use it, and brings its entries into one form: logits, descending.

Refused with a RecordError: ids outside the vocabulary, NaN and +inf, positions without a teacher entry, mask values
outside 0 and 1, values that are not of the declared data.kind. Repaired and counted (repair.py): unsorted rows and
duplicate ids. Where the loss mask is 0 the teacher's entries are not checked but set to zero.
"""

import dataclasses

import numpy as np

from kdjax.config import DataConfig
from kdjax.data.records import Record, RecordError, brackets, prefix_errors
from kdjax.data.repair import merge_duplicates, sort_entries

# How far above 1 a sum of probabilities may be. Rounding to bfloat16 moves log-probabilities between -8 and -16 by up
# to 0.03 (MASS_TOLERANCE), and raw logits and logsumexps between 32 and 64 by up to 0.125 each (LSE_TOLERANCE).
MASS_TOLERANCE = 0.05
LSE_TOLERANCE = 0.5
ROUNDING = 1e-5  # a sum of probabilities may exceed 1 by this much in float32 without being counted
ENOUGH_ENTRIES = 8  # with this many entries it is no accident that all of them look like probabilities


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What the records of a set must satisfy."""

    data: DataConfig
    vocab_size: int  # the student's true vocabulary
    need_log_sum_exp: bool
    ignore_teacher_ids: bool  # they belong to another vocabulary: only values and ranks are used
    need_entries: bool = True  # False: a teacher on the mesh takes their place, and stored ones are dropped


@dataclasses.dataclass(frozen=True)
class Findings:
    """Counts of positions, in one record or several, that were repaired or are worth reporting."""

    unsorted: int = 0
    duplicates: int = 0  # had an id more than once
    over_unity: int = 0  # the entries sum to more than the stored logsumexp; the loss clamps them
    mass_sum: float = 0.0  # share of the teacher's probability that the entries hold, summed over positions ...
    mass_count: int = 0  # ... of which there are this many: those with a known logsumexp

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def check(record: Record, requirements: Requirements, where: str) -> tuple[Record, Findings]:
    """Returns the record as the loss may use it (logits in descending order, cut to `data.top_k`) and the findings.

    Raises RecordError, which starts with `where` (the file and record number), if the record cannot be used.
    """
    with prefix_errors(where):
        return _check(record, requirements)


def _check(record: Record, requirements: Requirements) -> tuple[Record, Findings]:
    data = requirements.data
    unmasked_S = _unmasked(record, data)
    tokens_S = _tokens(record, unmasked_S, requirements.vocab_size)
    _require_range(record.labels, unmasked_S, requirements.vocab_size, "labels")
    if not requirements.need_entries:
        labels_S, nothing = np.where(unmasked_S, record.labels, 0), np.zeros((len(record), 0), np.float32)
        return Record(
            tokens_S, labels_S, record.loss_mask, nothing, nothing.astype(np.int32), index=record.index
        ), Findings()
    if requirements.need_log_sum_exp and record.log_sum_exp_logits is None and data.kind == "logits":
        raise RecordError(
            "no field log_sum_exp_logits, which loss.tail = 'ghost' and 'label' need; cache the teacher's logits with "
            "it, or set loss.tail=renormalize"
        )
    logits_SxK, ids_SxK = _entries(record, unmasked_S, requirements)
    logits_SxK, lse_S = _as_logits(logits_SxK, record.log_sum_exp_logits, unmasked_S, requirements)
    if record.topk_weights is not None:  # a cache's, each id once; their order means nothing
        weights_SxK = np.where(unmasked_S[:, None], record.topk_weights, np.float32(0))
        logits_SxK = np.where(weights_SxK > 0, logits_SxK, -np.inf)
        checked = dataclasses.replace(
            record,
            tokens=tokens_S,
            labels=np.where(unmasked_S, record.labels, 0),
            topk_logits=logits_SxK,
            topk_token_ids=ids_SxK,
            log_sum_exp_logits=lse_S,
            topk_weights=weights_SxK,
        )
        return checked, Findings()
    logits_SxK, ids_SxK, unsorted = sort_entries(logits_SxK, ids_SxK, data.strict)
    duplicates = 0
    if not requirements.ignore_teacher_ids:
        logits_SxK, ids_SxK, duplicates = merge_duplicates(logits_SxK, ids_SxK, unmasked_S, data.strict)
    logits_SxK, ids_SxK = logits_SxK[:, : data.top_k], ids_SxK[:, : data.top_k]
    checked = Record(
        tokens_S,
        np.where(unmasked_S, record.labels, 0),
        record.loss_mask,
        np.ascontiguousarray(logits_SxK),
        np.ascontiguousarray(ids_SxK),
        lse_S,
        index=record.index,
    )
    if lse_S is None:
        return checked, Findings(unsorted, duplicates)
    mass_S = _mass(logits_SxK[unmasked_S], lse_S[unmasked_S, None])
    over_unity = int(np.sum(mass_S > 1 + ROUNDING))
    return checked, Findings(unsorted, duplicates, over_unity, float(mass_S.sum()), len(mass_S))


def _unmasked(record: Record, data: DataConfig) -> np.ndarray:
    """Returns where the loss mask is above 0."""
    mask_S = record.loss_mask
    outside = ~((mask_S >= 0) & (mask_S <= 1))  # so that NaN is outside
    if outside.any():
        t = int(np.argmax(outside))
        raise RecordError(f"loss_mask[{t}] = {mask_S[t]:g}; it must be 0 or 1: correct it in the file")
    between = (mask_S > 0) & (mask_S < 1)
    if between.any() and not data.weighted_mask:
        t = int(np.argmax(between))
        raise RecordError(
            f"loss_mask[{t}] = {mask_S[t]:g} is neither 0 nor 1; if the mask holds weights, set data.weighted_mask=True"
        )
    return mask_S > 0


def _tokens(record: Record, unmasked_S: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns the tokens, checked up to the last unmasked position. Those after it are not used, so any id will do."""
    read_S = np.arange(len(record)) <= (np.flatnonzero(unmasked_S)[-1] if unmasked_S.any() else -1)
    _require_range(record.tokens, read_S, vocab_size, "tokens")
    in_range_S = (record.tokens >= 0) & (record.tokens < vocab_size)
    return np.where(in_range_S, record.tokens, 0)


def _require_range(ids: np.ndarray, used: np.ndarray, vocab_size: int, name: str) -> None:
    """Raises RecordError unless every id that is used lies in [0, vocab_size)."""
    outside = used & ((ids < 0) | (ids >= vocab_size))
    if outside.any():
        position = tuple(np.argwhere(outside)[0])
        raise RecordError(
            f"{name}{brackets(position)} = {ids[position]} is outside the student's vocabulary, 0 to {vocab_size - 1}; "
            "either teacher and student have different tokenizers (see loss.cross_tokenizer), or this record is damaged"
        )


def _entries(record: Record, unmasked_S: np.ndarray, requirements: Requirements) -> tuple[np.ndarray, np.ndarray]:
    """Returns the teacher's values and ids: checked where unmasked, 0 where masked; id 0 where there is no entry."""
    values_SxK, ids_SxK = record.topk_logits, record.topk_token_ids
    unmasked_Sx1 = unmasked_S[:, None]
    damaged = unmasked_Sx1 & (np.isnan(values_SxK) | np.isposinf(values_SxK))
    if damaged.any():
        t, k = np.argwhere(damaged)[0]
        raise RecordError(
            f"topk_logits[{t}][{k}] = {values_SxK[t, k]} at an unmasked position: the teacher's output was not finite; "
            "generate this record again, or allow it to be skipped with data.max_bad_records"
        )
    present_SxK = values_SxK > -np.inf
    empty_S = unmasked_S & ~present_SxK.any(axis=1)
    if empty_S.any():
        t = int(np.argmax(empty_S))
        raise RecordError(
            f"topk_logits[{t}] = {record.topk_logits[t].tolist()} has no finite entry at an unmasked position; the "
            "teacher must give at least one token: generate this record again, or mask the position"
        )
    if not requirements.ignore_teacher_ids:
        _require_range(ids_SxK, unmasked_Sx1 & present_SxK, requirements.vocab_size, "topk_token_ids")
    usable_SxK = unmasked_Sx1 & present_SxK & (ids_SxK >= 0) & (ids_SxK < requirements.vocab_size)
    return np.where(unmasked_Sx1, values_SxK, np.float32(0)), np.where(usable_SxK, ids_SxK, 0)


def _as_logits(
    values_SxK: np.ndarray, lse_S: np.ndarray | None, unmasked_S: np.ndarray, requirements: Requirements
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns values of the declared kind as logits, and their logsumexp (0 for log_probs and probs)."""
    kind = requirements.data.kind
    if kind == "logits":
        _refuse_probabilities(values_SxK, unmasked_S)
        return values_SxK, None if lse_S is None else _checked_lse(values_SxK, lse_S, unmasked_S, requirements)
    if kind == "probs":
        values_SxK = _log(values_SxK, unmasked_S)
    mass_S = _mass(values_SxK, 0.0)
    over_S = unmasked_S & (mass_S > 1 + MASS_TOLERANCE)
    if over_S.any():
        t = int(np.argmax(over_S))
        noun = "probabilities" if kind == "probs" else "log-probabilities"
        raise RecordError(
            f"topk_logits[{t}], read as {noun} (data.kind = {kind!r}), sums to {mass_S[t]:.4g}, above 1; if these are "
            "logits, set data.kind=logits"
        )
    return values_SxK, np.zeros(len(values_SxK), np.float32)


def _log(probs_SxK: np.ndarray, unmasked_S: np.ndarray) -> np.ndarray:
    """Returns the logarithms of probabilities where unmasked (-inf for 0), and 0 where masked."""
    unmasked_Sx1 = unmasked_S[:, None]
    outside = unmasked_Sx1 & (probs_SxK > -np.inf) & ((probs_SxK < 0) | (probs_SxK > 1 + MASS_TOLERANCE))
    if outside.any():
        t, k = np.argwhere(outside)[0]
        raise RecordError(
            f"topk_logits[{t}][{k}] = {probs_SxK[t, k]:g} is not a probability, and data.kind = 'probs'; set "
            "data.kind=logits or data.kind=log_probs"
        )
    positive = unmasked_Sx1 & (probs_SxK > 0)
    empty_S = unmasked_S & ~positive.any(axis=1)
    if empty_S.any():
        t = int(np.argmax(empty_S))
        raise RecordError(
            f"topk_logits[{t}] has no probability above 0 at an unmasked position; generate this record again, or mask "
            "the position"
        )
    absent = np.where(unmasked_Sx1, np.float32(-np.inf), np.zeros_like(probs_SxK))
    return np.log(probs_SxK, out=absent, where=positive)


def _checked_lse(
    logits_SxK: np.ndarray, lse_S: np.ndarray, unmasked_S: np.ndarray, requirements: Requirements
) -> np.ndarray:
    """Returns the stored logsumexp, 0 where masked. Raises RecordError if it is needed and cannot fit these logits."""
    lse_S = np.where(unmasked_S, lse_S, np.float32(0))
    if not np.isfinite(lse_S).all():
        t = int(np.argmin(np.isfinite(lse_S)))
        raise RecordError(
            f"log_sum_exp_logits[{t}] = {lse_S[t]} at an unmasked position; generate this record again, or allow it to "
            "be skipped with data.max_bad_records"
        )
    mass_S = _mass(logits_SxK, lse_S[:, None])
    over_S = unmasked_S & (mass_S > 1 + LSE_TOLERANCE)
    if over_S.any() and requirements.need_log_sum_exp:
        t = int(np.argmax(over_S))
        raise RecordError(
            f"topk_logits[{t}] sums to {mass_S[t]:.4g} times exp(log_sum_exp_logits[{t}] = {lse_S[t]:g}), more than "
            "the whole vocabulary; logits and logsumexp must be shifted by the same amount (NeMo-Aligner subtracts "
            "each position's maximum from both): generate the records again, or set loss.tail=renormalize"
        )
    return lse_S


def _refuse_probabilities(values_SxK: np.ndarray, unmasked_S: np.ndarray) -> None:
    """Raises RecordError if supposed logits all lie within [0, 1] and no row sums to more than 1."""
    rows = values_SxK[unmasked_S]
    present = rows > -np.inf
    if np.count_nonzero(present) < ENOUGH_ENTRIES:
        return
    if (rows[present] < 0).any() or (rows > 1).any() or not rows[present].any():
        return
    sums = np.where(present, rows, 0).sum(axis=1)
    if (sums <= 1 + MASS_TOLERANCE).all():
        t = int(np.flatnonzero(unmasked_S)[0])
        raise RecordError(
            f"topk_logits looks like probabilities (all between 0 and 1, position {t} sums to {sums[0]:.4g}), and "
            "data.kind = 'logits'; set data.kind=probs, or store logits or log-probabilities"
        )


def _mass(logits_SxK: np.ndarray, lse_Sx1: np.ndarray | float) -> np.ndarray:
    """Returns the sum of exp(logit - lse) at each position, inf where it overflows float32."""
    with np.errstate(over="ignore"):
        return np.exp(logits_SxK - lse_Sx1).sum(axis=1)
