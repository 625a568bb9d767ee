"""Packing: every record in one row, no row too long, and rows nearly full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.data.packing import pack_rows


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 64))
@settings(max_examples=60, deadline=None)
def test_packing_holds_every_record_once_and_overfills_no_row(lengths, sequence_length):
    rows = pack_rows(lengths, sequence_length)
    assert sorted(record for row in rows for record in row) == list(range(len(lengths)))
    assert all(list(row) == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    fill = [sum(lengths[record] for record in row) for row in rows]
    assert all(0 < tokens <= sequence_length for tokens in fill)
    assert sum(tokens <= sequence_length / 2 for tokens in fill) <= 1  # two such rows would have been packed into one


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([8, 8], [(0,), (1,)]),
        ([6, 4, 5, 3, 2], [(0, 4), (1,), (2, 3)]),  # the row with the least room that fits
        ([6, 6, 6, 2, 2, 1, 1], [(0, 3), (1, 4), (2, 5, 6)]),  # of equals the one that has waited longest
        ([5, 6, 1, 2], [(0, 3), (1, 2)]),
        ([7, 1, 8, 1], [(0, 1), (2,), (3,)]),  # full rows are closed
    ],
)
def test_packing_is_best_fit(lengths, rows):
    assert pack_rows(lengths, 8) == rows


@pytest.mark.parametrize("length", [0, 9])
def test_lengths_outside_the_row_are_a_bug(length):
    with pytest.raises(AssertionError):
        pack_rows([length], 8)


def test_large_sets_are_packed_tightly():
    lengths = np.random.default_rng(0).integers(1, 2048, 30_000).tolist()
    rows = pack_rows(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.98
