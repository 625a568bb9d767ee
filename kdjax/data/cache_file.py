"""A cache, read as the record files are that a run may be given instead."""

import hashlib

import numpy as np

from kdjax.data.files.index import Index
from kdjax.data.files.paths import Source
from kdjax.data.manifest import Manifest
from kdjax.data.records import Record
from kdjax.data.shards.manifest import MANIFEST
from kdjax.data.shards.reader import Cache
from kdjax.types import UserError


class CacheFile:
    """An open cache and the index of all its records. Safe to read from several threads.

    Args:
        source: the cache's directory.
        target_logits_scale: the loss's.
        need_log_sum_exp: whether the loss reads the teacher's logsumexp. At a scale other than 1 the records then have
            logits that are multiplied by the scale, and the logsumexp that belongs to them.
    """

    is_cut = False

    def __init__(self, source: Source, target_logits_scale: float, need_log_sum_exp: bool):
        self.source, self.cache = source, Cache(source.path)
        manifest = self.cache.manifest
        self._scale = target_logits_scale if need_log_sum_exp else 1.0
        scales = manifest.target_logits_scales
        if need_log_sum_exp and self._scale not in scales:
            stored = ", ".join(f"{scale:g}" for scale in scales) or "none"
            raise UserError(
                f"{source.path}: has no logsumexp at loss.target_logits_scale = {self._scale:g} (stored: {stored}), "
                "which the loss needs; use one of those, build the cache with --temperature "
                f"{1 / self._scale:g}, or set loss.tail=renormalize"
            )
        self._place = scales.index(self._scale) if self._scale in scales else None
        indices = [shard.index for shard in self.cache.shards]
        count = len(self.cache)
        digest = hashlib.blake2b("".join(entry.sha256 for entry in manifest.shards).encode(), digest_size=16)
        self.index = Index(
            offsets=np.zeros(count, np.int64),
            sizes=np.zeros(count, np.int64),
            lengths=np.concatenate([index.lengths for index in indices]),
            indices=np.concatenate([index.indices for index in indices]),
            lines=np.arange(1, count + 1),
            digest=digest.hexdigest(),
            is_cut=False,
        )

    def record(self, number: int) -> Record:
        """Returns record `number` (from 0). Raises RecordError if it is damaged."""
        return self.cache.read(number).record(self._place, self._scale)

    def where(self, number: int) -> str:
        """Returns the shard and the record in it, counted from 1, for messages."""
        return self.cache.where(number)

    def description(self) -> Manifest:
        """Returns what the manifest says of the teacher, to be compared with the configuration."""
        manifest = self.cache.manifest
        return Manifest(
            self.source.path / MANIFEST,
            teacher=manifest.teacher,
            license=manifest.license,
            kind="logits",
            teacher_temperature=manifest.teacher_temperature,
            vocab_size=manifest.vocab_size,
            tokenizer_sha256=manifest.tokenizer_sha256,
            top_k=manifest.top_k,
            sequence_length=manifest.sequence_length,
            targets=manifest.targets,
        )
