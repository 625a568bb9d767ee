"""The order of records: a pure function of step and seed, whatever the processes, mesh or microbatch size."""

import functools

import numpy as np
from jaxtyping import Int


def global_indices(step: int, *, size: int, batch_size: int, shuffle: bool, seed: int) -> Int[np.ndarray, "B"]:
    """The rows of the global batch of `step`, int64.

    Positions step * B + (0 .. B-1) of an endless sequence of epochs of `size` rows: each epoch holds every
    row once, in file order or in an order of its own drawn from (seed, epoch). A batch may straddle epochs.
    """
    positions_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs_B, places_B = np.divmod(positions_B, size)
    if not shuffle:
        return places_B
    rows_B = np.empty_like(places_B)
    for epoch in np.unique(epochs_B):
        here = epochs_B == epoch
        rows_B[here] = _order(size, seed, int(epoch))[places_B[here]]
    return rows_B


@functools.lru_cache(maxsize=4)  # train and validation, each astride two epochs
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size). Sorts raw bits, which every NumPy version draws alike (NEP 19)."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
