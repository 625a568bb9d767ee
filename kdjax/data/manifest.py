"""The optional manifest.json beside records: what their maker knew, held against the configuration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kdjax.config import DataConfig
from kdjax.data.errors import explained
from kdjax.data.files.paths import MANIFEST
from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every field may be missing; other keys of the file are passed over."""

    path: Path
    teacher: str | None = None
    license: str | None = None  # of the records
    kind: str | None = None  # as data.kind
    teacher_temperature: float | None = None  # the stored logits were divided by it
    vocab_size: int | None = None  # the teacher's
    tokenizer_sha256: str | None = None
    top_k: int | None = None  # teacher entries stored at each position
    sequence_length: int | None = None  # positions of the longest record


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
    """The manifest of a directory of records, or None where there is none. UserError if malformed."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    with explained(path, "read this manifest"):
        text = path.read_bytes()
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct or remove this manifest") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}; a manifest is a JSON object")
    known = {key: _typed(path, key, stored[key]) for key in _TYPES if stored.get(key) is not None}
    return Manifest(path, **known)


def _typed(path: Path, key: str, value: Any) -> Any:
    if type(value) not in _TYPES[key]:
        wanted = " or ".join(kind.__name__ for kind in _TYPES[key])
        raise UserError(f"{path}: {key} = {value!r} is a {type(value).__name__}; it must be {wanted}")
    return value


def require_agreement(
    manifest: Manifest,
    data: DataConfig,
    *,
    vocab_size: int,
    tokenizer_sha256: str | None,
    ignore_teacher_ids: bool,
) -> None:
    """Hold a manifest against the configuration. Raises UserError naming both values and what would agree."""
    path = manifest.path
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
    remedy = "compare values by rank with loss.cross_tokenizer=rank_match, or use a student of the same tokenizer"
    if manifest.vocab_size is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"{path}: the teacher's vocabulary has {manifest.vocab_size} ids, the student's "
            f"model.vocab_size is {vocab_size}, so some of the teacher's ids mean nothing to it; {remedy}"
        )
    if None not in (manifest.tokenizer_sha256, tokenizer_sha256) and manifest.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{path}: tokenizer_sha256 is {manifest.tokenizer_sha256}, model.tokenizer_sha256 is "
            f"{tokenizer_sha256}: the same ids mean other tokens; {remedy}"
        )


def require_one_temperature(data: DataConfig, target_logits_scale: float) -> None:
    """Raise UserError if the stored logits carry a temperature and the loss would apply another on top."""
    if data.teacher_temperature != 1.0 and target_logits_scale != 1.0:
        raise UserError(
            f"data.teacher_temperature = {data.teacher_temperature:g} says that the stored logits are "
            f"divided already, and loss.target_logits_scale = {target_logits_scale:g} would scale them "
            "again: the temperature would be applied twice; set loss.target_logits_scale=1"
        )
