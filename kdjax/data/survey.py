"""Judges a set of records by a sample of them: whether labels, loss mask and teacher fit together."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kdjax.data.checks import Findings
from kdjax.data.records import Record
from kdjax.types import UserError

SHIFTS = (0, -1, 1)  # topk_logits[t] is compared with labels[t + shift]
ENOUGH_LABELS = 16  # with fewer positions, labels that do not follow the tokens prove nothing
ENOUGH_TO_SHIFT = 100  # with fewer positions, better agreement at another shift proves nothing
ENOUGH_FOR_CHANCE = 500  # with fewer positions, low agreement means nothing
NEAR_CHANCE = 0.02  # any useful teacher agrees with more of the labels
FOLLOWING = 0.99  # share of labels that should be the next token; chat templates add a few that are not


@dataclasses.dataclass(frozen=True)
class Survey:
    """Counts over checked records. Surveys of several records are added."""

    records: int = 0
    tokens: int = 0
    unmasked: int = 0
    followed: int = 0  # unmasked labels that are the next token ...
    followable: int = 0  # ... out of those that have a next token in the record
    # For each shift: how often the teacher's most likely token is the label, out of how many unmasked positions.
    agreeing: tuple[int, ...] = (0,) * len(SHIFTS)
    comparable: tuple[int, ...] = (0,) * len(SHIFTS)
    findings: Findings = dataclasses.field(default_factory=Findings)
    smallest_top_k: int | None = None
    largest_top_k: int = 0
    with_log_sum_exp: int = 0  # records

    @staticmethod
    def of(record: Record, findings: Findings) -> "Survey":
        """Returns the survey of one checked record."""
        unmasked_S = record.loss_mask > 0
        top_1_S = record.topk_token_ids[:, 0] if record.top_k else np.full(len(record), -1)
        agreeing, comparable = [], []
        for shift in SHIFTS:
            teacher, label = _overlap(shift)
            both = unmasked_S[teacher] & unmasked_S[label]
            agreeing.append(int(np.sum(both & (top_1_S[teacher] == record.labels[label]))))
            comparable.append(int(both.sum()))
        return Survey(
            records=1,
            tokens=len(record),
            unmasked=int(unmasked_S.sum()),
            followed=int(np.sum(unmasked_S[:-1] & (record.labels[:-1] == record.tokens[1:]))),
            followable=int(unmasked_S[:-1].sum()),
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
        """For each shift, the share of positions where the teacher's most likely token is the label."""
        return tuple(a / max(1, c) for a, c in zip(self.agreeing, self.comparable, strict=True))


def describe(survey: Survey, top_k: int, kind: str, ignore_teacher_ids: bool) -> list[str]:
    """Returns lines to print about the checked records.

    `top_k` is the number of entries used at each position, `kind` is data.kind; with `ignore_teacher_ids` the teacher
    has another vocabulary, so that its tokens are not compared with the labels.
    """
    unmasked = survey.unmasked / survey.tokens
    checked = (
        f"{counted(survey.records, 'record')} checked: {unmasked:.1%} of their positions are unmasked (loss_mask > 0)"
    )
    if not top_k:
        return ["tokens, labels and loss mask; a teacher on the mesh takes the place of cached entries", checked]
    fewer = f" (in some records {survey.smallest_top_k})" if survey.smallest_top_k != top_k else ""
    lines = [
        f"the teacher's top {top_k} tokens at each position{fewer}, stored as {kind}",
        checked,
    ]
    if not ignore_teacher_ids:
        here, before, after = survey.agreement
        lines.append(
            f"the teacher's most likely token is the label at {here:.1%} of positions (alignment check: previous label "
            f"{before:.1%}, next label {after:.1%})"
        )
    if survey.findings.mass_count:
        mean = survey.findings.mass_sum / survey.findings.mass_count
        lines.append(f"the top {top_k} tokens hold {mean:.1%} of the teacher's probability on average")
    return lines


def diagnose(survey: Survey, top_k: int | None, ignore_teacher_ids: bool) -> list[str]:
    """Returns warnings about what looks wrong. Raises UserError for what would make training pointless.

    `top_k` is data.top_k; with `ignore_teacher_ids` the teacher's tokens are not compared with the labels.
    """
    if not survey.unmasked:
        raise UserError(
            f"none of the {survey.records} records checked has an unmasked position: every loss_mask is 0, so there is "
            "nothing to learn; check how the masks were made"
        )
    if top_k is not None and top_k > survey.largest_top_k:
        raise UserError(
            f"data.top_k = {top_k}, but the records have {survey.largest_top_k} teacher entries at each position; set "
            f"data.top_k to at most {survey.largest_top_k}, or leave it unset to use all"
        )
    return [*_check_labels(survey), *([] if ignore_teacher_ids else _check_alignment(survey)), *_report(survey)]


def _check_labels(survey: Survey) -> list[str]:
    rate = survey.followed / max(1, survey.followable)
    if survey.followable < ENOUGH_LABELS or rate >= FOLLOWING:
        return []
    observation = f"only {rate:.1%} of the unmasked labels are the next token (labels[t] == tokens[t + 1])"
    if rate < 0.5:
        raise UserError(
            f"{observation}, in {survey.records} records checked; labels must be the tokens shifted by one: write the "
            "records with labels = ids[1:] and tokens = ids[:-1]"
        )
    return [f"{observation}; the others should be ends of turns or of documents"]


def _check_alignment(survey: Survey) -> list[str]:
    here, *others = survey.agreement
    for shift, rate, compared in zip(SHIFTS[1:], others, survey.comparable[1:], strict=True):
        if compared >= ENOUGH_TO_SHIFT and rate >= max(2 * here, here + 0.1):
            raise UserError(
                f"the teacher's most likely token is the label at {here:.1%} of positions, but at {rate:.1%} if "
                f"topk_logits[t] is compared with labels[t {'+' if shift > 0 else '-'} 1]: the teacher is misaligned "
                "by one position; write the records so that topk_logits[t] predict labels[t]"
            )
    if survey.comparable[0] >= ENOUGH_FOR_CHANCE and here < NEAR_CHANCE:
        return [
            f"the teacher's most likely token is the label at only {here:.1%} of {survey.comparable[0]} positions: the "
            "teacher's logits look misaligned, or assigned to the wrong records (NeMo-Aligner does this when it caches "
            "logits with several data-parallel ranks and microbatches)"
        ]
    return []


def _report(survey: Survey) -> list[str]:
    counts = {
        "were not in descending order and were sorted": survey.findings.unsorted,
        "had an id more than once, which was merged": survey.findings.duplicates,
        "sum to more than their logsumexp (rounding, or it belongs to other logits)": survey.findings.over_unity,
    }
    return [f"{n} of {survey.unmasked} unmasked positions checked {what}" for what, n in counts.items() if n]


def counted(number: int, noun: str) -> str:
    """Formats a count with its noun: "1 record", "2,000 records"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _overlap(shift: int) -> tuple[slice, slice]:
    """Returns slices of teacher and labels that pair the teacher at t with the label at t + shift."""
    return slice(max(0, -shift), -shift if shift > 0 else None), slice(max(0, shift), shift if shift < 0 else None)
