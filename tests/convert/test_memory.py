"""A conversion holds a layer or two and the largest tensor, however many layers there are."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch_writer as writer

from kdjax.convert import model_writer
from kdjax.convert.__main__ import main
from kdjax.convert.from_megatron import convert

L, D, F, V = 24, 192, 512, 4099  # a layer is 0.9 MB, the embedding 1.6 MB, the model 24 MB
ARGS = {
    "num_layers": L,
    "hidden_size": D,
    "ffn_hidden_size": F,
    "num_attention_heads": 4,
    "padded_vocab_size": V,
    "vocab_size": V,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
LAYER = {
    "self_attention.linear_qkv.weight": (3 * D, D),
    "self_attention.linear_qkv.layer_norm_weight": (D,),
    "self_attention.linear_proj.weight": (D, D),
    "mlp.linear_fc1.weight": (2 * F, D),
    "mlp.linear_fc1.layer_norm_weight": (D,),
    "mlp.linear_fc2.weight": (D, F),
}
OUTSIDE = {
    "embedding.word_embeddings.weight": (V, D),
    "output_layer.weight": (V, D),
    "decoder.final_layernorm.weight": (D,),
}


def write_stacked(path: Path) -> None:
    shapes = {f"decoder.layers.{name}": (L, *shape) for name, shape in LAYER.items()} | OUTSIDE
    arrays = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    writer.save_distributed(path, arrays, {"args": writer.namespace(**ARGS)})


def write_ranks(path: Path) -> None:
    shapes = {f"decoder.layers.{i}.{name}": shape for i in range(L) for name, shape in LAYER.items()} | OUTSIDE
    arrays = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    content = {"args": writer.namespace(**ARGS), "checkpoint_version": 3.0, "model": arrays}
    (path / "mp_rank_00").mkdir(parents=True)
    writer.save(path / "mp_rank_00" / "model_optim_rng.pt", content)


@pytest.mark.parametrize("write", [write_stacked, write_ranks])
def test_peak_memory(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in")
    layer = 2 * sum(int(np.prod(shape)) for shape in LAYER.values())
    largest = 2 * V * D
    assert L * layer > 6 * (2 * layer + largest)  # or the bound below would say little
    peaks = []
    create = model_writer._create_orbax_checkpoint

    def then_watch(*arguments: Any) -> None:  # what Orbax's machinery takes does not grow with the model
        create(*arguments)
        tracemalloc.start()

    monkeypatch.setattr(model_writer, "_create_orbax_checkpoint", then_watch)
    try:
        convert(tmp_path / "in", tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert largest < peaks[0] < 2 * layer + largest + 1e6


def test_peak_memory_of_the_way_back(tmp_path: Path) -> None:
    write_stacked(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    layer, largest = 2 * sum(int(np.prod(shape)) for shape in LAYER.values()), 2 * V * D
    main(["to-megatron", str(tmp_path / "out"), str(tmp_path / "first")])  # imports and caches
    tracemalloc.start()
    try:
        main(["to-megatron", str(tmp_path / "out"), str(tmp_path / "back")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest < peak < 2 * layer + largest + 1e6
