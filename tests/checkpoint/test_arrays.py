"""Parts of stored arrays: any index, any layers, every way in which Orbax stores arrays, and damage."""

from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kdjax.checkpoint.arrays import open_arrays
from kdjax.types import UserError

STACK = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
TREE = {"layers": {"attn": {"kernel": STACK}}, "embed": np.arange(14).reshape(7, 2).astype(ml_dtypes.bfloat16)}


def save(directory: Path, **options: bool) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(directory, TREE)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("arrays") / "params")


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_every_way_of_storing(tmp_path: Path, use_ocdbt: bool, use_zarr3: bool) -> None:
    arrays = open_arrays(save(tmp_path / "params", use_ocdbt=use_ocdbt, use_zarr3=use_zarr3))
    assert arrays.keys() == {"layers/attn/kernel", "embed"}
    np.testing.assert_array_equal(arrays["layers/attn/kernel"].read(), STACK)
    np.testing.assert_array_equal(arrays["embed"].read(), TREE["embed"])
    assert arrays["embed"].read().dtype == arrays["embed"].dtype == ml_dtypes.bfloat16


def test_names_shapes_and_sizes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    found = {name: (a.name, a.shape, a.nbytes, a.directory) for name, a in open_arrays(Path("params")).items()}
    assert found == {
        "layers/attn/kernel": ("layers/attn/kernel", (4, 3, 5), 240, saved),
        "embed": ("embed", (7, 2), 28, saved),
    }


def test_any_part_of_any_layers(saved: Path) -> None:
    array = open_arrays(saved)["layers/attn/kernel"]
    rows, columns = slice(1, 3), slice(0, 2)
    for index in ((), (rows,), (rows, columns), (rows, columns, slice(2, 5))):
        part = array.read(index)
        assert part.flags.c_contiguous
        np.testing.assert_array_equal(part, STACK[index])
        picked = array.read(index, layers=[3, 0, 2])
        assert picked.flags.c_contiguous
        np.testing.assert_array_equal(picked, STACK[[3, 0, 2]][index])


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    for text in (None, "{", "{}"):
        if text is not None:
            (tmp_path / "_METADATA").write_text(text)
        with pytest.raises(UserError, match=rf"^{tmp_path} is not a complete Orbax checkpoint: "):
            open_arrays(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    directory = save(tmp_path / "params", use_ocdbt=False, use_zarr3=False)
    array = open_arrays(directory)["embed"]
    (chunk,) = (file for file in (directory / "embed").iterdir() if file.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match=r"params: embed cannot be read: "):
        array.read()
    (directory / "embed" / ".zarray").write_text("{")
    with pytest.raises(UserError, match=r"params: embed cannot be opened: "):
        open_arrays(directory)
