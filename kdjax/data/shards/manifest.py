"""cache.json: what a cache holds, who its teacher was, and the digest of every other file in it."""

import base64
import dataclasses
import hashlib
import json
import os
import typing
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.record_bytes import Coding, VocabularyOrder
from kdjax.types import UserError

MANIFEST = "cache.json"
FORMAT = "kdjax cache"
VERSION = 1
TARGETS = ("topk", "sampled", "hybrid")
VALUES = ("quantised", "float32")


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """A shard, as the manifest lists it."""

    file: str
    records: int
    tokens: int
    unmasked: int  # positions with a loss mask above 0
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class CacheManifest:
    """The content of cache.json; docs/cache.md explains each field."""

    vocab_size: int  # of the teacher
    top_k: int  # the most entries that a position has
    sequence_length: int  # tokens of the longest record
    targets: str = "topk"
    draws: int = 0  # at each position, with sampled and hybrid targets
    top_p: float | None = None  # the entries of a position stop when they hold this share of the probability
    values: str = "quantised"
    target_logits_scales: tuple[float, ...] = (1.0,)  # those with a stored logsumexp
    teacher_temperature: float = 1.0  # the stored logits were divided by it
    teacher: str | None = None
    teacher_sha256: str | None = None
    tokenizer_sha256: str | None = None
    license: str | None = None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)  # how the cache was made; free form
    has_label_log_probs: bool = False
    has_offsets: bool = False
    first_ids: str = ""  # of the vocabulary order: base64 of a zstd frame of little-endian int32
    shards: tuple[ShardEntry, ...] = ()

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def coding(self) -> Coding:
        """What the records have in common."""
        first = _decode_ids(self.first_ids, self.vocab_size) if self.first_ids else np.zeros(0, np.int64)
        return Coding(
            VocabularyOrder(self.vocab_size, first), self.values == "float32", tuple(self.target_logits_scales)
        )


def encode_ids(ids: np.ndarray) -> str:
    """Returns ids as the manifest stores them."""
    return base64.b64encode(zstandard.compress(ids.astype("<i4").tobytes(), 19)).decode()


def _decode_ids(text: str, vocab_size: int) -> np.ndarray:
    """Returns the ids that `encode_ids` stored. Raises UserError unless they are different ids of the vocabulary."""
    try:
        octets = zstandard.ZstdDecompressor().decompress(base64.b64decode(text), max_output_size=4 * vocab_size)
        ids = np.frombuffer(octets, "<i4").astype(np.int64)
    except (ValueError, zstandard.ZstdError) as error:
        raise UserError(f"{MANIFEST}: first_ids cannot be read ({error}); copy the manifest again") from error
    if len(np.unique(ids)) != len(ids) or (len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size):
        raise UserError(f"{MANIFEST}: first_ids are not different ids below {vocab_size}; copy the manifest again")
    return ids


def write_manifest(directory: Path, manifest: CacheManifest) -> None:
    """Writes cache.json, which appears complete or not at all."""
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"
    partial = directory / (MANIFEST + ".partial")
    with explain_os_errors(partial, "write this manifest"):
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(directory / MANIFEST)


def read_cache_manifest(directory: Path) -> CacheManifest:
    """Returns the manifest of a cache. Raises UserError if it is missing, damaged, or of a later version."""
    path = directory / MANIFEST
    with explain_os_errors(path, "read this manifest"):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        stored = content.pop("sha256")
        if content["format"] != FORMAT or content["version"] > VERSION:
            raise UserError(
                f"{path}: format {content['format']!r}, version {content['version']}; this version of kdjax reads "
                f"{FORMAT!r} up to version {VERSION}: update kdjax"
            )
        if stored != _digest(content):
            raise ValueError("its digest does not match its content")
        return _from_json(content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this manifest is damaged ({error}); copy it again") from error


def _from_json(content: dict[str, Any]) -> CacheManifest:
    """Returns the manifest that the JSON object describes. Keys of later versions are ignored."""
    types = typing.get_type_hints(CacheManifest)
    known = {key: content[key] for key in types if key in content}
    known["shards"] = tuple(ShardEntry(**shard) for shard in content["shards"])
    known["target_logits_scales"] = tuple(content["target_logits_scales"])
    manifest = CacheManifest(**known)
    for key in ("vocab_size", "top_k", "sequence_length"):
        if type(getattr(manifest, key)) is not int or getattr(manifest, key) < 0:
            raise ValueError(f"{key} = {getattr(manifest, key)!r}")
    if manifest.targets not in TARGETS or manifest.values not in VALUES:
        raise ValueError(f"targets = {manifest.targets!r}, values = {manifest.values!r}")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of the manifest's content in a form that does not depend on spaces or the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
