"""A checkpoint is found wherever Megatron and NeMo put it, and what it states comes from the file that counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_writer as writer
import yaml

from kdjax.convert.megatron.checkpoint import open_checkpoint
from kdjax.convert.megatron.parameter_names import by_name, canonical_name, merge_gate_and_up
from kdjax.convert.tensors import tensor_in_memory
from kdjax.types import UserError

ARRAYS = {"embedding.word_embeddings.weight": np.zeros((6, 2), np.float32)}
ARGS = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 2}
NEMO = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
PROVIDER = {"num_layers": 5, "hidden_size": 8, "num_attention_heads": 2, "activation_func": "gelu"}


def save_yaml(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def common(**content: Any) -> Callable[[Path], None]:
    return lambda root: writer.save_distributed(root, ARRAYS, content)


def layers(root: Path) -> tuple[int, str]:
    """Returns the layers that a checkpoint states, and where."""
    found = open_checkpoint(root).stated["layers"]
    return found.value, found.origin


def test_args_come_before_yaml(tmp_path: Path) -> None:
    common(args=writer.namespace(**ARGS), iteration=7)(tmp_path / "a")
    save_yaml(tmp_path / "a" / "model_config.yaml", NEMO)
    assert layers(tmp_path / "a") == (3, "args: num_layers 3")
    assert (open_checkpoint(tmp_path / "a").iteration, open_checkpoint(tmp_path / "a").format) == (7, "torch_dist")
    common(args=ARGS)(tmp_path / "b")  # a plain dict will do
    assert layers(tmp_path / "b") == (3, "args: num_layers 3")
    assert open_checkpoint(tmp_path / "b").iteration is None
    common()(tmp_path / "c")
    save_yaml(tmp_path / "c" / "model_config.yaml", NEMO)
    save_yaml(tmp_path / "c" / "run_config.yaml", {"model": PROVIDER})
    assert layers(tmp_path / "c") == (4, "model_config.yaml: num_layers 4")


@pytest.mark.parametrize("weights", ["", "weights", "model_weights"])
@pytest.mark.parametrize("place", ["", "iter_0000007"])
def test_weights_and_configurations_in_their_directories(weights: str, place: str, tmp_path: Path) -> None:
    """The configuration lies beside the weights' directory, or at the top."""
    common()(tmp_path / "a" / "iter_0000007" / weights)
    save_yaml(tmp_path / "a" / place / "run_config.yaml", {"model": PROVIDER})
    assert layers(tmp_path / "a") == (5, "run_config.yaml: num_layers 5")
    save_yaml(tmp_path / "a" / place / "run_config.yaml", {"train": {}})
    save_yaml(tmp_path / "a" / place / "context" / "model.yaml", PROVIDER | {"num_layers": 6})
    assert layers(tmp_path / "a") == (6, "context/model.yaml: num_layers 6")
    save_yaml(tmp_path / "a" / place / "context" / "model.yaml", {"config": PROVIDER | {"num_layers": 7}})
    assert layers(tmp_path / "a") == (7, "context/model.yaml: num_layers 7")


def test_the_padded_vocabulary_is_the_embeddings_unless_it_is_stated(tmp_path: Path) -> None:
    common(args=writer.namespace(**ARGS))(tmp_path / "a")
    found = open_checkpoint(tmp_path / "a").stated["padded_vocab_size"]
    assert (found.value, found.origin) == (6, "rows of embedding.word_embeddings.weight")
    common(args=writer.namespace(**ARGS, padded_vocab_size=8))(tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").stated["padded_vocab_size"].value == 8
    writer.save_distributed(tmp_path / "c", {"x": np.zeros(1)}, {})
    assert open_checkpoint(tmp_path / "c").stated == {}
    (tmp_path / "d" / "mp_rank_00").mkdir(parents=True)
    writer.save(
        tmp_path / "d" / "mp_rank_00" / "model_optim_rng.pt", {"args": writer.namespace(**ARGS), "model": ARRAYS}
    )
    assert open_checkpoint(tmp_path / "d").stated["padded_vocab_size"].value == 6


@pytest.mark.parametrize("content", ["7", "7\n", "release"])
def test_the_tracker_names_the_iteration(content: str, tmp_path: Path) -> None:
    for number, name in enumerate(("iter_0000006", "iter_0000007", "iter_0000008", "release"), 6):
        common(iteration=number)(tmp_path / "a" / name)
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").write_text(content)
    assert open_checkpoint(tmp_path / "a").iteration == (9 if content == "release" else 7)
    writer.save(tmp_path / "a" / "latest_train_state.pt", {"step": np.array(8, np.int32)})
    (tmp_path / "a" / "latest_checkpointed_iteration.txt").unlink()
    assert open_checkpoint(tmp_path / "a").iteration == 8
    writer.save(tmp_path / "a" / "latest_train_state.pt", {"step": 6})
    assert open_checkpoint(tmp_path / "a").iteration == 6


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_parallelism_that_the_files_do_not_have(parallel: str, tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    for size, fits in ((None, True), (1, True), (2, False)):
        args = writer.namespace(**ARGS, **{f"{parallel}_model_parallel_size": size})
        writer.save(tmp_path / "mp_rank_00" / "model_optim_rng.pt", {"args": args, "model": {}})
        if fits:
            assert layers(tmp_path)[0] == 3
        else:
            with pytest.raises(UserError, match=rf"args.{parallel}_model_parallel_size is 2, but there are files of 1"):
                open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_config.yaml", "a: [", r"model_config.yaml is not plain YAML: "),
        ("model_config.yaml", "a: !!python/name:os.system x", r"model_config.yaml is not plain YAML: .*python/name"),
        ("model_config.yaml", "[1, 2]", r"model_config.yaml must hold keys and values; it holds \[1, 2\]"),
        ("metadata.json", "{", r"metadata.json: it names no sharded_backend \("),
        ("metadata.json", "{}", r"metadata.json: it names no sharded_backend \('sharded_backend'\)"),
        ("metadata.json", "[]", r"metadata.json: it names no sharded_backend \("),
        (
            "metadata.json",
            '{"sharded_backend": "zarr"}',
            r"stored as 'zarr'; only 'torch_dist' can be read. Load it in",
        ),
    ],
)
def test_files_beside_the_weights_that_cannot_be_read(name: str, content: str, message: str, tmp_path: Path) -> None:
    common()(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "a")


def test_a_common_pt_of_something_else(tmp_path: Path) -> None:
    common()(tmp_path / "a")
    writer.save(tmp_path / "a" / "common.pt", [1])
    with pytest.raises(UserError, match=r"common.pt: holds a list, not a checkpoint's dict"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("module.module.decoder.final_norm.weight", "decoder.final_layernorm.weight"),
        ("model.module.language_model.encoder.final_layernorm.bias", "decoder.final_layernorm.bias"),
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.input_layernorm.weight", "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
        ("encoder.layers.12.input_norm.bias", "decoder.layers.12.self_attention.linear_qkv.layer_norm_bias"),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"),
        ("transformer.layers.3.post_attention_layernorm.bias", "decoder.layers.3.mlp.linear_fc1.layer_norm_bias"),
        ("encoder.layers.3.post_attention_norm.bias", "decoder.layers.3.mlp.linear_fc1.layer_norm_bias"),
        ("transformer.layers.0.attention.query_key_value.bias", "decoder.layers.0.self_attention.linear_qkv.bias"),
        ("transformer.layers.0.attention.dense.weight", "decoder.layers.0.self_attention.linear_proj.weight"),
        ("encoder.layers.0.mlp.dense_h_to_4h_2.weight", "decoder.layers.0.mlp.linear_fc1_2.weight"),
        ("encoder.layers.0.mlp.dense_4h_to_h.weight", "decoder.layers.0.mlp.linear_fc2.weight"),
        ("word_embeddings_for_head.weight", "output_layer.weight"),
        ("word_embeddings.weight", "output_layer.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("language_model.output_layer.weight", "output_layer.weight"),
        ("something.else", "something.else"),
    ],
)
def test_canonical_names(stored: str, canonical: str) -> None:
    assert canonical_name(stored) == canonical


def test_two_names_for_one_tensor() -> None:
    tensors = [("x", tensor_in_memory(np.zeros(1), "a.pt", f"{start}.x")) for start in ("model", "module")]
    with pytest.raises(UserError, match=r"a.pt: module.x and model.x both mean x; remove one"):
        by_name(tensors)


@pytest.mark.parametrize(
    ("gate", "up", "joined"),
    [
        ("fc1.weight", "fc1_2.weight", "fc1.weight"),
        ("fc1.bias", "fc1_2.bias", "fc1.bias"),
        ("fc1.weight_w", "fc1.weight_v", "fc1.weight"),
        ("fc1.bias_w", "fc1.bias_v", "fc1.bias"),
    ],
)
def test_gates_and_up_projections(gate: str, up: str, joined: str) -> None:
    prefix = "decoder.layers.0.mlp.linear_"
    tensors = {prefix + gate: tensor_in_memory(np.array([1, 2])), prefix + up: tensor_in_memory(np.array([3, 4]))}
    found = merge_gate_and_up(tensors)
    assert list(found) == [prefix + joined]
    np.testing.assert_array_equal(found[prefix + joined].read(), [1, 2, 3, 4])
    for alone in tensors:
        assert merge_gate_and_up({alone: tensors[alone]}).keys() == {alone}
