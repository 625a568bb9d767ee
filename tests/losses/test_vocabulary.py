"""Which columns a shard of the vocabulary holds, and which of them a position is taught."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from kdjax.losses.objective import Objective, Supervision
from kdjax.losses.vocabulary import Vocabulary, taught_rows

INF = np.inf


def test_a_whole_vocabulary() -> None:
    vocabulary = Vocabulary(7)
    assert vocabulary.shards == 1
    assert vocabulary.first(7) == 0
    assert vocabulary.n_valid(7) is None
    assert vocabulary.n_valid(9) == 7
    ids = jnp.array([-8, -1, 0, 6, 7, 8, 100])
    assert vocabulary.holds(ids).tolist() == [False, False, True, True, False, False, False]
    assert vocabulary.columns(ids, 9).tolist() == [9, 9, 0, 6, 9, 9, 9]
    assert vocabulary.columns(ids, 9).dtype == jnp.int32


def test_shards_of_a_vocabulary() -> None:
    """Eight ids and the padding 8..11 on six shards of two columns; the first axis is the major one."""
    vocabulary = Vocabulary(8, ("major", "minor"))
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), vocabulary.axis_names, axis_types=(AxisType.Auto,) * 2)

    def here() -> Any:
        columns = vocabulary.columns(jnp.array([0, 3, 7, 8, -1]), 2)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], (vocabulary.first(2), vocabulary.n_valid(2), columns))

    assert jax.shard_map(lambda: jnp.int32(vocabulary.shards), mesh=mesh, in_specs=(), out_specs=P())() == 6
    first, n_valid, columns = jax.shard_map(here, mesh=mesh, in_specs=(), out_specs=P(vocabulary.axis_names))()
    assert first.tolist() == [0, 2, 4, 6, 8, 10]
    assert n_valid.tolist() == [2, 2, 2, 2, 0, 0]
    expected = np.full((6, 5), 2)
    expected[0, 0], expected[1, 1], expected[3, 2] = 0, 1, 1
    np.testing.assert_array_equal(columns, expected)


@pytest.mark.parametrize(
    ("settings", "width", "expected"),
    [
        ({}, 5, [3, 5, 5, 0, 5]),  # the second entry is absent, the third no id; no term reads the label
        ({"sft_loss_weight": 0.1}, 5, [3, 5, 5, 0, 4]),
        ({"sft_loss_weight": 0.1}, 6, [3, 6, 6, 0, 4]),  # the last column is padding
        ({"cross_tokenizer": "rank_match"}, 5, [2, 5, 0, 3, 5]),
        ({"cross_tokenizer": "rank_match"}, 6, [2, 6, 0, 3, 6]),
    ],
)
def test_taught_columns(settings: dict[str, Any], width: int, expected: list[int]) -> None:
    logits = jnp.array([2.0, 0.0, 9.0, 1.0, 3.0, 99.0])[:width]  # ranked: 2, 4, 0, 3, 1
    supervision = Supervision(jnp.array([1.0, -INF, 0.5, 0.2]), jnp.array([3, 1, -2, 0]), jnp.array(4))
    rows = taught_rows(Objective(**settings), Vocabulary(5), logits, supervision)
    assert rows.logits is logits
    assert rows.columns.tolist() == expected
    assert rows.n_valid == (None if width == 5 else 5)
