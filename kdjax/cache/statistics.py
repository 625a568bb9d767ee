"""What a record's targets say of its teacher: mass, entropy, agreement with the labels, and their likelihood."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from kdjax.data.shards.manifest import CacheManifest
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord

SAMPLE = 256  # records that the statistics of a cache are taken from


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over unmasked positions; add those of several records. Properties are means over positions."""

    tokens: int = 0
    unmasked: int = 0
    entries_sum: float = 0.0
    mass_sum: float = 0.0  # of the exact entries
    entropy_sum: float = 0.0  # nats; the rest counts as one more entry
    nll_sum: float = 0.0  # nats; see `label_nll`
    agreeing: int = 0  # the most likely token is the label

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def entries(self) -> float:
        return self.entries_sum / max(1, self.unmasked)

    @property
    def mass(self) -> float:
        return self.mass_sum / max(1, self.unmasked)

    @property
    def entropy(self) -> float:
        return self.entropy_sum / max(1, self.unmasked)

    @property
    def nll(self) -> float:
        return self.nll_sum / max(1, self.unmasked)

    @property
    def agreement(self) -> float:
        return self.agreeing / max(1, self.unmasked)


def log_probs(record: StoredRecord) -> Float[np.ndarray, "S K"]:
    """Returns the log-probabilities of the exact entries, renormalised if no logsumexp is known; -inf for others."""
    logits = record.log_probs.astype(np.float64)
    if record.draws is not None:
        return np.where(record.draws == 0, logits, -np.inf)
    with np.errstate(divide="ignore"):
        own_S = np.log(np.exp(logits - logits.max(axis=1, initial=-1e30, keepdims=True)).sum(axis=1))
    own_S = own_S + logits.max(axis=1, initial=-1e30)
    log_sum_S = record.log_sums[0].astype(np.float64) if len(record.log_sums) else own_S
    return logits - np.where(np.isfinite(log_sum_S), log_sum_S, 0)[:, None]


def take_statistics(record: StoredRecord, manifest: CacheManifest) -> Statistics:
    """Returns the statistics of one record."""
    unmasked_S = record.loss_mask > 0
    log_p = log_probs(record)[unmasked_S]
    if not len(log_p):
        return Statistics(tokens=len(record))
    p = np.exp(log_p)
    mass_S = p.sum(axis=1)
    tail_S = np.clip(1 - mass_S, 1e-9, 1)
    entropy_S = -((p * np.where(p > 0, log_p, 0)).sum(axis=1) + tail_S * np.log(tail_S))
    present = np.isfinite(record.log_probs[unmasked_S])
    has_exact_S = (p > 0).any(axis=1)
    top_1_S = np.where(has_exact_S, np.take_along_axis(record.ids[unmasked_S], p.argmax(axis=1)[:, None], 1)[:, 0], -1)
    return Statistics(
        tokens=len(record),
        unmasked=int(unmasked_S.sum()),
        entries_sum=float(present.sum()),
        mass_sum=float(mass_S.sum()),
        entropy_sum=float(entropy_S.sum()),
        nll_sum=float(label_nll(record, manifest)[unmasked_S].sum()),
        agreeing=int((top_1_S == record.labels[unmasked_S]).sum()),
    )


def label_nll(record: StoredRecord, manifest: CacheManifest) -> Float[np.ndarray, "S"]:
    """Returns -log p(label) under the teacher at each position, nats.

    A label that is not among the entries gets the stored log-probability of the label if there is one, else an even
    share of the probability that the entries leave.
    """
    if record.label_log_probs is not None:
        return -record.label_log_probs.astype(np.float64)
    log_p = log_probs(record)
    hit = record.ids == record.labels[:, None]
    hit &= np.isfinite(log_p)
    tail_S = np.clip(1 - np.exp(log_p).sum(axis=1), 1e-9, 1)
    others = max(1, manifest.vocab_size - record.ids.shape[1])
    return -np.where(
        hit.any(axis=1), np.where(hit, log_p, -np.inf).max(axis=1, initial=-np.inf), np.log(tail_S / others)
    )


def sample(cache: Cache) -> Iterator[StoredRecord]:
    """Yields up to `SAMPLE` records, spread evenly over the cache."""
    for i in np.unique(np.linspace(0, len(cache) - 1, min(len(cache), SAMPLE)).round().astype(int)):
        yield cache.read(int(i))
