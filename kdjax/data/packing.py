"""Packs records into rows, and writes rows into a `Batch`."""

import bisect
import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from kdjax.data.records import Record
from kdjax.types import Batch


def pack_rows(lengths: Iterable[int], sequence_length: int) -> list[tuple[int, ...]]:
    """Distributes records, given by their lengths, over rows of at most `sequence_length` tokens.

    Returns the record numbers of each row, in file order; rows are ordered by their first record. One pass of best fit:
    a record joins the row with the least room that still takes it (the one that has waited longest, if there are
    several) or starts a new row. Rows are looked up by their room, so the time is linear in the number of records.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # the keys of `open_rows`, ascending
    open_rows: dict[int, deque[int]] = {}  # by their room, the numbers of the rows that have that much
    for record, length in enumerate(lengths):
        assert 0 < length <= sequence_length, (record, length, sequence_length)
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), sequence_length
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].popleft()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(record)
        if room := room - length:
            if room not in open_rows:
                open_rows[room] = deque()
                bisect.insort(rooms, room)
            open_rows[room].append(row)
    return [tuple(row) for row in rows]


def empty_batch(
    rows: int, sequence_length: int, top_k: int, *, has_log_sum_exp: bool, packed: bool, weighted: bool = False
) -> Batch:
    """Returns a batch of padding: all arrays are 0, so that no position counts and every value is finite."""
    shape = (rows, sequence_length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        labels=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        topk_logits=np.zeros((*shape, top_k), np.float32),
        topk_token_ids=np.zeros((*shape, top_k), np.int32),
        log_sum_exp_logits=np.zeros(shape, np.float32) if has_log_sum_exp else None,
        positions=np.zeros(shape, np.int32) if packed else None,
        segment_ids=np.zeros(shape, np.int32) if packed else None,
        topk_weights=np.zeros((*shape, top_k), np.float32) if weighted else None,
    )


def fill_row(batch: Batch, row: int, records: Sequence[Record]) -> None:
    """Writes records one after another into a row of an empty batch.

    In a packed batch the nth record (from 0) gets segment id n + 1 and positions from 0; padding keeps segment id 0.
    """
    start = 0
    for number, record in enumerate(records):
        part = (row, slice(start, start + len(record)))
        for field in dataclasses.fields(Record)[:-1]:
            if (target := getattr(batch, field.name)) is not None:
                target[part] = getattr(record, field.name)
        if batch.positions is not None and batch.segment_ids is not None:
            batch.positions[part] = np.arange(len(record))
            batch.segment_ids[part] = number + 1
        start += len(record)
