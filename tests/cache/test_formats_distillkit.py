"""DistillKit's compressed log-probabilities, against the arithmetic of its compressor, one number at a time."""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from foreign_files import VOCAB, Taught, distillkit_bits, run_import, sequence, sequences, stored

from kdjax.cache.__main__ import main
from kdjax.cache.formats.distillkit_codec import CompressionConfig, decode_values, encode_values, read_config
from kdjax.types import UserError

EXACT: dict[str, Any] = {"d": VOCAB, "k": 5, "exact_k": 5, "exact_dtype": "float32", "delta_encoding": False}
EXACT |= {"residual_bins": [], "polynomial_terms": None}
POLYNOMIAL = EXACT | {"k": 11, "exact_k": 3, "polynomial_terms": [0, 1, "sqrt"], "exact_dtype": "bfloat16"}
BINS = POLYNOMIAL | {
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 8, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 3, "num_elements": 4},
    ]
}
ONE_BIT = EXACT | {
    "exact_k": 2, "residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 2}],
}  # fmt: skip
DELTAS = BINS | {"delta_encoding": True, "exact_dtype": "float32", "normalize_t": True, "term_dtype": "float16"}
CONFIGS = {"exact": EXACT, "polynomial": POLYNOMIAL, "bins": BINS, "one bit": ONE_BIT, "deltas": DELTAS}


def dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def octets(values: Any, name: str) -> list[int]:
    return list(np.array(values, dtype(name)).tobytes())


def compress(values: list[float], config: dict[str, Any]) -> list[int]:
    """The bytes of one position: compress_monotonic_logprobs, without its tensors."""
    if config["delta_encoding"]:
        values = [values[0], *(b - a for a, b in itertools.pairwise(values))]
    exact, rest = values[: config["exact_k"]], values[config["exact_k"] :]
    out = octets(exact, config["exact_dtype"])
    terms = config["polynomial_terms"]
    if terms:
        n = len(rest)
        ts = [t / (n - 1) if config.get("normalize_t") else float(t) for t in range(n)]
        matrix = [[math.sqrt(t) if term == "sqrt" else t**term for term in terms] for t in ts]
        coefficients = np.linalg.lstsq(np.array(matrix), np.array(rest), rcond=None)[0]
        stored = np.array(coefficients, dtype(config.get("term_dtype", "float32")))
        out += list(stored.tobytes())
        rest = [
            y - sum(float(c) * x for c, x in zip(stored, xs, strict=True)) for y, xs in zip(rest, matrix, strict=True)
        ]
    first = 0
    for each in config["residual_bins"]:
        part = rest[first : first + each["num_elements"]]
        first += each["num_elements"]
        bits = each["element_bits"]
        half = 1 if bits == 1 else 2 ** (bits - 1)
        scale = np.array(max(map(abs, part)) / half or 1.0, dtype(each["scale_dtype"]))
        out += list(scale.tobytes())
        if bits == 1:
            codes = [round(min(max(y / float(scale), 0), 1)) for y in part]
        else:
            codes = [round(min(max(y / float(scale), -half), half - 1)) + half for y in part]
        out += distillkit_bits(codes, bits)
    return out


def id_bits(config: dict[str, Any]) -> int:
    return math.ceil(math.log2(config["d"]))


def write(directory: Path, given: list[Taught], config: dict[str, Any], **columns: Any) -> Path:
    """The columns of sample_logits_vllm.py, in row groups of two, and its compression_config.yaml."""
    directory.mkdir(exist_ok=True)
    table: dict[str, Any] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    for each in given:
        ids, values = each.top(config["k"])
        table["input_ids"].append(each.ids.tolist())
        table["compressed_logprobs"].append([compress(row, config) for row in values.tolist()])
        table["bytepacked_indices"].append([distillkit_bits(row, id_bits(config)) for row in ids.tolist()])
    table = {name: values for name, values in (table | columns).items() if values is not None}
    types = {name: pa.list_(pa.list_(pa.uint8())) for name in ("compressed_logprobs", "bytepacked_indices")}
    arrays = {name: pa.array(values, types.get(name)) for name, values in table.items()}
    pq.write_table(pa.table(arrays), directory / "data_0.parquet", row_group_size=2)
    (directory / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_what_the_arithmetic_encodes(name: str) -> None:
    config = CONFIGS[name]
    values = sequence(1, 13).top(config["k"])[1]
    packed = np.array([compress(row, config) for row in values.tolist()], np.uint8)
    ours = read(config)
    assert packed.shape[1] == ours.value_bytes
    found = decode_values(packed, ours)
    if name == "exact":
        np.testing.assert_array_equal(found, values.astype(np.float32))
    elif name == "one bit":  # the third and fourth are plus or minus the scale, their largest magnitude; the fifth is 0
        scale = np.abs(values[:, 2:4]).max(axis=1).astype(np.float32)
        np.testing.assert_allclose(found[:, 2:4], np.stack([-scale, -scale], 1), rtol=1e-6)
        np.testing.assert_array_equal(found[:, 4], 0)
    else:
        np.testing.assert_allclose(found[:, :3], values[:, :3], rtol=2**-8)
        if name != "polynomial":  # half a code of the first bin, summed up if it is a difference
            np.testing.assert_allclose(found[:, 3:6], values[:, 3:6], atol=0.03)


@pytest.mark.parametrize("name", CONFIGS)
def test_encodes_as_the_arithmetic_does(name: str) -> None:
    """The same bytes, apart from the last bits of the fit: decoded, the same values."""
    config = CONFIGS[name]
    values = sequence(2, 17).top(config["k"])[1]
    ours = read(config)
    theirs = np.array([compress(row, config) for row in values.tolist()], np.uint8)
    np.testing.assert_allclose(decode_values(encode_values(values, ours), ours), decode_values(theirs, ours), atol=2e-3)
    if name in ("exact", "one bit"):
        np.testing.assert_array_equal(encode_values(values, ours), theirs)


def read(config: dict[str, Any], directory: Path | None = None) -> CompressionConfig:
    import tempfile

    path = Path(directory or tempfile.mkdtemp()) / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return read_config(path)


def test_bits_go_from_the_most_significant() -> None:
    """open-instruct's test: 0b1010 and 0b0101 in four bits each are the byte 0b10100101."""
    assert distillkit_bits([0b1010, 0b0101], 4) == [0b10100101]


def test_config_alone_or_in_a_training_configuration(tmp_path: Path) -> None:
    alone = read(BINS, tmp_path)
    assert read({"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": BINS}}, tmp_path) == alone
    assert (alone.id_bits, alone.value_bytes, alone.id_bytes) == (7, 3 * 2 + 3 * 4 + (2 + 3) + (4 + 2), 10)
    assert CompressionConfig(2**17, 1, 1).id_bits == 17
    assert CompressionConfig(2**17 + 1, 1, 1).id_bits == 18
    again = read(yaml.safe_load(alone.to_yaml()), tmp_path)
    assert again == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": None}, "has no d, k and exact_k; give"),
        ({"k": 2}, "d = 97, k = 2, exact_k = 3 cannot be"),
        ({"exact_dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"polynomial_terms": ["sin"]}, "'sin' is neither a power nor one of sqrt, exp"),
        ({"polynomial_terms": None}, "k > exact_k needs polynomial_terms"),
        (
            {"residual_bins": [{"scale_dtype": "float32", "element_bits": 2, "num_elements": 9}]},
            "more than k - exact_k",
        ),
        ({"residual_bins": [{"bits": 2}]}, "unexpected keyword argument"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(POLYNOMIAL | change, tmp_path)


def test_import(tmp_path: Path) -> None:
    """The vocabulary size is the config's; row t is about token t + 1."""
    given = sequences(23, 1, 40, 7, 11)
    cache = run_import(tmp_path / "cache", write(tmp_path / "in", given, EXACT), lossless=True)
    assert cache.manifest.vocab_size == VOCAB
    assert cache.manifest.target_logits_scales == (1.0,)
    for record, each in zip(stored(cache), given, strict=True):
        ids, values = each.top(5)
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.labels, each.ids[1:])
        np.testing.assert_array_equal(record.ids, ids)
        np.testing.assert_array_equal(record.log_probs, values.astype(np.float32))
        np.testing.assert_array_equal(record.loss_mask, np.ones(len(ids)))


def test_import_of_a_fitted_polynomial(tmp_path: Path) -> None:
    """What is approximated is sorted, and no position has more than the whole probability."""
    given = sequences(60, 50)
    cache = run_import(tmp_path / "cache", write(tmp_path / "in", given, BINS), lossless=True)
    for record, each in zip(stored(cache), given, strict=True):
        assert (np.diff(record.log_probs, axis=1) <= 0).all()
        assert (np.exp(record.log_probs.astype(np.float64)).sum(axis=1) <= 1 + 1e-5).all()
        np.testing.assert_array_equal(np.sort(record.ids, axis=1), np.sort(each.top(11)[0], axis=1))
        truth = np.take_along_axis(each.log_probs, record.ids.astype(int), 1)
        assert np.abs(record.log_probs - truth).mean() < 0.02


def test_rounding_leaves_no_more_than_one(tmp_path: Path) -> None:
    """All 97 tokens in bfloat16 sum to more than 1 at some positions."""
    config = EXACT | {"k": VOCAB, "exact_k": VOCAB, "exact_dtype": "bfloat16"}
    given = sequence(5, 50)
    rounded = given.top(VOCAB)[1].astype(ml_dtypes.bfloat16).astype(float)
    assert np.exp(rounded).sum(axis=1).max() > 1.0005
    (record,) = stored(run_import(tmp_path / "cache", write(tmp_path / "in", [given], config), lossless=True))
    assert np.exp(record.log_probs.astype(float)).sum(axis=1).max() < 1 + 1e-6
    assert main(["verify", str(tmp_path / "cache")]) == 0


def test_labels_and_attention_mask(tmp_path: Path) -> None:
    """open-instruct's columns. The token after the last masked one is learned from its own row."""
    (given,) = sequences(30)
    labels = [-100] * 10 + given.ids[10:].tolist()
    attention = [1] * 28 + [0] * 3
    source = write(tmp_path / "in", [given], EXACT, labels=[labels], attention_mask=[attention])
    (record,) = stored(run_import(tmp_path / "cache", source, lossless=True))
    np.testing.assert_array_equal(record.loss_mask, [0] * 9 + [1] * 18 + [0] * 3)


def test_a_row_about_the_token_after_the_last(tmp_path: Path) -> None:
    """Packed sets may have a row for every token; the last is about a token that is not there."""
    (given,) = sequences(30)
    shorter = Taught(given.ids[:-1], given.log_probs)
    (record,) = stored(run_import(tmp_path / "cache", write(tmp_path / "in", [shorter], EXACT), lossless=True))
    np.testing.assert_array_equal(record.tokens, given.ids[:-2])
    np.testing.assert_array_equal(record.ids, given.top(5)[0][:-1])


def damaged(given: Taught, config: dict[str, Any], **columns: Any) -> dict[str, Any]:
    ids, values = given.top(config["k"])
    row = {
        "compressed_logprobs": [compress(each, config) for each in values.tolist()],
        "bytepacked_indices": [distillkit_bits(each, id_bits(config)) for each in ids.tolist()],
    }
    return {name: [change(row.get(name))] for name, change in columns.items()}


def with_id(rows: Any) -> Any:
    return [distillkit_bits([100, 1, 2, 3, 4], 7), *rows[1:]]


def with_nan(rows: Any) -> Any:
    return [[0, 0, 192, 127, *rows[0][4:]], *rows[1:]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"bytepacked_indices": with_id}, r"row 1: topk_token_ids\[0\]\[0\] = 100 is outside"),
        ({"compressed_logprobs": with_nan}, r"row 1: topk_logits\[0\]\[0\] = nan"),
        ({"compressed_logprobs": lambda rows: rows[:-2]}, r"compressed_logprobs has 21 rows, and input_ids 24 tokens"),
        ({"compressed_logprobs": lambda rows: [row[:-1] for row in rows]}, r"has 19 bytes a position.* means 20; give"),
        ({"input_ids": lambda _: [5]}, r"input_ids has 1 tokens; a record needs two"),
        ({"input_ids": lambda _: None}, r"input_ids is missing"),
        ({"labels": lambda _: [1, 2, 3]}, r"labels has 3 positions, and input_ids 24"),
    ],
)
def test_damaged_rows(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    given = sequence(0)
    source = write(tmp_path / "in", [given], EXACT, **damaged(given, EXACT, **columns))
    with pytest.raises(UserError, match=message):
        run_import(tmp_path / "cache", source)
    assert not (tmp_path / "cache").exists()


def test_another_config_is_refused(tmp_path: Path) -> None:
    """Of as many bytes, but differences read as values mean more than the whole probability."""
    for config in (EXACT, POLYNOMIAL):
        source = write(tmp_path / "in", sequences(20), config | {"delta_encoding": True})
        (source / "compression_config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(UserError, match=r"data_0.parquet, row 1: .* sums to \d"):
            run_import(tmp_path / "cache", source)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", sequences(20, 30), EXACT)
    path = source / "data_0.parquet"
    (source / "compression_config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"no compression_config.yaml beside it.*--compression-config FILE"):
        run_import(tmp_path / "cache", path)
    flags = {"compression_config": tmp_path / "config.yaml"}
    cache = run_import(tmp_path / "whole", path, **flags)
    assert len(cache) == 2
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"data_0.parquet: cannot be read as a parquet file .*copy it again"):
        run_import(tmp_path / "cache", path, **flags)
    legacy = pa.table(
        {"input_ids": [[1, 2]], "packed_indices": [[[1]]], "exact_values": [[[0.0]]], "coeffs": [[[0.0]]]}
    )
    pq.write_table(legacy, path)
    with pytest.raises(UserError, match=r"no column compressed_logprobs, .*DistillKit's legacy compression"):
        run_import(tmp_path / "cache", path, **flags)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[parquet\]'"):
        run_import(tmp_path / "cache", path, **flags)
