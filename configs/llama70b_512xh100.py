"""Llama 3.1 70B's architecture on 64 hosts of eight H100s, from a 405B teacher's logits.

Purpose   every kind of parallelism at once: pipeline stages, sharded state, sharded layers
Source    meta-llama/Llama-3.1-70B's config.json; what is not set here is as in llama8b_8xh100
Hardware  512 H100 80 GB in 64 hosts, a 400 Gb/s port each
Time      5.3 s a step, estimated by kdjax plan --search, which chose mesh, microbatch and remat; not measured
Expect    not measured
Run       sbatch --nodes=64 scripts/slurm.sh --config llama70b_512xh100 --workdir RUN
"""

import llama8b_8xh100
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = llama8b_8xh100.get_config()

    model = config.model
    model.layers = 80
    model.d_model = 8192
    model.n_heads = 64
    model.d_ff = 28672

    config.data.train = "data/llama405b/train_with_logits_CHUNK_ID.jsonl.zst"
    config.data.val = "data/llama405b/val_with_logits_CHUNK_ID.jsonl.zst"

    config.batch.global_size = 512  # rows, two million tokens
    config.batch.microbatch_size = 1

    config.optim.lr = 1e-5
    config.optim.min_lr = 1e-6

    config.mesh = mesh = ConfigDict()
    mesh.pipe = 4
    mesh.interleave = 2  # eight runs of ten layers, two a stage
    mesh.fsdp = 32
    mesh.tensor = 4
    mesh.lock()

    return config
