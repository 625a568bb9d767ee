"""Llama 3.1 8B's shape on eight hosts of eight H100s, from a 70B teacher's logits.

Purpose   the same run as llama8b_8xh100, eight times as wide
Source    meta-llama/Llama-3.1-8B's config.json
Hardware  64 H100 80 GB in 8 hosts, a 400 Gb/s port each
Time      0.8 s a step, by the estimate of kdjax.plan --search, which chose mesh, microbatch and remat; not measured
Expect    not measured
Run       sbatch --nodes=8 scripts/slurm.sh --config configs/llama8b_64xh100.py --workdir RUN
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.init_from = placeholder(str)  # set it to a converted checkpoint, whose architecture then rules
    model.layers = 32
    model.d_model = 4096
    model.n_heads = 32
    model.n_groups = 8
    model.d_ff = 14336
    model.vocab_size = 128256
    model.rope_theta = 5e5
    model.rope_llama3 = (8.0, 1.0, 4.0, 8192.0)
    model.norm_eps = 1e-5
    model.tied = False
    model.remat = "dots"

    config.data = data = ConfigDict()
    data.train = "data/llama70b/train_with_logits_CHUNK_ID.jsonl.zst"
    data.val = "data/llama70b/val_with_logits_CHUNK_ID.jsonl.zst"
    data.sequence_length = 4096  # tokens
    data.top_k = 64
    data.pack = True

    config.batch = batch = ConfigDict()
    batch.global_size = 128  # rows, half a million tokens
    batch.microbatch_size = 4

    config.loss = loss = ConfigDict()
    loss.kd_loss_weight = 1.0
    loss.sft_loss_weight = 0.4  # NeMo-Aligner's tutorial
    loss.tail = "ghost"

    config.optim = optim = ConfigDict()
    optim.lr = 2e-5
    optim.min_lr = 2e-6
    optim.warmup_steps = 50
    optim.b2 = 0.95
    optim.weight_decay = 0.1

    config.train = train = ConfigDict()
    train.steps = 2000
    train.val_every = 200
    train.val_batches = 8  # global batches
    train.save_every = 200

    config.mesh = mesh = ConfigDict()
    mesh.fsdp = 32
    mesh.tensor = 2

    return config.lock()
