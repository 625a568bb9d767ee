"""Llama 3.1 8B's architecture on one host of eight H100s, from a 70B teacher's logits.

Purpose   the largest student that one host trains with memory to spare
Source    meta-llama/Llama-3.1-8B's config.json
Hardware  8 H100 80 GB in one host
Time      5.9 s a step, estimated by kdjax plan --search, which chose mesh, microbatch and remat; not measured
Expect    not measured
Run       kdjax launch -n 8 -- kdjax.train --config llama8b_8xh100 --workdir RUN
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.init_from = placeholder(str)  # a converted checkpoint; its architecture replaces the one below
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
    batch.microbatch_size = 2

    config.loss = loss = ConfigDict()
    loss.kd_loss_weight = 1.0
    loss.sft_loss_weight = 0.4  # as in NeMo-Aligner's tutorial
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
    mesh.fsdp = 4
    mesh.tensor = 2  # halves the gradients and gathered parameters that each device holds

    return config.lock()
