"""Records of cached teacher logits, from the configured paths to the batches of a step.

    files (paths, decompress, index, scratch) -> store (records, checks, repair) -> dataset (survey, manifest)
          -> loader (sampler, packing) -> Batch

Each module imports only from those before it. Nothing here touches a device.
"""

from kdjax.data.dataset import Dataset, open_dataset
from kdjax.data.loader import eval_batches, rows_in_epoch, train_batches
from kdjax.data.records import Record, RecordError

__all__ = ["Dataset", "Record", "RecordError", "eval_batches", "open_dataset", "rows_in_epoch", "train_batches"]
