"""Llama 3.1 8B's architecture on eight hosts of eight H100s, from a 70B teacher's logits.

Purpose   the run of llama8b_8xh100, whose settings it takes, on eight times as many GPUs
Source    meta-llama/Llama-3.1-8B's config.json
Hardware  64 H100 80 GB in 8 hosts, a 400 Gb/s port each
Time      0.8 s a step, estimated by kdjax plan --search, which chose mesh, microbatch and remat; not measured
Expect    not measured
Run       sbatch --nodes=8 scripts/slurm.sh --config llama8b_64xh100 --workdir RUN
"""

import llama8b_8xh100
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = llama8b_8xh100.get_config()
    config.batch.microbatch_size = 4
    config.mesh.fsdp = 32
    return config
