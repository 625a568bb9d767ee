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

GROUP_ROWS = 64  # rows of a row group


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
    rows: list[dict[str, Any]] = []
    with explain_os_errors(path, "write this file"), pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = {name: [row[name] for row in rows] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
            rows.clear()

        for where, record in records:
            rows.append(_row(where, record, config, pa))
            if len(rows) == GROUP_ROWS:
                flush()
        if rows:
            flush()


def _row(where: str, record: StoredRecord, config: CompressionConfig, pa: Any) -> dict[str, Any]:
    learned_S = record.loss_mask > 0
    if not np.isin(record.loss_mask, (0, 1)).all():
        t = int(np.argmax(~np.isin(record.loss_mask, (0, 1))))
        raise UserError(
            f"{where}: loss_mask[{t}] = {record.loss_mask[t]:g}; DistillKit knows only positions that are learned or "
            "not: export to nemo instead"
        )
    values, ids = _filled(where, record, learned_S, config)
    row = {
        "input_ids": np.append(record.tokens, record.labels[-1]).astype(np.uint64),
        "labels": np.append(IGNORED, np.where(learned_S, record.labels, IGNORED)).astype(np.int64),
    }
    for name, octets in (
        ("compressed_logprobs", encode_values(values, config)),
        ("bytepacked_indices", pack(ids, config.id_bits)),
    ):
        offsets = np.arange(len(octets) + 1, dtype=np.int32) * octets.shape[1]
        row[name] = pa.ListArray.from_arrays(offsets, octets.reshape(-1))
    return row


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
