"""One record as bytes: an 8-byte digest, then a MessagePack list of numbers and packed arrays (see docs/cache.md).

Token ids are stored as ranks in the cache's vocabulary order, in which frequent tokens come first. A position's entries
are sorted by rank and stored as gaps, which are small for frequent tokens.
"""

import dataclasses
import hashlib
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float, Int

from kdjax.data.records import Record
from kdjax.data.shards.quantise import CODES, LARGEST, dequantise, quantise
from kdjax.data.shards.symbols import NUMBERS, Alphabet, DamagedError, Packed
from kdjax.types import UserError

DIGEST_BYTES = 8
LARGEST_COUNT = 2**24  # positions times entries of a record: more is refused before memory is reserved for them
MEAN_STEP = 1 / 1024  # of `tail_log_probs`, in nats
# The packed arrays of a record, in the order in which they are stored; nil for one that is not there.
ARRAYS = (
    "tokens", "labels", "mask", "mask_weights", "counts", "ids", "values", "draws", "log_sums", "label_values",
    "tail_log_probs", "offsets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VocabularyOrder:
    """The order in which ranks number the token ids of a vocabulary: the `first` ids, then all others ascending."""

    vocab_size: int
    first: Int[np.ndarray, "n"]  # the most frequent ids, most frequent first

    def __post_init__(self) -> None:
        rest = np.ones(self.vocab_size, bool)
        rest[self.first] = False
        ids = np.concatenate([self.first, np.flatnonzero(rest)]).astype(np.int32)
        ranks = np.empty(self.vocab_size, np.uint32)
        ranks[ids] = np.arange(self.vocab_size, dtype=np.uint32)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "ranks", ranks)

    ids: Int[np.ndarray, "V"] = dataclasses.field(init=False)  # by rank
    ranks: Int[np.ndarray, "V"] = dataclasses.field(init=False)  # by id

    @classmethod
    def by_count(cls, counts: Int[np.ndarray, "V"], at_least: int = 4) -> "VocabularyOrder":
        """Returns the order for tokens that occur this often; those that occur less than `at_least` times come last."""
        order = np.argsort(-counts, kind="stable")
        return cls(len(counts), order[: np.count_nonzero(counts >= at_least)])


@dataclasses.dataclass(frozen=True)
class Coding:
    """What all records of a cache have in common."""

    order: VocabularyOrder
    lossless: bool  # float32 logits and logsumexps in their order, instead of codes
    scales: tuple[float, ...]  # the target_logits_scales (1 / temperature) with a stored logsumexp; empty: none


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A sequence with its teacher's targets. Absent entries have log-probability -inf; masked positions have none.

    With `lossless`, `log_probs` are logits as they came, and `log_sums` belong to them.
    """

    tokens: Int[np.ndarray, "S"]
    labels: Int[np.ndarray, "S"]
    loss_mask: Float[np.ndarray, "S"]
    ids: Int[np.ndarray, "S K"]
    log_probs: Float[np.ndarray, "S K"]
    # For each scale s, log sum_v exp(s * log_probs_v) over the whole vocabulary; 0 for s = 1 unless lossless.
    log_sums: Float[np.ndarray, "scales S"]
    # How often an entry was drawn from the teacher's distribution outside the exact entries; 0: the entry is exact.
    draws: Int[np.ndarray, "S K"] | None = None
    # With draws: the mean of log t over the part of the vocabulary that was drawn from, weighted by t.
    tail_log_probs: Float[np.ndarray, "S"] | None = None
    label_log_probs: Float[np.ndarray, "S"] | None = None
    offsets: Int[np.ndarray, "S"] | None = None  # the byte of the text at which each token starts
    index: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def record(self, place: int | None = 0, scale: float = 1.0) -> Record:
        """Returns the record for training: logits times `scale`, and the logsumexp at `place`, which belongs to them.

        With `place` None there is no logsumexp.
        """
        weights, values = None, self.log_probs if scale == 1 else np.float32(scale) * self.log_probs
        if self.draws is not None and self.tail_log_probs is not None:
            exact = np.where(self.draws == 0, np.exp(self.log_probs), 0)
            tail_S = np.maximum(1 - exact.sum(axis=1), 0)
            share = self.draws / np.maximum(self.draws.sum(axis=1, keepdims=True), 1)
            weights = np.where(self.draws == 0, exact, tail_S[:, None] * share).astype(np.float32)
            values = np.where(self.draws == 0, values, self.tail_log_probs[:, None])
        log_sum = None if place is None else self.log_sums[place]
        return Record(self.tokens, self.labels, self.loss_mask, values, self.ids, log_sum, weights, self.index)


def encode(record: StoredRecord, coding: Coding) -> bytes:
    """Returns the bytes of a record, the same for equal records. Raises UserError for an id outside the vocabulary."""
    ranks = coding.order.ranks
    for name in ("tokens", "labels", "ids"):
        _require_ids(name, getattr(record, name), len(ranks))
    tokens = ranks[record.tokens]
    arrays: dict[str, np.ndarray] = {
        "tokens": tokens,
        "labels": ranks[record.labels] ^ np.append(tokens[1:], np.uint32(0)),
    }
    if np.isin(record.loss_mask, (0, 1)).all():
        arrays["mask"] = record.loss_mask.astype(np.uint8)
    else:
        arrays["mask_weights"] = record.loss_mask.astype(np.float32).view(np.uint32)
    if coding.lossless:
        arrays |= _exact_entries(record, ranks)
    else:
        arrays |= _quantised_entries(record, ranks, coding.scales)
    if record.label_log_probs is not None:
        arrays["label_values"] = quantise(record.label_log_probs)
    if record.tail_log_probs is not None:
        arrays["tail_log_probs"] = np.rint(np.clip(-record.tail_log_probs, 0, 60) / MEAN_STEP).astype(np.uint16)
    if record.offsets is not None:
        arrays["offsets"] = np.diff(record.offsets, prepend=0).astype(np.uint32)
    packed = [_alphabet(name, coding).pack(arrays[name]) if name in arrays else None for name in ARRAYS]
    body = msgpack.packb([len(record), record.ids.shape[1], record.index, packed])
    return _digest(body) + body


def _require_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise UserError(f"{name} hold {wrong}, and the cache's vocabulary has the ids 0 to {vocab_size - 1}")


def _exact_entries(record: StoredRecord, ranks: np.ndarray) -> dict[str, np.ndarray]:
    assert record.draws is None, "draws are quantised"
    return {
        "ids": ranks[record.ids],
        "values": record.log_probs.astype(np.float32).view(np.uint32),
        "log_sums": record.log_sums.astype(np.float32).view(np.uint32),
    }


def _quantised_entries(record: StoredRecord, ranks: np.ndarray, scales: tuple[float, ...]) -> dict[str, np.ndarray]:
    present_SxK = record.log_probs > -np.inf
    counts_S = present_SxK.sum(axis=1)
    absent = np.iinfo(np.int64).max
    ranks_SxK = np.where(present_SxK, ranks[record.ids].astype(np.int64), absent)
    order_SxK = np.argsort(ranks_SxK, axis=1, kind="stable")
    ranks_SxK = np.take_along_axis(ranks_SxK, order_SxK, axis=1)
    kept_SxK = ranks_SxK != absent
    gaps_SxK = np.diff(ranks_SxK, axis=1, prepend=-1) - 1
    assert (gaps_SxK[kept_SxK] >= 0).all(), "an id is stored twice at a position"
    codes_SxK = np.take_along_axis(quantise(record.log_probs), order_SxK, axis=1)
    codes_SxK = np.maximum(codes_SxK, 1)  # 0 means absent
    arrays: dict[str, np.ndarray] = {
        "counts": counts_S.astype(np.uint32),
        "ids": gaps_SxK[kept_SxK].astype(np.uint32),
    }
    if record.draws is None:
        arrays["values"] = codes_SxK[kept_SxK]
    else:
        draws_SxK = np.take_along_axis(record.draws, order_SxK, axis=1)
        arrays["draws"] = draws_SxK[kept_SxK].astype(np.uint32)
        arrays["values"] = codes_SxK[kept_SxK & (draws_SxK == 0)]
    if record.draws is None and scales:
        arrays["log_sums"] = quantise(_log_tails(record, scales))
    return arrays


def _log_tails(record: StoredRecord, scales: tuple[float, ...]) -> np.ndarray:
    """Returns the log of the share that the absent entries have of the distribution at each scale, [scales, S]."""
    tails = []
    for scale, log_sum_S in zip(scales, record.log_sums.astype(np.float64), strict=True):
        mass_S = np.exp(_log_sum(scale, record.log_probs) - log_sum_S)
        with np.errstate(divide="ignore"):
            tails.append(np.log(np.clip(1 - mass_S, 0, 1)))
    return np.stack(tails)


def _log_sum(scale: float, log_probs_SxK: np.ndarray) -> np.ndarray:
    """Returns log sum_k exp(scale * log_probs), -inf where there is no entry, float64."""
    with np.errstate(divide="ignore"):
        return np.log(np.exp(scale * log_probs_SxK.astype(np.float64)).sum(axis=1))


def decode(stored: bytes, coding: Coding) -> StoredRecord:
    """Returns the record. Raises DamagedError unless these are the bytes that `encode` made with this coding."""
    digest, body = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    if digest != _digest(body):
        raise DamagedError("its digest does not match its content")
    try:
        length, top_k, index, packed = msgpack.unpackb(body)
        arrays = {name: Packed(*pair) for name, pair in zip(ARRAYS, packed, strict=True) if pair is not None}
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DamagedError(f"it is not a record: {error}") from error
    if not (length > 0 and top_k >= 0 and length * max(top_k, 1) <= LARGEST_COUNT):
        raise DamagedError(f"{length} positions of {top_k} entries")
    return _Decoder(length, top_k, index, arrays, coding).record()


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The packed arrays of a record and their common sizes."""

    length: int
    top_k: int
    index: int | None
    packed: dict[str, Packed]  # without those that are not there
    coding: Coding

    def unpack(self, name: str, count: int) -> np.ndarray:
        try:
            return _alphabet(name, self.coding).unpack(self.packed[name], count)
        except KeyError:
            raise DamagedError(f"it has no array {name}") from None
        except DamagedError as error:
            raise DamagedError(f"{name}: {error}") from error

    def ids_of(self, name: str, ranks: np.ndarray) -> np.ndarray:
        if ranks.size and ranks.max() >= self.coding.order.vocab_size:
            raise DamagedError(f"{name}: id number {ranks.max()} of {self.coding.order.vocab_size}")
        return self.coding.order.ids[ranks]

    def record(self) -> StoredRecord:
        n = self.length
        tokens = self.unpack("tokens", n)
        labels = self.unpack("labels", n) ^ np.append(tokens[1:], np.uint32(0))
        if "mask" in self.packed:
            mask = self.unpack("mask", n).astype(np.float32)
        else:
            mask = self.unpack("mask_weights", n).view(np.float32)
        entries = self.exact_entries() if self.coding.lossless else self.quantised_entries()
        offsets = np.cumsum(self.unpack("offsets", n)) if "offsets" in self.packed else None
        label_values = self.unpack("label_values", n) if "label_values" in self.packed else None
        return StoredRecord(
            self.ids_of("tokens", tokens),
            self.ids_of("labels", labels),
            mask,
            **entries,
            label_log_probs=None if label_values is None else self.log_probs("label_values", label_values),
            offsets=offsets,
            index=self.index,
        )

    def exact_entries(self) -> dict[str, Any]:
        n, k, scales = self.length, self.top_k, len(self.coding.scales)
        return {
            "ids": self.ids_of("ids", self.unpack("ids", n * k)).reshape(n, k),
            "log_probs": self.unpack("values", n * k).view(np.float32).reshape(n, k),
            "log_sums": self.unpack("log_sums", n * scales).view(np.float32).reshape(scales, n),
        }

    def quantised_entries(self) -> dict[str, Any]:
        n, k, scales = self.length, self.top_k, self.coding.scales
        counts_S = self.unpack("counts", n)
        if counts_S.max() > k:
            raise DamagedError(f"counts: {counts_S.max()} entries, where a position has at most {k}")
        stored_SxK = np.arange(k) < counts_S[:, None]
        gaps_SxK = np.zeros((n, k), np.int64)
        gaps_SxK[stored_SxK] = self.unpack("ids", int(counts_S.sum()))
        ranks_SxK = np.cumsum(gaps_SxK + stored_SxK, axis=1) - 1
        ids_SxK = np.where(stored_SxK, self.ids_of("ids", np.where(stored_SxK, ranks_SxK, 0)), 0)
        draws_SxK, tail_S = None, None
        if "draws" in self.packed:
            draws_SxK = np.zeros((n, k), np.uint32)
            draws_SxK[stored_SxK] = self.unpack("draws", int(counts_S.sum()))
            tail_S = -MEAN_STEP * self.unpack("tail_log_probs", n).astype(np.float32)
        exact_SxK = stored_SxK if draws_SxK is None else stored_SxK & (draws_SxK == 0)
        codes_SxK = np.zeros((n, k), np.uint16)
        codes_SxK[exact_SxK] = self.unpack("values", int(exact_SxK.sum()))
        log_probs_SxK = self.log_probs("values", codes_SxK)
        if draws_SxK is not None and tail_S is not None:
            log_probs_SxK = np.where(stored_SxK & ~exact_SxK, tail_S[:, None], log_probs_SxK)
        order_SxK = np.argsort(-log_probs_SxK, axis=1, kind="stable")
        arrays = [log_probs_SxK, ids_SxK] + ([] if draws_SxK is None else [draws_SxK])
        log_probs_SxK, ids_SxK, *draws = (np.take_along_axis(array, order_SxK, axis=1) for array in arrays)
        log_sums = np.zeros((len(scales), n), np.float32)
        if not draws and scales:
            log_tails = self.log_probs("log_sums", self.unpack("log_sums", len(scales) * n))
            for place, (scale, log_tail_S) in enumerate(zip(scales, log_tails.reshape(len(scales), n), strict=True)):
                rest_S = np.maximum(-np.expm1(log_tail_S), np.finfo(np.float32).tiny)
                log_sum_S = _log_sum(scale, log_probs_SxK) - np.log(rest_S)
                log_sums[place] = np.where(counts_S > 0, log_sum_S, 0)
        return {
            "ids": ids_SxK,
            "log_probs": log_probs_SxK,
            "log_sums": log_sums,
            "draws": draws[0] if draws else None,
            "tail_log_probs": tail_S,
        }

    def log_probs(self, name: str, codes: np.ndarray) -> np.ndarray:
        if codes.size and codes.max() > LARGEST:
            raise DamagedError(f"{name}: code {codes.max()}; the largest is {LARGEST}")
        return dequantise(codes)


def _alphabet(name: str, coding: Coding) -> Alphabet:
    """Returns how the numbers of an array are stored."""
    quantised = name == "label_values" or (name in ("values", "log_sums") and not coding.lossless)
    return CODES if quantised else NUMBERS


def tokens_hash(tokens: np.ndarray) -> bytes:
    """Returns the 8-byte BLAKE2b digest of tokens as little-endian int32."""
    return _digest(np.ascontiguousarray(tokens, "<i4").tobytes())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
