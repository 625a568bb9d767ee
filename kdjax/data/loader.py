"""Batches for training and validation, read and assembled ahead of time by Grain's threads."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from kdjax.config import DataConfig
from kdjax.data.dataset import Dataset
from kdjax.data.packing import empty_batch, fill_row
from kdjax.data.sampler import global_indices
from kdjax.types import Batch


def rows_in_epoch(dataset: Dataset) -> int:
    """Returns the number of rows that show every record once: of records, or with data.pack of packed rows."""
    return len(dataset) if dataset.rows is None else len(dataset.rows)


def train_batches(
    dataset: Dataset, data: DataConfig, *, global_size: int, start_step: int, stop_step: int, rows: slice
) -> Iterator[Batch]:
    """Yields the batches of steps start_step to stop_step - 1: the `rows` of each global batch that this process reads.

    The contents of a batch depend on the step alone, so that a run resumed at any step continues as if it had never
    been interrupted. Errors met while reading ahead are raised from the iterator as the UserError they are.
    """
    size = rows_in_epoch(dataset)

    def load(step: int) -> Batch:
        numbers_B = global_indices(step, size=size, batch_size=global_size, shuffle=data.shuffle, seed=data.seed)
        return _load(dataset, numbers_B[rows])

    return _read_ahead(grain.MapDataset.range(start_step, stop_step).map(load), data)


def eval_batches(
    dataset: Dataset, data: DataConfig, *, global_size: int, max_batches: int | None, rows: slice
) -> Iterator[Batch]:
    """Yields every row once, in file order, up to `max_batches` global batches: the `rows` of each for this process.

    The last batch is filled up with rows of weight 0, so that every row counts and all batches have one shape.
    """
    size = rows_in_epoch(dataset)
    batches = -(-size // global_size)
    batches = batches if max_batches is None else min(batches, max_batches)

    def load(number: int) -> Batch:
        numbers_B = np.arange(number * global_size, (number + 1) * global_size)
        return _load(dataset, numbers_B[rows])

    return _read_ahead(grain.MapDataset.range(batches).map(load), data)


def _load(dataset: Dataset, numbers_B: np.ndarray) -> Batch:
    """Reads the rows with these numbers; a number beyond the last row gives a row of padding."""
    batch = empty_batch(
        len(numbers_B),
        dataset.data.sequence_length,
        dataset.top_k,
        has_log_sum_exp=dataset.has_log_sum_exp,
        packed=dataset.rows is not None,
        weighted=dataset.has_weights,
    )
    for row, number in enumerate(numbers_B.tolist()):
        if number < rows_in_epoch(dataset):
            members = (number,) if dataset.rows is None else dataset.rows[number]
            fill_row(batch, row, [dataset[i] for i in members])
    return batch


def _read_ahead(batches: Any, data: DataConfig) -> Iterator[Batch]:
    """Iterates over a Grain dataset with data.read_threads threads that keep data.prefetch batches ready."""
    options = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch)
    return iter(batches.to_iter_dataset(options))
