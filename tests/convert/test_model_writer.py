"""Model directories that the converters write: chunks, digests, files and provenance."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from models import assert_same_params, random_params

from kdjax.checkpoint import save_model
from kdjax.checkpoint.arrays import open_arrays
from kdjax.config import ModelConfig
from kdjax.convert import model_writer
from kdjax.convert.conversion import Conversion
from kdjax.convert.model_writer import write_model
from kdjax.convert.provenance import kdjax_version, read_provenance
from kdjax.convert.rules import copy
from kdjax.convert.tensors import tensor_in_memory
from kdjax.model import named_shapes
from kdjax.types import UserError

CONFIG = ModelConfig(layers=2, d_model=8, n_heads=2, n_groups=1, head_dim=4, d_ff=5, vocab_size=7, padded_vocab_size=9)


def flat(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns a nested dict's arrays by parameter name."""
    if not isinstance(params, dict):
        return {prefix[:-1]: params}
    return {name: array for key, value in params.items() for name, array in flat(value, f"{prefix}{key}/").items()}


def conversion(dtype: Any = np.float32, skipped: Sequence[str] = ()) -> Conversion:
    """Returns the conversion of random parameters that are stored as kdjax stores them, layer by layer."""
    arrays = {name: array.astype(dtype) for name, array in flat(random_params(CONFIG)).items()}
    tensors = {}
    for name, array in arrays.items():
        for layer in range(CONFIG.layers) if name.startswith("layers/") else [None]:
            part = array if layer is None else array[layer]
            tensors[name.replace("layers/", f"layers/{layer}/")] = tensor_in_memory(part)
    rules = [copy(name.replace("layers/", "layers/{i}/"), name) for name in arrays]
    dtypes = dict.fromkeys(arrays, np.dtype(dtype))
    return Conversion(CONFIG, named_shapes(CONFIG), dtypes, dict.fromkeys(skipped, 2), tensors, rules)


def test_what_is_written_is_what_save_model_writes(tmp_path: Path) -> None:
    write_model(tmp_path / "converted", conversion(), {})
    save_model(tmp_path / "saved", CONFIG, random_params(CONFIG))
    assert_same_params(tmp_path / "converted", tmp_path / "saved")
    first, second = (json.loads((tmp_path / name / "model_config.json").read_text()) for name in ("converted", "saved"))
    assert first == second


@pytest.mark.parametrize("chunk_bytes", [1, 64, 96, 32 * 2**20])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_chunks_hold_at_most_a_layer(
    chunk_bytes: int, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_writer, "CHUNK_BYTES", chunk_bytes)
    write_model(tmp_path / "model", conversion(dtype), {})
    stored = open_arrays(tmp_path / "model" / "params")
    for name, array in flat(random_params(CONFIG)).items():
        array = array.astype(dtype)
        assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(stored[name].read(), array)
        stacked = name.startswith("layers/")
        rest = array.shape[1:] if stacked else array.shape
        rows = min(rest[0], max(1, chunk_bytes // (int(np.prod(rest[1:])) * array.itemsize)))
        chunks = stored[name].store.chunk_layout.read_chunk.shape
        assert chunks == (*([1] if stacked else []), rows, *rest[1:]), name


def test_provenance(tmp_path: Path) -> None:
    """What the caller says, then the version, the vocabulary, what was skipped, and a digest of each parameter."""
    write_model(tmp_path / "model", conversion(skipped=["buffers"]), {"format": "some", "source": "where"})
    found = read_provenance(tmp_path / "model")
    leaves = found.pop("leaves")
    assert list(found.items()) == [
        ("format", "some"),
        ("source", "where"),
        ("kdjax_version", kdjax_version()),
        ("vocab_size", 7),
        ("padded_vocab_size", 9),
        ("skipped", {"buffers": 2}),
    ]
    for name, array in flat(random_params(CONFIG)).items():
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        assert leaves.pop(name) == {"dtype": "float32", "shape": list(array.shape), "sha256": digest}
    assert leaves == {}
    assert read_provenance(tmp_path) == {}
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance.json is not valid JSON: .*; convert the model again"):
        read_provenance(tmp_path)


def test_further_files(tmp_path: Path) -> None:
    (tmp_path / "vocab").write_text("a b")
    files = {"tokenizer/vocab.json": tmp_path / "vocab", "tokenizer/merges.txt": b"x", "huggingface/c.json": b"{}"}
    out = write_model(tmp_path / "model", conversion(), {}, files=files)
    assert out == tmp_path / "model"
    assert (out / "tokenizer" / "vocab.json").read_text() == "a b"
    assert (out / "tokenizer" / "merges.txt").read_bytes() == b"x"
    assert (out / "huggingface" / "c.json").read_bytes() == b"{}"


def test_an_existing_directory(tmp_path: Path) -> None:
    write_model(tmp_path / "model", conversion(), {"x": 1})
    with pytest.raises(UserError, match=r"model exists already"):
        write_model(tmp_path / "model", conversion(), {"x": 2})
    assert read_provenance(tmp_path / "model")["x"] == 1
    write_model(tmp_path / "model", conversion(), {"x": 2}, force=True)
    assert read_provenance(tmp_path / "model")["x"] == 2


def test_orbax_reads_it_and_its_warnings_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the warning that it is no OCDBT checkpoint is silenced, and only while it is written."""
    with caplog.at_level(logging.WARNING, "absl"):
        write_model(tmp_path / "model", conversion(ml_dtypes.bfloat16), {})
        assert "OCDBT" not in caplog.text
        logging.getLogger("absl").warning("no OCDBT")
        assert "no OCDBT" in caplog.text
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flat(checkpointer.restore(tmp_path / "model" / "params"))
    for name, array in flat(random_params(CONFIG)).items():
        np.testing.assert_array_equal(np.asarray(restored[name]), array.astype(ml_dtypes.bfloat16))
