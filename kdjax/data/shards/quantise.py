"""Probabilities as small integers ("codes"), with errors that are bounded everywhere.

    code 0                no probability (log p = -inf)
    code c in 1 .. 48     log p = log 2^-14 - (48 - c) / 4
    code c in 48 .. 172   sqrt(p) = 1/128 + (c - 48) / 512
    code c in 172 .. 412  p = 1/16 + (c - 172) / 256

The middle range is evenly spaced in sqrt(p), where every code costs the same: an error ds of sqrt(p) adds 2 ds^2 nats
to the Kullback-Leibler divergence, on average (1/512)^2 / 6 for each entry. The upper range is evenly spaced in p, so
that no probability is off by more than 1/512; the lower one in log p, so that no logarithm is off by more than 1/4
anywhere down to p = 5e-10, below which p counts as 5e-10.
"""

import numpy as np
from jaxtyping import Float, UInt

from kdjax.data.shards.symbols import Alphabet

LOW, HIGH, LARGEST = 48, 172, 412  # the codes at which ranges meet, and the code of p = 1
LOG_STEP, ROOT_STEP, STEP = 1 / 4, 1 / 512, 1 / 256
LOW_ROOT, HIGH_P = 1 / 128, 1 / 16  # sqrt(p) and p there
LOW_LOG = 2 * np.log(LOW_ROOT)


def _log_probs() -> np.ndarray:
    """Returns the log-probability of each code, float32."""
    codes = np.arange(LARGEST + 1)
    low = LOW_LOG - (LOW - codes) * LOG_STEP
    middle = 2 * np.log(LOW_ROOT + np.maximum(codes - LOW, 0) * ROOT_STEP)
    high = np.log(HIGH_P + np.maximum(codes - HIGH, 0) * STEP)
    table = np.select([codes <= LOW, codes <= HIGH], [low, middle], high)
    table[0] = -np.inf
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


LOG_PROBS = _log_probs()
# A symbol for each code up to HIGH, above it one for 16 neighbours, which are about equally frequent.
CODES = Alphabet(
    np.concatenate([np.arange(HIGH), np.arange(HIGH, LARGEST + 1, 16)]),
    np.concatenate([np.zeros(HIGH, np.int64), np.full(16, 4)]),
)


def quantise(log_probs: Float[np.ndarray, "..."]) -> UInt[np.ndarray, "..."]:
    """Returns the nearest codes of log-probabilities, uint16. Those above 0 by rounding count as 0."""
    log_probs = np.minimum(log_probs.astype(np.float64), 0)
    p = np.exp(log_probs)
    with np.errstate(invalid="ignore"):
        low = np.maximum(LOW + (log_probs - LOW_LOG) / LOG_STEP, 1)
    middle = LOW + (np.sqrt(p) - LOW_ROOT) / ROOT_STEP
    high = HIGH + (p - HIGH_P) / STEP
    codes = np.rint(np.select([log_probs < LOW_LOG, p < HIGH_P], [low, middle], high))
    return np.where(log_probs == -np.inf, 0, codes).astype(np.uint16)


def dequantise(codes: UInt[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns the log-probabilities of codes, float32."""
    return LOG_PROBS[codes]
