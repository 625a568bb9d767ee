"""MaxText's ArrayRecord files of tf.train.Example."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python import array_record_module
from foreign_files import VOCAB, Taught, run_import, sequence, sequences, stored, tf_example

from kdjax.cache.formats.tf_example import NotAnExampleError, parse_example
from kdjax.types import UserError

K = 5


def write(path: Path, rows: Sequence[bytes]) -> Path:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    return path


def features(given: Taught, k: int = K, with_targets: bool = True, **changes: Any) -> dict[str, np.ndarray]:
    """A row as background_process_and_write makes it; raw logits are far from 0."""
    ids, values = given.top(k)
    row = {
        "inputs": given.ids[:-1],
        "top_k_logits": (values + 700).astype(np.float32),
        "top_k_indices": ids,
        "sequence_hash": np.array([-(2**62) - 5]),
        "inputs_position": np.arange(len(ids)),
        "inputs_segmentation": np.ones(len(ids), np.int64),
        "targets_segmentation": np.ones(len(ids), np.int64),
    }
    row |= {"targets": given.ids[1:]} if with_targets else {}
    return {name: value for name, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize("packed", [True, False])
def test_parses_examples(packed: bool) -> None:
    """Compared with a writer of the wire format; negative numbers take ten bytes."""
    given = {
        "ids": np.array([0, 1, 127, 128, 300, 2**31, -1, -(2**63), 2**63 - 1]),
        "values": np.array([0.5, -3.25, np.inf], np.float32),
        "none": np.zeros(0, np.int64),
    }
    found = parse_example(tf_example(given, packed))
    np.testing.assert_array_equal(found["ids"], given["ids"])
    np.testing.assert_array_equal(found["values"], given["values"])
    assert not packed or not found["none"].size


def test_bytes_features_are_left_out() -> None:
    text = b"\x0a\x0f\x0a\x0d\x0a\x01a\x12\x08\x0a\x06\x0a\x04text"
    assert parse_example(text) == {}


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_cut_example_is_refused(cut: int) -> None:
    data = tf_example({"ids": np.array([300, 5]), "values": np.array([1.0, 2.0], np.float32)})
    with pytest.raises(NotAnExampleError):
        parse_example(data[:-cut] if cut < len(data) else b"\x08\x01")


def test_import(tmp_path: Path) -> None:
    given = sequences(23, 1, 17)
    path = write(tmp_path / "teacher_top_k_part_00000_host_000.array_record", [tf_example(features(g)) for g in given])
    cache = run_import(tmp_path / "cache", path, vocab_size=VOCAB, lossless=True)
    assert cache.manifest.target_logits_scales == ()  # MaxText stores no logsumexp
    for record, each in zip(stored(cache), given, strict=True):
        ids, values = each.top(K)
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.labels, each.ids[1:])
        np.testing.assert_array_equal(record.ids, ids)
        np.testing.assert_array_equal(record.log_probs, (values + 700).astype(np.float32))


def test_quantised_values_are_renormalised(tmp_path: Path) -> None:
    """Raw logits beyond the range of exp, quantised: the error of p is that of the codes, half a step."""
    given = sequence(0)
    path = write(tmp_path / "a.array_record", [tf_example(features(given))])
    (record,) = stored(run_import(tmp_path / "cache", path, vocab_size=VOCAB))
    values = given.top(K)[1]
    p = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(record.log_probs), p, atol=1 / 512 + 1e-4)


def test_without_targets_the_next_input_is_the_label(tmp_path: Path) -> None:
    given = sequence(1, 19)
    row = features(given, with_targets=False, inputs_segmentation=None, targets_segmentation=None)
    (record,) = stored(
        run_import(tmp_path / "cache", write(tmp_path / "a.array_record", [tf_example(row)]), vocab_size=VOCAB)
    )
    np.testing.assert_array_equal(record.loss_mask, [1] * 18 + [0])
    np.testing.assert_array_equal(record.labels[:-1], given.ids[1:-1])


def test_each_segment_is_a_record(tmp_path: Path) -> None:
    """Two texts and padding in one row, and a row of padding alone."""
    a, b = sequences(9, 6)
    parts = [features(each) for each in (a, b)]
    row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in row:
        row[name] = np.append(row[name], np.zeros(3 * (K if name.startswith("top_k") else 1), row[name].dtype))
    row["inputs_segmentation"] = np.array([1] * 9 + [2] * 6 + [0] * 3)
    row["targets_segmentation"] = np.array([1] * 9 + [2] * 5 + [0] * 4)
    empty = {name: np.zeros_like(value) for name, value in row.items()}
    path = write(tmp_path / "a.array_record", [tf_example(empty), tf_example(row)])
    records = list(stored(run_import(tmp_path / "cache", path, vocab_size=VOCAB, lossless=True)))
    for record, each in zip(records, (a, b), strict=True):
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.ids[record.loss_mask > 0], each.top(K)[0][record.loss_mask > 0])
    np.testing.assert_array_equal(records[1].loss_mask, [1] * 5 + [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": None}, r"row 2: no feature inputs; a row needs"),
        ({"top_k_indices": np.arange(3)}, r"inputs has 23 tokens, top_k_logits 115 values and top_k_indices 3"),
        ({"targets": np.arange(3)}, r"targets has 3 positions, inputs has 23"),
        ({"inputs": np.full(23, 2**40)}, r"inputs must hold 32-bit integers"),
        ({"inputs": np.full(23, 1.5, np.float32)}, r"inputs must hold 32-bit integers"),
        ({"targets": np.full(23, 97)}, r"labels\[0\] = 97 is outside"),
        ({"top_k_indices": np.full(115, 97)}, r"topk_token_ids\[0\]\[0\] = 97 is outside"),
        ({"top_k_logits": np.full(115, np.nan, np.float32)}, r"topk_logits\[0\]\[0\] = nan"),
    ],
)
def test_damaged_rows(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rows = [tf_example(features(sequence(0))), tf_example(features(sequence(1), **changes))]
    path = write(tmp_path / "a.array_record", rows)
    with pytest.raises(UserError, match=message):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    assert not (tmp_path / "cache").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Pickles, which older versions of MaxText wrote, run code when they are read, so they are not."""
    path = write(tmp_path / "a.array_record", [pickle.dumps({"tokens": [1]})])
    with pytest.raises(UserError, match=r"a.array_record: holds pickles of whole batches.*run code"):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    path = write(tmp_path / "b.array_record", [b"no example"])
    with pytest.raises(UserError, match=r"b.array_record, row 1: not a tf.train.Example"):
        run_import(tmp_path / "cache", path, vocab_size=VOCAB)
    (tmp_path / "c.array_record").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"c.array_record: (cannot be read as an ArrayRecord|holds no record)"):
        run_import(tmp_path / "cache", tmp_path / "c.array_record", vocab_size=VOCAB)


def test_duplicates_and_disorder_are_repaired(tmp_path: Path) -> None:
    given = sequence(2)
    ids, values = given.top(K)
    row = features(given, top_k_logits=values[:, ::-1].astype(np.float32), top_k_indices=ids[:, ::-1])
    (record,) = stored(
        run_import(
            tmp_path / "cache", write(tmp_path / "a.array_record", [tf_example(row)]), vocab_size=VOCAB, lossless=True
        )
    )
    np.testing.assert_array_equal(record.ids, ids)
    twice = ids.copy()
    twice[:, 4] = twice[:, 0]
    row = features(given, top_k_indices=twice, top_k_logits=values.astype(np.float32))
    (record,) = stored(
        run_import(
            tmp_path / "other", write(tmp_path / "b.array_record", [tf_example(row)]), vocab_size=VOCAB, lossless=True
        )
    )
    np.testing.assert_allclose(record.log_probs[:, 0], np.logaddexp(values[:, 0], values[:, 4]), rtol=1e-5)
    assert (record.log_probs[:, 4] == -np.inf).all()
