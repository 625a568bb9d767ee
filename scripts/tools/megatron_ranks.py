"""Loads torch_dist checkpoints on four Megatron-Core ranks, tensor and pipeline parallel 2; check_megatron.py runs it.

python scripts/tools/megatron_ranks.py DIR RANKS [DIR RANKS ...]   # RANKS holds mp_rank_TT_PPP/ of the same model

Exits with an error unless each rank gets exactly the tensors that its file in RANKS has.
"""

import sys
import tempfile
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron_logits import build

SIZES = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def compare(rank: int, rendezvous: str, pairs: list[tuple[Path, Path]]) -> None:
    """Loads and compares the tensors of one rank."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=4)
    parallel_state.initialize_model_parallel(**SIZES)
    torch.Tensor.cuda = lambda self: self  # Megatron moves the last stage's tied embedding there
    tensor, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    for directory, ranks in pairs:
        checkpoint = str(directory / "release")
        args = dist_checkpointing.load_common_state_dict(checkpoint)["args"]
        model = build(
            args, {**SIZES, "pipeline_dtype": torch.float32}, {"pre_process": stage == 0, "post_process": stage == 1}
        )
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=groups)}, checkpoint)
        model.load_state_dict(loaded["model"], strict=True)
        file = ranks / f"mp_rank_{tensor:02d}_{stage:03d}" / "model_optim_rng.pt"
        theirs = torch.load(file, weights_only=False)["model"]  # Megatron's pickles name its own classes
        ours = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
        theirs = {name: value for name, value in theirs.items() if torch.is_tensor(value)}
        assert ours.keys() == theirs.keys(), (file, ours.keys() ^ theirs.keys())
        unequal = [name for name, value in theirs.items() if not torch.equal(value, ours[name])]
        assert not unequal, (file, unequal)
        print(f"{file.parent.name} of {ranks.parent.parent.name}: {len(ours)} tensors, all equal", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    paths = list(map(Path, sys.argv[1:]))
    with tempfile.TemporaryDirectory() as temporary:
        pairs = list(zip(paths[::2], paths[1::2], strict=True))
        torch.multiprocessing.spawn(compare, (f"{temporary}/rendezvous", pairs), nprocs=4)
