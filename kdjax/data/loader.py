"""Batches for the steps: the sampler's rows, read and assembled ahead of time by Grain's threads."""

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
    """Rows that show every record once: records, or packed rows of them."""
    return len(dataset) if dataset.rows is None else len(dataset.rows)


def train_batches(
    dataset: Dataset, data: DataConfig, *, global_size: int, start_step: int, stop_step: int, rows: slice
) -> Iterator[Batch]:
    """The batches of steps start_step .. stop_step - 1: of each global batch the `rows` of this process.

    What a step sees depends on the step alone, so a run taken up at any step goes on as if never interrupted.
    Errors met while reading ahead are raised from the iterator, as the UserError they are.
    """
    size = rows_in_epoch(dataset)

    def load(step: int) -> Batch:
        numbers_B = global_indices(step, size=size, batch_size=global_size, shuffle=data.shuffle, seed=data.seed)
        return _load(dataset, numbers_B[rows])

    return _read_ahead(grain.MapDataset.range(start_step, stop_step).map(load), data)


def eval_batches(
    dataset: Dataset, data: DataConfig, *, global_size: int, max_batches: int | None, rows: slice
) -> Iterator[Batch]:
    """Every row once, in file order (of `max_batches` global batches at most): this process's `rows` of each.

    The last batch is filled up with rows that weigh nothing, so every row counts and every shape is the same.
    """
    size = rows_in_epoch(dataset)
    batches = -(-size // global_size)
    batches = batches if max_batches is None else min(batches, max_batches)

    def load(number: int) -> Batch:
        numbers_B = np.arange(number * global_size, (number + 1) * global_size)
        return _load(dataset, numbers_B[rows])

    return _read_ahead(grain.MapDataset.range(batches).map(load), data)


def _load(dataset: Dataset, numbers_B: np.ndarray) -> Batch:
    """The rows of these numbers; a number beyond the last row gives a row of padding."""
    is_packed = dataset.rows is not None
    batch = empty_batch(
        len(numbers_B),
        dataset.data.sequence_length,
        dataset.top_k,
        has_log_sum_exp=dataset.has_log_sum_exp,
        packed=is_packed,
    )
    for row, number in enumerate(numbers_B.tolist()):
        if number < rows_in_epoch(dataset):
            members = (number,) if dataset.rows is None else dataset.rows[number]
            fill_row(batch, row, [dataset[i] for i in members])
    return batch


def _read_ahead(batches: Any, data: DataConfig) -> Iterator[Batch]:
    """Iterate a Grain dataset with data.read_threads threads, data.prefetch batches ahead."""
    options = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch)
    return iter(batches.to_iter_dataset(options))
