"""Writes records as DistillKit's parquet files, with open-instruct's column `labels`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.cache.formats.distillkit import IGNORED, parquet
from kdjax.cache.formats.distillkit_codec import CompressionConfig, encode_values, pack
from kdjax.cache.statistics import log_probs
from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.types import UserError

GROUP_TOKENS = 2**16  # of a row group: what is held in memory


def file_name(number: int) -> str:
    """Returns the name of a file, as DistillKit numbers them."""
    return f"data_{number}.parquet"


def write_file(path: Path, records: Iterable[tuple[str, StoredRecord]], config: CompressionConfig) -> None:
    """Writes a file of records, each with where it came from. Raises UserError for one that does not fit."""
    pq = parquet()
    import pyarrow as pa

    octets = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.uint64()),
            "compressed_logprobs": octets,
            "bytepacked_indices": octets,
            "labels": pa.list_(pa.int64()),
        }
    )
    rows: list[dict[str, np.ndarray]] = []
    with explain_os_errors(path, "write this file"), pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = {name: _lists([row[name] for row in rows], pa) for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
            rows.clear()

        for where, record in records:
            rows.append(_row(where, record, config))
            if sum(len(row["labels"]) for row in rows) >= GROUP_TOKENS:
                flush()
        if rows:
            flush()


def _lists(rows: list[np.ndarray], pa: Any) -> Any:
    """Returns a column with a list in each row, of numbers or of equally long lists of them."""
    values = np.concatenate(rows)
    if values.ndim == 2:
        inner = pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], values.ravel())
    else:
        inner = pa.array(values)
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, rows)]).astype(np.int32), inner)


def _row(where: str, record: StoredRecord, config: CompressionConfig) -> dict[str, np.ndarray]:
    learned_S = record.loss_mask > 0
    if not np.isin(record.loss_mask, (0, 1)).all():
        t = int(np.argmax(~np.isin(record.loss_mask, (0, 1))))
        raise UserError(
            f"{where}: loss_mask[{t}] = {record.loss_mask[t]:g}; DistillKit knows only positions that are learned or "
            "not: export to nemo instead"
        )
    values, ids = _filled(where, record, learned_S, config)
    return {
        "input_ids": np.append(record.tokens, record.labels[-1]).astype(np.uint64),
        "compressed_logprobs": encode_values(values, config),
        "bytepacked_indices": pack(ids, config.id_bits),
        "labels": np.append(IGNORED, np.where(learned_S, record.labels, IGNORED)).astype(np.int64),
    }


def _filled(
    where: str, record: StoredRecord, learned_S: np.ndarray, config: CompressionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities and ids [S, k]. Positions that are not learned get even ones of the first ids."""
    k, stored = config.k, record.ids.shape[1]
    values = np.full((len(record), k), -np.inf)
    ids = np.zeros((len(record), k), np.int64)
    values[:, :stored] = log_probs(record)[:, :k]
    ids[:, :stored] = record.ids[:, :k]
    values[~learned_S], ids[~learned_S] = -np.log(config.d), np.arange(k)
    absent = values == -np.inf
    if absent.any() and (config.exact_k < k or config.delta_encoding):
        t = int(np.argmax(absent.any(axis=1)))
        raise UserError(
            f"{where}: position {t} has {k - absent[t].sum()} entries, and polynomials and differences need all {k}; "
            "export with exact_k = k and delta_encoding: false, or with a smaller k"
        )
    return values, ids
