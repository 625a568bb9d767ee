"""Files of tensor- and pipeline-parallel ranks are joined, and those that do not belong together are refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_writer as writer

from kdjax.config import ModelConfig
from kdjax.convert.checkpoint_files import list_files
from kdjax.convert.megatron.rank_reader import RankFiles, open_rank_files
from kdjax.convert.tensors import LazyTensor
from kdjax.types import UserError

CONFIG = ModelConfig(activation="swiglu")
NORM = "decoder.final_layernorm.weight"
QKV, FC1, FC2 = (
    f"decoder.layers.0.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)


def save(root: Path, name: str, content: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    writer.save(root / name, content)


def opened(root: Path) -> RankFiles:
    found = open_rank_files(list_files(root))
    assert found is not None
    return found


def read(root: Path, config: ModelConfig = CONFIG) -> dict[str, LazyTensor]:
    return opened(root).read_tensors(config)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt", "mp_rank_00_000/other.pt"),
        ("mp_rank_{tp:02d}_{pp}/model_rng.pt", "mp_rank_00_000/model_rng.pt.bak"),
        ("mp_rank_{tp:02d}_{pp:03d}/model_weights.ckpt", "x/mp_rank_09_009/model_weights.ckpt"),
        ("tp_rank_{tp:02d}_pp_rank_{pp:03d}/model_weights.ckpt", "tp_rank_00_pp_rank_009/x.ckpt"),
        ("tp_rank_{tp:02d}_pp_rank_{pp:03d}/model_optim_rng.pt", "pp_rank_009/model_optim_rng.pt"),
    ],
)
def test_names_of_rank_files(name: str, other: str, tmp_path: Path) -> None:
    """Column-parallel tensors are joined along rows, row-parallel ones along columns, stage by stage."""
    save(tmp_path, other, 0)
    for tp in range(2):
        for pp in range(3):
            save(
                tmp_path,
                name.format(tp=tp, pp=pp),
                {FC2: (10 * pp + tp) * ones(2, 3), QKV: (10 * pp + tp) * ones(1, 2)},
            )
    ranks = opened(tmp_path)
    assert (ranks.tensor_parallel, ranks.pipeline_parallel, len(ranks.chunks)) == (2, 3, 3)
    found = ranks.read_tensors(CONFIG)
    assert len(found) == 6
    for layer in range(3):
        row = [10 * layer] * 3 + [10 * layer + 1] * 3
        np.testing.assert_array_equal(found[FC2.replace("0", str(layer))].read(), [row, row])
        np.testing.assert_array_equal(found[QKV.replace("0", str(layer))].read()[:, 0], [10 * layer, 10 * layer + 1])


def test_one_file_and_none(tmp_path: Path) -> None:
    save(tmp_path, "x.pt", 0)
    assert open_rank_files(list_files(tmp_path)) is None
    save(tmp_path, "model_weights.ckpt", {NORM: ones(3), "extra": 3})
    ranks = opened(tmp_path)
    assert (ranks.tensor_parallel, ranks.pipeline_parallel) == (1, 1)
    assert {name: tensor.nbytes for name, tensor in ranks.read_tensors(CONFIG).items()} == {NORM: 12, "extra": 0}
    assert ranks.vocabulary_rows is None


def test_a_missing_rank(tmp_path: Path) -> None:
    for rank in ("00_000", "02_001"):
        save(tmp_path, f"mp_rank_{rank}/model_optim_rng.pt", {})
    missing = "tensor rank 0 of pipeline rank 1, tensor rank 1 of pipeline rank 0, tensor rank 1 of pipeline rank 1, "
    with pytest.raises(UserError, match=rf"the file of {missing}tensor rank 2 of pipeline rank 0 is missing beside it"):
        opened(tmp_path)


def test_files_that_are_no_rank_files(tmp_path: Path) -> None:
    save(tmp_path, "mp_rank_00/model_optim_rng.pt", [1])
    with pytest.raises(UserError, match=r"mp_rank_00/model_optim_rng.pt: holds a list, not a checkpoint's dict"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("content", "version", "format"),
    [
        ({"model": {}}, 0, "torch, tensor parallel 1, pipeline parallel 1, checkpoint version 0"),
        (
            {"model0": {}, "model1": {}},
            0,
            "torch, tensor parallel 1, pipeline parallel 1, 2 virtual stages, checkpoint version 0",
        ),
        ({}, 3, "torch, tensor parallel 1, pipeline parallel 1, checkpoint version 3"),  # NeMo's
        (
            {"checkpoint_version": 2.5, "model": {}},
            2.5,
            "torch, tensor parallel 1, pipeline parallel 1, checkpoint version 2.5",
        ),
    ],
)
def test_version_and_format(content: dict[str, Any], version: float, format: str, tmp_path: Path) -> None:
    save(tmp_path, "mp_rank_00/model_optim_rng.pt", content)
    assert (opened(tmp_path).version, opened(tmp_path).format) == (version, format)


def test_virtual_stages_are_in_the_models_order(tmp_path: Path) -> None:
    """All pipeline ranks' first chunks, then their second ones; the tenth comes after the ninth."""
    chunks = 11
    for pp in range(2):
        models = {f"model{chunk}": {FC2: (2 * chunk + pp) * ones(1, 1)} for chunk in reversed(range(chunks))}
        save(tmp_path, f"mp_rank_00_{pp:03d}/model_optim_rng.pt", models)
    found = read(tmp_path)
    values = [found[FC2.replace("0", str(layer))].read().item() for layer in range(2 * chunks)]
    assert values == list(range(2 * chunks))


def test_ranks_that_disagree_about_the_virtual_stages(tmp_path: Path) -> None:
    for tp, models in enumerate(({"model0": {}, "model1": {}}, {"model0": {}})):
        save(tmp_path, f"mp_rank_{tp:02d}/model_optim_rng.pt", models)
    with pytest.raises(UserError, match=r"mp_rank_00/.*: 'model1' is missing; the ranks disagree about the virtual"):
        opened(tmp_path)


@pytest.mark.parametrize("numbers", [(1,), (0, 2), (1, 2)])
def test_layers_must_be_numbered_from_0(numbers: tuple[int, ...], tmp_path: Path) -> None:
    model = {FC2.replace("0", str(number)): ones(1, 1) for number in numbers}
    save(tmp_path, "mp_rank_00/model_optim_rng.pt", {"model": model})
    with pytest.raises(UserError, match=r"its layers are \[.*\]; a rank numbers its layers from 0"):
        read(tmp_path)


def test_a_tensor_that_one_rank_does_not_have(tmp_path: Path) -> None:
    for tp, model in enumerate(({}, {FC2: ones(2, 2)})):
        save(tmp_path, f"mp_rank_{tp:02d}/model_optim_rng.pt", {"model": model})
    with pytest.raises(UserError, match=rf"{FC2} is not in the files of all tensor-parallel ranks"):
        read(tmp_path)


def test_gates_are_joined_before_up_projections(tmp_path: Path) -> None:
    """Only of fused, gated ones: each rank has [its gate; its up projection]."""
    for tp in range(2):
        save(
            tmp_path, f"mp_rank_{tp:02d}/model_optim_rng.pt", {"model": {FC1: np.array([[tp], [10 + tp]], np.float32)}}
        )
    assert read(tmp_path)[FC1].read().ravel().tolist() == [0, 1, 10, 11]
    assert read(tmp_path, ModelConfig(activation="gelu"))[FC1].read().ravel().tolist() == [0, 10, 1, 11]


@pytest.mark.parametrize("name", ["mlp.dense_h_to_4h_2.weight", "mlp.linear_fc1.weight_v"])
def test_separate_gates_are_joined_rank_by_rank(name: str, tmp_path: Path) -> None:
    gate = name.replace("_2", "").replace("_v", "_w")
    for tp in range(2):
        model = {f"decoder.layers.0.{gate}": (tp + 1) * ones(2, 1), f"decoder.layers.0.{name}": (tp + 11) * ones(2, 1)}
        save(tmp_path, f"mp_rank_{tp:02d}/model_optim_rng.pt", {"model": model})
    assert read(tmp_path)[FC1].read().ravel().tolist() == [1, 1, 2, 2, 11, 11, 12, 12]


def test_replicated_tensors_that_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0's is used, as in Megatron, and a warning names the other file."""
    for tp in range(3):
        model = {NORM: np.array([1, 2, 3 + (tp == 2)], np.float32)}
        save(tmp_path, f"mp_rank_{tp:02d}/model_optim_rng.pt", {"model": model})
    with caplog.at_level(logging.WARNING, "kdjax"):
        np.testing.assert_array_equal(read(tmp_path)[NORM].read(), [1, 2, 3])
    files = [f"{tmp_path}/mp_rank_{tp:02d}/model_optim_rng.pt" for tp in (0, 2)]
    assert caplog.messages == [f"{NORM} differs between {files[0]} and {files[1]}; the first is used"]


def test_vocabulary_rows_are_counted_over_the_ranks(tmp_path: Path) -> None:
    for tp in range(3):
        for pp in range(2):
            model = {"embedding.word_embeddings.weight": ones(4 + tp, 1)} if pp == 0 else {}
            save(tmp_path, f"mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt", {"model": model})
    assert opened(tmp_path).vocabulary_rows == 15
