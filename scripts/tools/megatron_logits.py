"""Computes the logits of torch_dist checkpoints with Megatron-Core on a CPU; check_megatron.py runs it.

python scripts/tools/megatron_logits.py DIR [DIR ...]  # DIR holds the checkpoint and input_ids.npy, and gets logits.npy

The model is built from the checkpoint's own args, and every key that it asks for must exist.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig


def build(args: argparse.Namespace, parallel: dict[str, Any] | None = None, stage: dict[str, Any] | None = None) -> Any:
    """Returns the GPTModel that megatron.training builds from these args, in float32 and without fused kernels.

    `parallel` goes to its configuration; `stage`, which says what part of it this rank holds, to the model.
    """
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.layernorm_epsilon,
        layernorm_zero_centered_gamma=args.layernorm_zero_centered_gamma,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu
        if args.swiglu
        else squared_relu
        if args.squared_relu
        else torch.nn.functional.gelu,
        bias_activation_fusion=args.bias_gelu_fusion,
        rotary_interleaved=args.rotary_interleaved,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.float32,
        **parallel or {},
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=getattr(args, "max_position_embeddings", 64),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        **stage or {},
    ).eval()


def logits(directory: Path) -> np.ndarray:
    """Loads the checkpoint that the tracker file names and returns its logits."""
    tracker = (directory / "latest_checkpointed_iteration.txt").read_text()
    checkpoint = str(directory / (tracker if tracker == "release" else f"iter_{int(tracker):07d}"))
    args = dist_checkpointing.load_common_state_dict(checkpoint)["args"]
    model = build(args)
    wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group(True)})}
    loaded, unused, absent = dist_checkpointing.load(wanted, checkpoint, strict="return_all")
    unused = {key for key in unused if not key.endswith("_extra_state")}  # belong to Transformer Engine's modules
    if unused or absent:
        raise SystemExit(f"{directory}: unused keys {sorted(unused)}, missing keys {sorted(absent)}")
    model.load_state_dict(loaded["model"], strict=True)
    tokens_BxT = torch.from_numpy(np.load(directory / "input_ids.npy")).long()
    positions_BxT = torch.arange(tokens_BxT.shape[1])[None].expand_as(tokens_BxT)
    future_1x1xTxT = torch.ones(tokens_BxT.shape[1], tokens_BxT.shape[1]).triu(1).bool()[None, None]
    with torch.no_grad():
        return model(tokens_BxT, positions_BxT, future_1x1xTxT).numpy()


def main() -> None:
    """Computes the logits of each checkpoint in this process, the only rank."""
    with tempfile.NamedTemporaryFile() as rendezvous:
        torch.distributed.init_process_group("gloo", f"file://{rendezvous.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        torch.cuda.current_device = lambda: "cpu"  # where Megatron-Core allocates its buffers
        get_cuda_rng_tracker().fork = contextlib.nullcontext  # its dropout is 0
        for directory in map(Path, sys.argv[1:]):
            np.save(directory / "logits.npy", logits(directory))
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
