"""Records of cached teacher logits, from the paths in a configuration to the batches of a step.

    files -> unpacking -> index -> store (records, checks, mending) -> dataset (survey, manifest)
          -> loader (sampler, packing) -> Batch

Each module knows those to its left only. Nothing here touches a device.
"""

from kdjax.data.dataset import Dataset, open_dataset
from kdjax.data.loader import eval_batches, rows_in_epoch, train_batches
from kdjax.data.records import Record, RecordError

__all__ = ["Dataset", "Record", "RecordError", "eval_batches", "open_dataset", "rows_in_epoch", "train_batches"]
