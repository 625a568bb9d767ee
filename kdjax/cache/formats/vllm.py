"""vLLM's `prompt_logprobs`: JSON lines of completions, or of `RequestOutput`s, and Axolotl's columns of them.

    {"prompt_token_ids": [n], "prompt_logprobs": [null, {"ID": {"logprob": x, "rank": r, ...}, ...}, ...]}

or the same two fields in each of an OpenAI-compatible answer's "choices". Entry i is about token i, so it belongs to
position i - 1. Log-probabilities are over the whole vocabulary. The entry of the token itself is there even if it is
not among the top k; it becomes `label_log_probs`, and one of the teacher's entries unless its rank says otherwise.

    {"input_ids": [n], "labels": [n], "target_token_ids": [n][k], "target_logprobs": [n][k], "target_mask": [n][k]}

is what Axolotl trains on: row j is about token j + 1 (its kd/README.md, "Target alignment"). Its values are
renormalised over the k entries, so that the rest of the vocabulary is unknown.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax.cache.formats.foreign import Opened, Options, refuse_kind
from kdjax.cache.formats.json_lines import JsonLines, first_object
from kdjax.data.files.paths import Source
from kdjax.data.manifest import Manifest
from kdjax.data.records import Record, RecordError, prefix_errors

COLUMNS = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")  # Axolotl's
IGNORED = -100  # a label that is not learned


def detect(path: Path, options: Options) -> bool:
    """Returns whether the first line has the fields of vLLM or Axolotl."""
    first = first_object(path, options.scratch_dir)
    return first is not None and (_is_axolotl(first) or any("prompt_logprobs" in part for part in _parts(first)))


def open_sources(sources: Sequence[Source], options: Options) -> Opened:
    """Opens the files. Raises UserError for one that is cut off or empty."""
    axolotl = _is_axolotl(first_object(sources[0].path, options.scratch_dir) or {})
    refuse_kind(options, "Axolotl" if axolotl else "vLLM", "logits" if axolotl else "log_probs")
    files: Sequence[_AxolotlFile | _VllmFile]
    if axolotl:
        files = [_AxolotlFile(source, options.scratch_dir) for source in sources]
    else:
        files = [_VllmFile(source, options.scratch_dir) for source in sources]
    widest = max((file.top_k for file in files), default=0)
    for file in files:
        file.top_k = widest
    facts = Manifest(
        Path(),
        # Axolotl's are log-probabilities that lack their logsumexp, as logits do.
        kind="logits" if axolotl else "log_probs",
        teacher_temperature=options.teacher_temperature,
        vocab_size=options.vocab_size,
    )
    return Opened(files, facts, label_files=files if all(file.has_label_log_probs for file in files) else None)


def _is_axolotl(fields: dict[str, Any]) -> bool:
    return "target_logprobs" in fields


def _parts(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what holds prompt_logprobs: the line itself, or its choices, of which equal prompts count once."""
    if fields.get("prompt_logprobs") is not None:
        return [fields]
    choices = fields.get("choices")
    if not isinstance(choices, list):
        return [fields]
    parts: list[dict[str, Any]] = []
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("prompt_logprobs") is None:
            continue
        part = {"prompt_token_ids": fields.get("prompt_token_ids")} | choice
        if not parts or part["prompt_token_ids"] != parts[-1]["prompt_token_ids"]:
            parts.append(part)
    return parts or [fields]


class _Prompt(NamedTuple):
    """A prompt's record, with as many entries at each position as the widest has."""

    record: Record
    label_log_probs: np.ndarray  # NaN where the file does not tell


def _prompt(part: dict[str, Any]) -> _Prompt:
    """Returns the record of one prompt. Raises RecordError if it cannot be used."""
    ids, rows = part.get("prompt_token_ids"), part.get("prompt_logprobs")
    if rows is None:
        raise RecordError("no field prompt_logprobs; ask vLLM for them (prompt_logprobs=K)")
    if ids is None:
        raise RecordError(
            "no field prompt_token_ids, so that its tokens are unknown; ask the server for them (return_token_ids=true)"
        )
    tokens = _integers(ids, "prompt_token_ids")
    if not isinstance(rows, list) or len(rows) != len(tokens):
        count = f"{len(rows)} entries" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise RecordError(
            f"prompt_logprobs has {count}, and prompt_token_ids {len(tokens)} tokens; there must be one entry a token: "
            "generate this record again"
        )
    if len(tokens) < 2:
        raise RecordError(f"prompt_token_ids has {len(tokens)} tokens; a record needs two: remove this line")
    found = [_entries(row, place, int(tokens[place])) for place, row in enumerate(rows[1:], start=1)]
    width = max(len(entries) for entries, _ in found)
    values, entry_ids = np.full((len(found), width), -np.inf), np.zeros((len(found), width), np.int64)
    for place, (entries, _) in enumerate(found):
        if entries:
            entry_ids[place, : len(entries)], values[place, : len(entries)] = zip(*entries, strict=True)
    record = Record(
        tokens[:-1],
        tokens[1:],
        np.ones(len(found), np.float32),
        values.astype(np.float32),
        _fitting(entry_ids, "prompt_logprobs"),
    )
    return _Prompt(record, np.array([label for _, label in found], np.float32))


def _entries(row: Any, place: int, token: int) -> tuple[list[tuple[int, float]], float]:
    """Returns the top entries (id, log-probability) about a token, largest first, and the token's own, or NaN."""
    if not isinstance(row, dict) or not row:
        raise RecordError(
            f"prompt_logprobs[{place}] = {row!r}; only the first may be empty. vLLM leaves them out where it reuses "
            "the cache of a prefix: generate this record again with --no-enable-prefix-caching"
        )
    entries, label = [], np.nan
    for key, item in row.items():
        detailed = isinstance(item, dict)
        value = item.get("logprob") if detailed else item
        rank = item.get("rank") if detailed else None
        if not key.lstrip("-").isdecimal():
            raise RecordError(f"prompt_logprobs[{place}] has the key {key!r}; keys must be token ids")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise RecordError(f"prompt_logprobs[{place}][{key!r}] = {value!r}; it must be a number")
        if int(key) == token:
            label = float(value)
            if isinstance(rank, int) and rank > len(row):
                continue  # it is not among the most likely
        entries.append((int(key), float(value)))
    return sorted(entries, key=lambda entry: -entry[1]), label


class _VllmFile(JsonLines):
    """A file of prompts."""

    def __init__(self, source: Source, scratch_dir: str | None):
        self.top_k, self.has_label_log_probs = 0, True
        super().__init__(source, scratch_dir, self._take)
        self._read = functools.lru_cache(maxsize=1)(self._parse)  # for `record`, then `label_log_probs`

    def _take(self, fields: dict[str, Any]) -> list[int]:
        lengths = []
        for part in _parts(fields):
            prompt = _prompt(part)
            lengths.append(len(prompt.record))
            self.top_k = max(self.top_k, prompt.record.top_k)
            self.has_label_log_probs &= not np.isnan(prompt.label_log_probs).any()
        return lengths

    def _parse(self, number: int) -> _Prompt:
        with prefix_errors(self.where(number)):
            fields, part = self.object(number)
            return _prompt(_parts(fields)[part])

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if it cannot be used."""
        record = self._read(number).record
        return record.padded(max(self.top_k, record.top_k))

    def label_log_probs(self, number: int) -> np.ndarray:
        """Returns the teacher's log-probability of each label."""
        return self._read(number).label_log_probs


class _AxolotlFile(JsonLines):
    """A file of rows as Axolotl trains on them."""

    has_label_log_probs = False

    def __init__(self, source: Source, scratch_dir: str | None):
        self.top_k = 0
        super().__init__(source, scratch_dir, self._take)

    def _take(self, fields: dict[str, Any]) -> list[int]:
        record = _axolotl(fields)
        self.top_k = max(self.top_k, record.top_k)
        return [len(record)]

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if it cannot be used."""
        with prefix_errors(self.where(number)):
            record = _axolotl(self.object(number)[0])
        return record.padded(max(self.top_k, record.top_k))

    def label_log_probs(self, number: int) -> None:
        """Returns None: the rows do not have them."""


def _axolotl(fields: dict[str, Any]) -> Record:
    missing = [name for name in COLUMNS if name not in fields]
    if missing:
        raise RecordError(f"no field {', '.join(missing)}; a row needs {', '.join(COLUMNS)}")
    tokens, labels = _integers(fields["input_ids"], "input_ids"), _integers(fields["labels"], "labels")
    columns = [np.atleast_2d(_matrix(fields[name], name)) for name in COLUMNS[2:]]
    shapes = {name: array.shape for name, array in zip(COLUMNS[2:], columns, strict=True)}
    if len(labels) != len(tokens) or len(set(shapes.values())) != 1 or len(columns[0]) != len(tokens):
        raise RecordError(
            f"input_ids has {len(tokens)} tokens, labels {len(labels)}, and the teacher's columns are {shapes}; all "
            "must have a row a token: generate this record again"
        )
    if len(tokens) < 2:
        raise RecordError(f"input_ids has {len(tokens)} tokens; a record needs two: remove this line")
    ids, values, mask = (array[:-1] for array in columns)
    present = mask > 0
    learned_S = (labels[1:] != IGNORED) & present.any(axis=1)
    return Record(
        tokens[:-1],
        np.where(labels[1:] == IGNORED, tokens[1:], labels[1:]),
        learned_S.astype(np.float32),
        np.where(present, values, -np.inf).astype(np.float32),
        _fitting(np.where(present, ids, 0), "target_token_ids"),
    )


def _integers(value: Any, name: str) -> np.ndarray:
    array = np.array(value) if isinstance(value, list) and value else np.zeros((0,), np.int64)
    if not isinstance(value, list) or array.dtype.kind not in "iu" or array.ndim != 1:
        raise RecordError(f"{name} must be a list of token ids; generate this record again")
    return _fitting(array, name)


def _fitting(ids: np.ndarray, name: str) -> np.ndarray:
    """Returns ids as int32."""
    outside = (ids < -(2**31)) | (ids >= 2**31)
    if outside.any():
        raise RecordError(f"{name} holds the id {ids[outside].ravel()[0]}; it must be a 32-bit integer")
    return ids.astype(np.int32)


def _matrix(value: Any, name: str) -> np.ndarray:
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "iufb" or array.ndim != 2:
        raise RecordError(f"{name} must be a list of equally long lists of numbers; generate this record again")
    return array
