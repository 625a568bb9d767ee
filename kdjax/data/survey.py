"""What a sample of a set's records says about the whole: whether labels, mask and teacher fit together."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kdjax.data.checks import Findings
from kdjax.data.records import Record
from kdjax.types import UserError

SHIFTS = (0, -1, 1)  # topk_logits[t] held against labels[t + shift]
ENOUGH_LABELS = 16  # positions below which labels that do not follow the tokens are no proof
ENOUGH_TO_SHIFT = 100  # positions below which another shift's better agreement is no proof
ENOUGH_FOR_CHANCE = 500  # positions below which low agreement is no sign
NEAR_CHANCE = 0.02  # a teacher of any use is right more often
FOLLOWING = 0.99  # share of labels that should be the next token; chat templates add a few that are not


@dataclasses.dataclass(frozen=True)
class Survey:
    """Counts over checked records; surveys add up."""

    records: int = 0
    tokens: int = 0
    unmasked: int = 0
    followed: int = 0  # unmasked labels that are the next token ...
    followable: int = 0  # ... of those that have a next token
    # For each shift: the teacher's first choice is the label; unmasked positions that have such a label.
    agreeing: tuple[int, ...] = (0,) * len(SHIFTS)
    comparable: tuple[int, ...] = (0,) * len(SHIFTS)
    findings: Findings = dataclasses.field(default_factory=Findings)
    smallest_top_k: int | None = None
    largest_top_k: int = 0
    with_log_sum_exp: int = 0  # records

    @staticmethod
    def of(record: Record, findings: Findings) -> "Survey":
        """The counts of one checked record."""
        live_S = record.loss_mask > 0
        top_1_S = record.topk_token_ids[:, 0] if record.top_k else np.full(len(record), -1)
        agreeing, comparable = [], []
        for shift in SHIFTS:
            teacher, label = _overlap(shift)
            both = live_S[teacher] & live_S[label]
            agreeing.append(int(np.sum(both & (top_1_S[teacher] == record.labels[label]))))
            comparable.append(int(both.sum()))
        return Survey(
            records=1,
            tokens=len(record),
            unmasked=int(live_S.sum()),
            followed=int(np.sum(live_S[:-1] & (record.labels[:-1] == record.tokens[1:]))),
            followable=int(live_S[:-1].sum()),
            agreeing=tuple(agreeing),
            comparable=tuple(comparable),
            findings=findings,
            smallest_top_k=record.top_k,
            largest_top_k=record.top_k,
            with_log_sum_exp=int(record.log_sum_exp_logits is not None),
        )

    def __add__(self, other: "Survey") -> "Survey":
        smallest = [k for k in (self.smallest_top_k, other.smallest_top_k) if k is not None]
        return Survey(
            self.records + other.records,
            self.tokens + other.tokens,
            self.unmasked + other.unmasked,
            self.followed + other.followed,
            self.followable + other.followable,
            _sum(self.agreeing, other.agreeing),
            _sum(self.comparable, other.comparable),
            self.findings + other.findings,
            min(smallest, default=None),
            max(self.largest_top_k, other.largest_top_k),
            self.with_log_sum_exp + other.with_log_sum_exp,
        )

    @property
    def agreement(self) -> tuple[float, ...]:
        """For each shift the share of positions where the teacher's first choice is the label."""
        return tuple(a / max(1, c) for a, c in zip(self.agreeing, self.comparable, strict=True))


def judge(found: Survey, top_k: int | None, compare_ids: bool) -> list[str]:
    """What is worth a warning. Raises UserError for what makes training pointless.

    `top_k` is data.top_k; `compare_ids` says that teacher and student share a vocabulary.
    """
    if not found.unmasked:
        raise UserError(
            f"none of the {found.records} records checked has an unmasked position: every loss_mask is 0 "
            "and there is nothing to learn; check how the masks were made"
        )
    if top_k is not None and top_k > found.largest_top_k:
        raise UserError(
            f"data.top_k = {top_k}, but the records hold {found.largest_top_k} teacher entries at each "
            f"position; set data.top_k to at most {found.largest_top_k}, or leave it out to use all"
        )
    return [*_judge_labels(found), *(_judge_agreement(found) if compare_ids else []), *_judge_findings(found)]


def _judge_labels(found: Survey) -> list[str]:
    rate = found.followed / max(1, found.followable)
    if found.followable < ENOUGH_LABELS or rate >= FOLLOWING:
        return []
    said = f"{rate:.1%} of the unmasked labels are the next token (labels[t] == tokens[t + 1])"
    if rate < 0.5:
        raise UserError(
            f"only {said}, in {found.records} records checked; labels must be the tokens shifted by one: "
            "write the records with labels = ids[1:] and tokens = ids[:-1]"
        )
    return [f"only {said}; the others should be ends of turns or of documents"]


def _judge_agreement(found: Survey) -> list[str]:
    here, *others = found.agreement
    for shift, rate, compared in zip(SHIFTS[1:], others, found.comparable[1:], strict=True):
        if compared >= ENOUGH_TO_SHIFT and rate >= max(2 * here, here + 0.1):
            raise UserError(
                f"the teacher's first choice is the label at {here:.1%} of positions, but at {rate:.1%} "
                f"when topk_logits[t] is held against labels[t {'+' if shift > 0 else '-'} 1]: the "
                "teacher is misaligned by one position; write the records so that topk_logits[t] predict "
                "labels[t]"
            )
    if found.comparable[0] >= ENOUGH_FOR_CHANCE and here < NEAR_CHANCE:
        return [
            f"the teacher's first choice is the label at only {here:.1%} of {found.comparable[0]} "
            "positions: its logits look misaligned or scrambled between records (NeMo-Aligner's capture "
            "does so with several data-parallel ranks and microbatches)"
        ]
    return []


def _judge_findings(found: Survey) -> list[str]:
    counts = {
        "were not in descending order and were sorted": found.findings.unsorted,
        "held an id twice and had it merged": found.findings.repeated,
        "sum to more than their logsumexp (from rounding, or it is not theirs)": found.findings.over_unity,
    }
    return [f"{n} of {found.unmasked} unmasked positions checked {what}" for what, n in counts.items() if n]


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _overlap(shift: int) -> tuple[slice, slice]:
    """Slices of teacher and labels such that the teacher at t meets the label at t + shift."""
    return slice(max(0, -shift), -shift if shift > 0 else None), slice(max(0, shift), shift if shift < 0 else None)
