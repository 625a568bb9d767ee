"""The optional manifest.json beside records: what their creator knew about them, compared with the configuration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kdjax.config import DataConfig
from kdjax.data.errors import explain_os_errors
from kdjax.data.files.paths import MANIFEST
from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.json. Every field is optional; other keys of the file are ignored."""

    path: Path
    teacher: str | None = None
    license: str | None = None  # of the records
    kind: str | None = None  # as data.kind
    teacher_temperature: float | None = None  # the stored logits were divided by it
    vocab_size: int | None = None  # the teacher's
    tokenizer_sha256: str | None = None
    top_k: int | None = None  # teacher entries stored at each position
    sequence_length: int | None = None  # positions of the longest record
    targets: str = "topk"  # as loss.targets, or "hybrid"


_TYPES: dict[str, tuple[type, ...]] = {
    "teacher": (str,),
    "license": (str,),
    "kind": (str,),
    "teacher_temperature": (int, float),
    "vocab_size": (int,),
    "tokenizer_sha256": (str,),
    "top_k": (int,),
    "sequence_length": (int,),
}


def read_manifest(directory: Path) -> Manifest | None:
    """Returns the manifest of a directory of records, None if there is none. Raises UserError if it is malformed."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    with explain_os_errors(path, "read this manifest"):
        text = path.read_bytes()
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or remove this manifest") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}; a manifest must be a JSON object")
    known = {key: _typed(path, key, stored[key]) for key in _TYPES if stored.get(key) is not None}
    return Manifest(path, **known)


def _typed(path: Path, key: str, value: Any) -> Any:
    if type(value) not in _TYPES[key]:
        expected = " or ".join(kind.__name__ for kind in _TYPES[key])
        raise UserError(f"{path}: {key} = {value!r} is a {type(value).__name__}; it must be {expected}")
    return value


def require_agreement(
    manifest: Manifest,
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer_sha256: str | None,
    ignore_teacher_ids: bool,
    need_entries: bool = True,
) -> None:
    """Raises UserError if a manifest contradicts the configuration, with both values and what to change.

    Without `need_entries` only the tokenizer matters.
    """
    path = manifest.path
    if not need_entries:
        _require_tokenizer(manifest, tokenizer_sha256, "use records or a student with the same tokenizer")
        return
    if manifest.kind not in (None, data.kind):
        raise UserError(f"{path}: kind is {manifest.kind!r}, data.kind is {data.kind!r}; set data.kind={manifest.kind}")
    if manifest.teacher_temperature not in (None, data.teacher_temperature):
        raise UserError(
            f"{path}: teacher_temperature is {manifest.teacher_temperature:g}, data.teacher_temperature is "
            f"{data.teacher_temperature:g}; set data.teacher_temperature={manifest.teacher_temperature:g}"
        )
    if manifest.top_k is not None and data.top_k is not None and data.top_k > manifest.top_k:
        raise UserError(
            f"{path}: top_k is {manifest.top_k}, data.top_k is {data.top_k}; set data.top_k to at most {manifest.top_k}"
        )
    if ignore_teacher_ids:
        return
    remedy = "compare values by rank with loss.cross_tokenizer=rank_match, or use a student with the same tokenizer"
    if manifest.vocab_size is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"{path}: the teacher's vocabulary has {manifest.vocab_size} ids, but the student's model.vocab_size is "
            f"{vocab_size}, so that it does not know some of the teacher's ids; {remedy}"
        )
    _require_tokenizer(manifest, tokenizer_sha256, remedy)


def _require_tokenizer(manifest: Manifest, tokenizer_sha256: str | None, remedy: str) -> None:
    if None not in (manifest.tokenizer_sha256, tokenizer_sha256) and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{manifest.path}: tokenizer_sha256 is {manifest.tokenizer_sha256}, model.tokenizer_sha256 is "
            f"{tokenizer_sha256}: the same ids mean different tokens; {remedy}"
        )


def compare_contents(manifest: Manifest, largest_top_k: int, longest: int) -> list[str]:
    """Returns warnings if the records hold more entries per position, or more tokens, than the manifest says."""
    warnings = []
    if manifest.top_k is not None and largest_top_k > manifest.top_k:
        warnings.append(f"{manifest.path}: top_k is {manifest.top_k}, but records have {largest_top_k}")
    if manifest.sequence_length is not None and longest > manifest.sequence_length:
        warnings.append(
            f"{manifest.path}: sequence_length is {manifest.sequence_length}, but a record has {longest} tokens"
        )
    return warnings
