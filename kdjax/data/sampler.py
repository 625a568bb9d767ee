"""The order of records: a function of step and seed alone, whatever the processes, the mesh or the microbatch size."""

import functools

import numpy as np
from jaxtyping import Int


def global_indices(step: int, *, size: int, batch_size: int, shuffle: bool, seed: int) -> Int[np.ndarray, "B"]:
    """Returns the rows of the global batch of `step`, out of `size` rows, as int64.

    They are places step * B to (step + 1) * B - 1 of an endless sequence of epochs. Each epoch contains every row once,
    in file order or, with `shuffle`, in an order of its own drawn from (seed, epoch). A batch may span epochs.
    """
    places_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs_B, rows_B = np.divmod(places_B, size)
    if shuffle:
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            rows_B[here] = _order(size, seed, int(epoch))[rows_B[here]]
    return rows_B


@functools.lru_cache(maxsize=4)  # train and validation, each between two epochs
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of range(size), by sorting random bits that every NumPy version draws alike (NEP 19)."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(size)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
