"""Layouts that no fixture has: older releases' names and orders, separate gates, other tools' directories.

Each is made of one fixture's arrays under other names, and must give the same parameters.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import megatron_goldens as megatron
import numpy as np
import pytest
import torch_writer as writer
import yaml

from kdjax.checkpoint import load_params, read_model_config
from kdjax.convert.from_megatron import convert
from kdjax.types import UserError

Arrays = dict[str, np.ndarray]


def assert_same(out: Path, variant: str) -> None:
    """Asserts that `out` loads to the parameters of a variant's plainest layout."""
    ours, theirs = (load_params(path, read_model_config(path)) for path in (out, megatron.converted(variant)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def legacy_names(arrays: Arrays, old: bool) -> dict[str, Any]:
    """Returns megatron.legacy's nested dict; `old`: with the names of its first releases."""
    renames = [
        ("decoder.", "transformer." if old else "encoder."),
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm." if old else "input_norm."),
        ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm." if old else "post_attention_norm."),
        ("self_attention", "attention" if old else "self_attention"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
        ("final_layernorm", "final_layernorm" if old else "final_norm"),
    ]
    nested: dict[str, Any] = {"embedding": {"word_embeddings": {}, "position_embeddings": {}}}
    stack = nested.setdefault("transformer" if old else "encoder", {})
    for name, array in arrays.items():
        for new, legacy in renames:
            name = name.replace(new, legacy)
        if name.startswith("embedding"):
            nested["embedding"][name.split(".")[1]]["weight"] = array
        else:
            stack[name.partition(".")[2]] = array
    return {"language_model": nested}


def reordered(arrays: Arrays, version: int, heads: int) -> Arrays:
    """Returns [N, 3, H] rows of queries, keys and values in an old release's order."""

    def change(array: np.ndarray) -> np.ndarray:
        rows_Nx3xH = array.reshape(heads, 3, -1, *array.shape[1:])
        moved = rows_Nx3xH.swapaxes(0, 1) if version == 0 else np.moveaxis(rows_Nx3xH, 1, 2)
        return moved.reshape(array.shape)

    qkv = ("linear_qkv.weight", "linear_qkv.bias")
    return {name: change(array) if name.endswith(qkv) else array for name, array in arrays.items()}


def save_rank(source: Path, content: dict[str, Any], rank: str = "mp_rank_00") -> None:
    (source / rank).mkdir(parents=True)
    writer.save(source / rank / "model_optim_rng.pt", content)


@pytest.mark.parametrize(("version", "old"), [(0, True), (1, True), (2.0, False), (3.0, False)])
def test_legacy_names_and_checkpoint_versions(version: float, old: bool, tmp_path: Path) -> None:
    arrays, args = megatron.tensors("gpt2ish"), megatron.args("gpt2ish")
    if version < 2:
        arrays = reordered(arrays, int(version), heads=4)
    content = {"args": writer.namespace(**args), "iteration": 7, "model": legacy_names(arrays, old)}
    if version:  # the oldest files do not say
        content["checkpoint_version"] = version
    save_rank(tmp_path / "source", content)
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "gpt2ish")


@pytest.mark.parametrize("version", [0, 1])
def test_old_orders_under_tensor_parallelism(version: int, tmp_path: Path) -> None:
    """Each rank's rows are reordered before they are joined."""
    arrays, args = megatron.tensors("gpt2ish"), megatron.args("gpt2ish")
    rows = ("word_embeddings.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
    columns = ("linear_proj.weight", "linear_fc2.weight")
    for rank in range(2):
        own = {}
        for name, array in arrays.items():
            parts = np.split(array, 2, axis=1 if name.endswith(columns) else 0)
            own[name] = parts[rank] if name.endswith(rows + columns) else array
        model = legacy_names(reordered(own, version, heads=2), old=True)
        parallel = args | {"tensor_model_parallel_size": 2}
        content = {"args": writer.namespace(**parallel), "checkpoint_version": version, "model": model}
        save_rank(tmp_path / "source", content, f"mp_rank_{rank:02d}")
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "gpt2ish")


def test_an_embedding_copy_of_the_last_stage_under_its_old_name(tmp_path: Path) -> None:
    arrays, args = megatron.tensors("gpt2ish"), megatron.args("gpt2ish")
    model = legacy_names(arrays, old=True)
    model["word_embeddings_for_head"] = {"weight": arrays["embedding.word_embeddings.weight"]}
    save_rank(tmp_path / "source", {"args": writer.namespace(**args), "checkpoint_version": 3.0, "model": model})
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "gpt2ish")


def separate_gate(arrays: Arrays, gate: str, up: str) -> Arrays:
    found = {}
    for name, array in arrays.items():
        if name.endswith("linear_fc1.weight"):
            prefix = name.removesuffix("linear_fc1.weight")
            found[prefix + gate], found[prefix + up] = np.split(array, 2)
        else:
            found[name] = array
    return found


def test_singleton_local_shards(tmp_path: Path) -> None:
    arrays, args = megatron.tensors("llamaish"), megatron.args("llamaish")
    arrays = separate_gate(arrays, "linear_fc1.weight_w", "linear_fc1.weight_v")
    writer.save_distributed(tmp_path / "source", arrays, {"args": writer.namespace(**args), "iteration": 7})
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "llamaish")


def test_a_gate_without_its_other_half(tmp_path: Path) -> None:
    arrays, args = megatron.tensors("llamaish"), megatron.args("llamaish")
    arrays = separate_gate(arrays, "linear_fc1.weight_w", "linear_fc1.weight_v")
    del arrays["decoder.layers.2.mlp.linear_fc1.weight_v"]
    writer.save_distributed(tmp_path / "source", arrays, {"args": writer.namespace(**args)})
    with pytest.raises(UserError, match=r"2.mlp.linear_fc1.weight_w \(160, 64\) .*: no rule"):
        convert(tmp_path / "source", tmp_path / "out")


def test_two_layers_norms_stacked_and_an_optimizer_beside_them(tmp_path: Path, capsys: Any) -> None:
    arrays, args = megatron.tensors("llamaish"), megatron.args("llamaish")
    stacked: Arrays = {}
    for name, array in arrays.items():
        if name.startswith("decoder.layers.0."):
            own = [arrays[name.replace("layers.0.", f"layers.{layer}.")] for layer in range(4)]
            stacked[name.replace("layers.0.", "layers.")] = np.stack(own)
        elif not name.startswith("decoder.layers."):
            stacked[name] = array
    stacked["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"] = np.zeros((4, 3), np.float32)
    stacked["chained_0.optimizer.state.exp_avg_sq.output_layer.weight"] = np.zeros((4, 3), np.float32)
    writer.save_distributed(tmp_path / "source", stacked, {"args": writer.namespace(**args)})
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "llamaish")
    assert "skipped: 2 x optimizer state" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["skipped"] == {"optimizer state": 2}


PROVIDER = {
    "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "share_embeddings_and_output_weights": False,
    "vocab_size": 500,
}


def bridge(source: Path, arrays: Arrays) -> None:
    writer.save_distributed(source / "iter_0000003", {}, {"iteration": 3})
    writer.save_distributed(source / "iter_0000007", arrays, {"iteration": 7})
    (source / "iter_0000007" / "run_config.yaml").write_text(yaml.safe_dump({"model": PROVIDER}))
    writer.save(source / "latest_train_state.pt", {"step": np.array(7, np.int32)})


def nemo2(source: Path, arrays: Arrays) -> None:
    writer.save_distributed(source / "weights", {f"module.{name}": array for name, array in arrays.items()}, {})
    (source / "context").mkdir()
    (source / "context" / "model.yaml").write_text(yaml.safe_dump({"config": PROVIDER}))


@pytest.mark.parametrize("write", [bridge, nemo2])
def test_other_tools_directories(write: Callable[[Path, Arrays], None], tmp_path: Path) -> None:
    arrays = megatron.tensors("llamaish")
    write(tmp_path / "source", arrays)
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "llamaish")
    assert read_model_config(tmp_path / "out").vocab_size == 500


def test_nothing_states_the_architecture(tmp_path: Path) -> None:
    arrays = megatron.tensors("llamaish")
    writer.save_distributed(tmp_path / "source", arrays, {})
    with pytest.raises(UserError, match=r"does not state layers, d_model, n_heads, d_ff; give --arch layers=..."):
        convert(tmp_path / "source", tmp_path / "out")
    words = ["layers=4", "d_model=64", "n_heads=4", "n_groups=2", "d_ff=160", "tied=false", "vocab_size=500"]
    convert(tmp_path / "source", tmp_path / "out", words)
    assert_same(tmp_path / "out", "llamaish")


def test_uneven_pipeline_stages(tmp_path: Path) -> None:
    """One layer in the first stage, three in the last: a stage's layers follow those of the one before it."""
    arrays, args = megatron.tensors("llamaish"), megatron.args("llamaish")
    parallel = args | {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}
    for stage, layers in enumerate(([0], [1, 2, 3])):
        model: Arrays = {}
        for name, array in arrays.items():
            parts = name.split(".")
            if parts[1] == "layers" and int(parts[2]) in layers:
                model[name.replace(f"layers.{parts[2]}.", f"layers.{layers.index(int(parts[2]))}.")] = array
            elif parts[1] != "layers" and (stage == 0) == name.startswith("embedding"):
                model[name] = array
        content = {"args": writer.namespace(**parallel), "checkpoint_version": 3.0, "model": model}
        save_rank(tmp_path / "source", content, f"mp_rank_00_{stage:03d}")
    convert(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", "llamaish")


def test_an_old_nemo_checkpoint_of_many_ranks(tmp_path: Path) -> None:
    """tp_rank_TT_pp_rank_PPP/model_weights.ckpt, with gate and up map in two matrices on every rank."""
    arrays = megatron.tensors("llamaish")
    source = tmp_path / "source"
    config = {
        "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
        "normalization": "rmsnorm", "layernorm_epsilon": 1e-5, "bias": False, "activation": "fast-swiglu",
        "share_embeddings_and_output_weights": False, "position_embedding_type": "rope", "rotary_percentage": 1.0,
        "transformer_block_type": "pre_ln", "attention_type": "multihead", "override_vocab_size": 500,
    }  # fmt: skip
    source.mkdir()
    (source / "model_config.yaml").write_text(yaml.safe_dump(config))
    flat = {}
    split = separate_gate(arrays, "linear_fc1.weight", "linear_fc1_2.weight")
    for name, array in split.items():
        name = name.replace("linear_fc1_2", "dense_h_to_4h_2").replace("decoder.", "encoder.")
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        name = name.replace("mlp.linear_fc1.layer_norm_", "post_attention_layernorm.")
        name = name.replace("linear_fc1", "dense_h_to_4h").replace("linear_fc2", "dense_4h_to_h")
        name = name.replace("linear_qkv", "query_key_value").replace("linear_proj", "dense")
        flat[f"model.module.language_model.{name}"] = array
    flat["model.module.language_model.rotary_pos_emb.inv_freq"] = np.ones(8, np.float32)
    for tensor in range(2):
        for stage in range(2):
            own: Arrays = {}
            for name, array in flat.items():
                parts = name.split(".")
                layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
                first = "embedding" in name or "inv_freq" in name
                if (layer // 2 if layer is not None else 0 if first else 1) != stage:
                    continue
                axis = 1 if name.endswith((".dense.weight", "4h_to_h.weight")) else 0
                cut = "norm" not in name and "inv_freq" not in name
                name = name if layer is None else name.replace(f"layers.{layer}.", f"layers.{layer % 2}.")
                own[name] = np.split(array, 2, axis)[tensor] if cut else array
            directory = source / f"tp_rank_{tensor:02d}_pp_rank_{stage:03d}"
            directory.mkdir()
            writer.save(directory / "model_weights.ckpt", own)
    convert(source, tmp_path / "out")
    assert_same(tmp_path / "out", "llamaish")


def test_a_weight_in_two_stages(tmp_path: Path) -> None:
    """Nothing says which of them is right. Entries without weights may be in every stage."""
    args = megatron.args("llamaish")
    norm = {"decoder.final_layernorm.weight": np.ones(64, np.float32)}
    for stage in range(2):
        model = norm | {"rotary_pos_emb.inv_freq": np.ones(8, np.float32)}
        content = {"args": writer.namespace(**args | {"pipeline_model_parallel_size": 2}), "model": model}
        save_rank(tmp_path / "source", content, f"mp_rank_00_{stage:03d}")
    with pytest.raises(UserError, match=r"mp_rank_00_001.*final_layernorm.weight and .* both mean decoder.final_l"):
        convert(tmp_path / "source", tmp_path / "out")
