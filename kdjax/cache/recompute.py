"""Computes the targets of some records of a cache again, and compares them with the stored ones."""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kdjax.cache.statistics import log_probs
from kdjax.checkpoint import load_model
from kdjax.data.shards.reader import Cache
from kdjax.types import UserError

LARGEST_ERROR = 0.02  # of a probability: far above what bfloat16 and quantising cause, far below a wrong teacher's


def compare(cache: Cache, teacher: Path, count: int) -> Iterator[str]:
    """Yields the records, of `count` spread over the cache, whose stored probabilities are not the teacher's."""
    model = load_model(teacher)
    if model.config.vocab_size != cache.manifest.vocab_size:
        raise UserError(
            f"{teacher}: its vocabulary has {model.config.vocab_size} ids, and the cache's teacher had "
            f"{cache.manifest.vocab_size}"
        )
    for i in np.unique(np.linspace(0, len(cache) - 1, min(len(cache), count)).round().astype(int)):
        record = cache.read(int(i))
        logits = np.asarray(model(jnp.asarray(record.tokens)[None])[0], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        stored = np.exp(log_probs(record))
        exact = (stored > 0) & (record.loss_mask > 0)[:, None]
        error = np.where(exact, np.abs(stored - np.take_along_axis(p, record.ids, axis=1)), 0)
        if error.max(initial=0) > LARGEST_ERROR:
            t, k = np.unravel_index(error.argmax(), error.shape)
            yield (
                f"{cache.where(int(i))}: position {t} gives id {record.ids[t, k]} the probability {stored[t, k]:.4f}, "
                f"and {teacher} gives it {p[t, record.ids[t, k]]:.4f}: another teacher, or other tokens before it"
            )
