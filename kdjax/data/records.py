"""Decodes a record of teacher logits from a JSON line, as NeMo-Aligner writes it, into arrays of matching shapes.

    {"tokens": [S], "labels": [S], "loss_mask": [S],
     "topk_logits": [S][K], "topk_token_ids": [S][K], "log_sum_exp_logits": [S], "index": i}

The last two fields are optional; any others (contexts, answers, metadata, ...) are ignored. This module checks whatever
needs neither the vocabulary nor the configuration; checks.py does the rest.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kdjax.types import UserError

TEXT = ("tokens", "labels", "loss_mask")  # all that a record needs where a teacher on the mesh gives the entries
REQUIRED = (*TEXT, "topk_logits", "topk_token_ids")
QUOTE_LENGTH = 60  # characters of a bad value that an error shows


class RecordError(UserError):
    """One record is damaged; the rest of its file may be fine."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A sequence and the teacher's top-k at each position. Every field but `tokens` is about the next token."""

    tokens: Int[np.ndarray, "S"]  # int32
    labels: Int[np.ndarray, "S"]  # int32
    loss_mask: Float[np.ndarray, "S"]  # float32 weights; a position of weight 0 is masked
    topk_logits: Float[np.ndarray, "S K"]  # float32; -inf where a position has fewer than K entries
    topk_token_ids: Int[np.ndarray, "S K"]  # int32; 0 where there is no entry
    log_sum_exp_logits: Float[np.ndarray, "S"] | None = None  # float32, over the teacher's whole vocabulary
    topk_weights: Float[np.ndarray, "S K"] | None = None  # float32; sampled targets: the share that an entry carries
    index: int | None = None  # number of the example in the set that the teacher read

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def top_k(self) -> int:
        """Teacher entries stored at each position (K)."""
        return int(self.topk_logits.shape[1])

    def truncated(self, length: int) -> "Record":
        """Returns the record cut to its first `length` positions."""
        if length >= len(self):
            return self
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}
        return dataclasses.replace(self, **{name: a[:length] for name, a in arrays.items() if a is not None})

    def padded(self, top_k: int) -> "Record":
        """Returns the record with `top_k` entries at each position; those added have logit -inf and id 0."""
        missing = ((0, 0), (0, top_k - self.top_k))
        return dataclasses.replace(
            self,
            topk_logits=np.pad(self.topk_logits, missing, constant_values=-np.inf),
            topk_token_ids=np.pad(self.topk_token_ids, missing),
            topk_weights=None if self.topk_weights is None else np.pad(self.topk_weights, missing),
        )


def decode(line: bytes, where: str, with_entries: bool = True) -> Record:
    """Decodes one line of JSON. Accepts integral floats as ids, and pads positions with few entries by (-inf, id 0).

    Without `with_entries` the teacher's fields may be absent and are not read; the record then has K = 0.

    Raises RecordError, which starts with `where` (the file and record number), for broken JSON, a missing field, values
    that are not numbers, ids that are not 32-bit integers, fields of different lengths, top-k fields of different
    shapes, and a record without positions.
    """
    with prefix_errors(where):
        return _to_record(_parse(line, REQUIRED if with_entries else TEXT), with_entries)


@contextlib.contextmanager
def prefix_errors(where: str) -> Iterator[None]:
    """Puts `where`, such as "FILE, record 12", in front of the message of a RecordError."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error.__cause__


def _to_record(fields: dict[str, Any], with_entries: bool) -> Record:
    tokens = _integers(fields["tokens"], "tokens", ndim=1)
    if not len(tokens):
        raise RecordError("tokens is empty; a record needs at least one position: remove this line")
    logits, ids = _padded_top_k(fields) if with_entries else ([[] for _ in tokens], [[] for _ in tokens])
    lse = fields.get("log_sum_exp_logits") if with_entries else None
    record = Record(
        tokens,
        _integers(fields["labels"], "labels", ndim=1),
        _floats(fields["loss_mask"], "loss_mask", ndim=1),
        _floats(logits, "topk_logits", ndim=2),
        _integers(ids, "topk_token_ids", ndim=2),
        None if lse is None else _floats(lse, "log_sum_exp_logits", ndim=1),
        index=fields["index"] if type(fields.get("index")) is int else None,
    )
    for field in dataclasses.fields(Record)[1:-1]:
        array = getattr(record, field.name)
        if array is not None and len(array) != len(tokens):
            raise RecordError(
                f"{field.name} has {len(array)} positions, tokens has {len(tokens)}; all fields of a record must have "
                "the same number of positions: generate this record again"
            )
    return record


def _parse(line: bytes, required: Sequence[str]) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RecordError(f"not valid JSON ({error}); generate this line again or remove it") from error
    if not isinstance(fields, dict):
        raise RecordError(f"{_quote(fields)} is a {type(fields).__name__}; a record must be a JSON object")
    missing = [name for name in required if name not in fields]
    if missing:
        raise RecordError(
            f"no field {', '.join(missing)}; this line has {', '.join(fields) or 'none'}, a record needs "
            f"{', '.join(required)}"
        )
    return fields


def _padded_top_k(fields: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Returns topk_logits and topk_token_ids, checked to have one shape, with short positions padded."""
    logits, ids = fields["topk_logits"], fields["topk_token_ids"]
    widths, id_widths = _widths(logits, "topk_logits"), _widths(ids, "topk_token_ids")
    if widths != id_widths:
        at = next((t for t, (a, b) in enumerate(zip(widths, id_widths, strict=False)) if a != b), None)
        place = "" if at is None else f" (first at position {at}: {widths[at]} and {id_widths[at]} entries)"
        raise RecordError(
            f"topk_logits is {_shape(widths)} and topk_token_ids is {_shape(id_widths)}{place}; each logit needs its "
            "token id: generate this record again"
        )
    top_k = max(widths, default=0)
    if top_k == min(widths, default=0):
        return logits, ids
    return (
        [row + [-np.inf] * (top_k - len(row)) for row in logits],
        [row + [0] * (top_k - len(row)) for row in ids],
    )


def _widths(rows: Any, name: str) -> list[int]:
    """Returns the number of entries at each position."""
    if not isinstance(rows, list):
        raise RecordError(f"{name} = {_quote(rows)} is a {type(rows).__name__}; it must be a list")
    for position, row in enumerate(rows):
        if not isinstance(row, list):
            raise RecordError(
                f"{name}[{position}] = {_quote(row)} is a {type(row).__name__}; it must be a list of the teacher's "
                "entries at this position"
            )
    return [len(row) for row in rows]


def _shape(widths: list[int]) -> str:
    low, high = min(widths, default=0), max(widths, default=0)
    return f"[{len(widths)}, {low}]" if low == high else f"[{len(widths)}, {low} to {high}]"


def _integers(value: Any, name: str, ndim: int) -> np.ndarray:
    """Converts a list of integers, or of integral floats such as 5.0, to int32."""
    numbers = _numbers(value, name, ndim, allow_bool=False)
    bad = (numbers != np.rint(numbers)) | (numbers < -(2**31)) | (numbers >= 2**31)
    if bad.any():
        position, item = tuple(np.argwhere(bad)[0]), value
        for step in position:
            item = item[step]
        raise RecordError(f"{name}{brackets(position)} = {_quote(item)}; it must be a 32-bit integer")
    return numbers.astype(np.int32)


def _floats(value: Any, name: str, ndim: int) -> np.ndarray:
    """Converts a list of numbers to float32; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return _numbers(value, name, ndim, allow_bool=name == "loss_mask").astype(np.float32)


def _numbers(value: Any, name: str, ndim: int, allow_bool: bool) -> np.ndarray:
    """Converts a (nested) list of JSON numbers to an array of `ndim` dimensions, of the dtype that NumPy chooses."""
    if not isinstance(value, list):
        raise RecordError(f"{name} = {_quote(value)} is a {type(value).__name__}; it must be a list")
    try:
        array = np.array(value) if value else np.zeros((0,) * ndim)
    except ValueError:  # a ragged list
        array = np.array(None)
    if array.dtype.kind in ("iufb" if allow_bool else "iuf") and array.ndim == ndim:
        return array
    raise RecordError(_explain_bad_item(value, name, ndim, (int, float, bool) if allow_bool else (int, float)))


def _explain_bad_item(value: list[Any], name: str, ndim: int, allowed: tuple[type, ...]) -> str:
    """Describes the first item that keeps a (nested) list from being an array of numbers."""
    for position, row in enumerate(value):
        for place, item in enumerate(row) if ndim == 2 else [(None, row)]:
            at = f"{name}[{position}]" if place is None else f"{name}[{position}][{place}]"
            if type(item) not in allowed:
                return f"{at} = {_quote(item)} is a {_json_type(item)}; it must be a number, not in quotes"
            if isinstance(item, int) and not -(2**63) <= item < 2**63:
                return f"{at} = {_quote(item)} does not fit in 64 bits; generate this record again"
    raise AssertionError(f"{name} is an array of numbers")


def _json_type(item: Any) -> str:
    names = {str: "string", type(None): "null", bool: "boolean", list: "list", dict: "object"}
    return names.get(type(item), type(item).__name__)


def _quote(value: Any) -> str:
    """Formats a value for an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= QUOTE_LENGTH else f"{text[:QUOTE_LENGTH]}..."


def brackets(position: Any) -> str:
    """Formats an array position as a subscript: "[3][2]"."""
    return "".join(f"[{step}]" for step in position)
