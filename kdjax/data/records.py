"""One record of teacher logits: NeMo-Aligner's JSON line, decoded into arrays whose shapes agree.

    {"tokens": [S], "labels": [S], "loss_mask": [S],
     "topk_logits": [S][K], "topk_token_ids": [S][K], "log_sum_exp_logits": [S], "index": i}

The last two may be missing; anything else (contexts, answers, metadata, ...) is passed over. What can be said
without the vocabulary and the configuration is checked here, the rest in checks.py.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kdjax.types import UserError

REQUIRED = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids")
SHOWN = 60  # characters of a bad value that an error quotes


class RecordError(UserError):
    """One record is damaged: the rest of its file may be fine."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A sequence with the teacher's top-k beside it. All but `tokens` is about the next token."""

    tokens: Int[np.ndarray, "S"]  # int32
    labels: Int[np.ndarray, "S"]  # int32
    loss_mask: Float[np.ndarray, "S"]  # float32 weights; 0 leaves a position out
    topk_logits: Float[np.ndarray, "S K"]  # float32; -inf where a position has fewer than K entries
    topk_token_ids: Int[np.ndarray, "S K"]  # int32; 0 where absent
    log_sum_exp_logits: Float[np.ndarray, "S"] | None = None  # float32, over the teacher's whole vocabulary
    index: int | None = None  # the example's number in the set that the teacher read

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def top_k(self) -> int:
        """Teacher entries stored at each position."""
        return int(self.topk_logits.shape[1])

    def first(self, length: int) -> "Record":
        """The first `length` positions."""
        if length >= len(self):
            return self
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}
        return dataclasses.replace(self, **{name: a[:length] for name, a in arrays.items() if a is not None})

    def widened(self, top_k: int) -> "Record":
        """`top_k` entries at each position: absent ones, (-inf, id 0), after those there are."""
        missing = ((0, 0), (0, top_k - self.top_k))
        return dataclasses.replace(
            self,
            topk_logits=np.pad(self.topk_logits, missing, constant_values=-np.inf),
            topk_token_ids=np.pad(self.topk_token_ids, missing),
        )


def decode(line: bytes, where: str) -> Record:
    """The record in one line of JSON. `where` (file and record number) starts every error.

    Raises RecordError for what is no record: broken JSON, a missing field, values that are not numbers, ids
    that are not integers of 32 bits, fields of different lengths, top-k fields of different shapes, no
    positions. Integral floats pass as ids. Positions with fewer entries than others are padded (-inf, id 0).
    """
    with located(where):
        return _record(_parse(line))


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Start the errors of one record with its place: "FILE, record 12"."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error.__cause__


def _record(fields: dict[str, Any]) -> Record:
    tokens = _integers(fields["tokens"], "tokens", ndim=1)
    if not len(tokens):
        raise RecordError("tokens is empty; a record needs at least one position: remove this line")
    logits, ids = _even(fields)
    lse = fields.get("log_sum_exp_logits")
    record = Record(
        tokens,
        _integers(fields["labels"], "labels", ndim=1),
        _floats(fields["loss_mask"], "loss_mask", ndim=1),
        _floats(logits, "topk_logits", ndim=2),
        _integers(ids, "topk_token_ids", ndim=2),
        None if lse is None else _floats(lse, "log_sum_exp_logits", ndim=1),
        fields["index"] if type(fields.get("index")) is int else None,
    )
    for field in dataclasses.fields(Record)[1:-1]:
        array = getattr(record, field.name)
        if array is not None and len(array) != len(tokens):
            raise RecordError(
                f"{field.name} has {len(array)} positions, tokens has {len(tokens)}; every field of a "
                "record describes the same positions: write this record again"
            )
    return record


def quoted(value: Any) -> str:
    """A value for an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RecordError(f"not valid JSON ({error}); write this line again or remove it") from error
    if not isinstance(fields, dict):
        raise RecordError(f"{quoted(fields)} is a {type(fields).__name__}; a record is a JSON object")
    missing = [name for name in REQUIRED if name not in fields]
    if missing:
        raise RecordError(
            f"no field {', '.join(missing)}; the fields here are {', '.join(fields) or 'none'}, a record "
            f"needs {', '.join(REQUIRED)}"
        )
    return fields


def _even(fields: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """topk_logits and topk_token_ids, known to have the same shape, positions with few entries filled up."""
    logits, ids = fields["topk_logits"], fields["topk_token_ids"]
    widths, id_widths = _widths(logits, "topk_logits"), _widths(ids, "topk_token_ids")
    if widths != id_widths:
        at = next((t for t, (a, b) in enumerate(zip(widths, id_widths, strict=False)) if a != b), None)
        place = "" if at is None else f" (first at position {at}: {widths[at]} and {id_widths[at]} entries)"
        raise RecordError(
            f"topk_logits is {_shape(widths)} and topk_token_ids is {_shape(id_widths)}{place}; every "
            "logit needs its id: write this record again"
        )
    top_k = max(widths, default=0)
    if top_k == min(widths, default=0):
        return logits, ids
    return (
        [row + [-np.inf] * (top_k - len(row)) for row in logits],
        [row + [0] * (top_k - len(row)) for row in ids],
    )


def _widths(rows: Any, name: str) -> list[int]:
    """Entries at each position."""
    if not isinstance(rows, list):
        raise RecordError(f"{name} = {quoted(rows)} is a {type(rows).__name__}; it must be a list")
    for position, row in enumerate(rows):
        if not isinstance(row, list):
            raise RecordError(
                f"{name}[{position}] = {quoted(row)} is a {type(row).__name__}; each position needs its "
                "own list of teacher entries"
            )
    return [len(row) for row in rows]


def _shape(widths: list[int]) -> str:
    low, high = min(widths, default=0), max(widths, default=0)
    return f"[{len(widths)}, {low}]" if low == high else f"[{len(widths)}, {low} to {high}]"


def _integers(value: Any, name: str, ndim: int) -> np.ndarray:
    """Integers, or floats that are integral (5.0), as int32."""
    numbers = _numbers(value, name, ndim, allow_bool=False)
    with np.errstate(invalid="ignore"):
        bad = (numbers != np.rint(numbers)) | (numbers < -(2**31)) | (numbers >= 2**31)
    if bad.any():
        place, item = _pick(value, tuple(np.argwhere(bad)[0]))
        raise RecordError(f"{name}{place} = {quoted(item)}; it must be an integer of 32 bits")
    return numbers.astype(np.int32)


def _floats(value: Any, name: str, ndim: int) -> np.ndarray:
    """Numbers as float32; beyond its range they become infinite."""
    with np.errstate(over="ignore"):
        return _numbers(value, name, ndim, allow_bool=name == "loss_mask").astype(np.float32)


def _numbers(value: Any, name: str, ndim: int, allow_bool: bool) -> np.ndarray:
    """A (nested) list of JSON numbers as the array NumPy makes of it, whose depth is `ndim`."""
    if not isinstance(value, list):
        raise RecordError(f"{name} = {quoted(value)} is a {type(value).__name__}; it must be a list")
    try:
        array = np.array(value) if value else np.zeros((0,) * ndim)
    except ValueError:  # lists of different lengths, where there should be no lists at all
        array = np.array(None)
    if array.dtype.kind in ("iufb" if allow_bool else "iuf") and array.ndim == ndim:
        return array
    raise RecordError(_offence(value, name, ndim, (int, float, bool) if allow_bool else (int, float)))


def _offence(value: list[Any], name: str, ndim: int, allowed: tuple[type, ...]) -> str:
    """What keeps a (nested) list from being an array of numbers: its first item that is none, or too large."""
    for position, row in enumerate(value):
        for place, item in enumerate(row) if ndim == 2 else [(None, row)]:
            at = f"{name}[{position}]" if place is None else f"{name}[{position}][{place}]"
            if type(item) not in allowed:
                return f"{at} = {quoted(item)} is a {_kind(item)}; it must be a number, not in quotes"
            if isinstance(item, int) and not -(2**63) <= item < 2**63:
                return f"{at} = {quoted(item)} is beyond 64 bits; write this record again"
    raise AssertionError(f"{name} is an array of numbers")


def _kind(item: Any) -> str:
    names = {str: "string", type(None): "null", bool: "boolean", list: "list", dict: "object"}
    return names.get(type(item), type(item).__name__)


def _pick(value: Any, position: tuple[Any, ...]) -> tuple[str, Any]:
    """("[3][2]", the item there)."""
    for step in position:
        value = value[step]
    return "".join(f"[{step}]" for step in position), value
