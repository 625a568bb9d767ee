"""Distil a 7M-parameter student on the bundled records in two minutes.

Purpose   see the whole path work: from a real teacher's logits to a student that learns
Source    teacher SmolLM2-135M-Instruct on four Austen novels, validated on a fifth (data/smollm2_topk/README.md)
Hardware  two CPU cores, 2 GiB
Time      about two minutes
Expect    validation sft_loss falls from 10.8 to about 5.8 nats per token
Run       kdjax train --config quickstart --workdir runs/quickstart
"""

from pathlib import Path

from ml_collections import ConfigDict

RECORDS = Path(__file__).resolve().parent.parent / "data" / "smollm2_topk"


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.layers = 4
    model.d_model = 128
    model.n_heads = 4
    model.n_groups = 2
    model.d_ff = 512
    model.vocab_size = 49152  # SmolLM2's
    model.rope_theta = 1e5  # SmolLM2's
    model.dtype = "float32"  # bfloat16 is no faster on CPUs
    model.remat = "layer"  # faster than "none" on a CPU: each step touches fewer new pages of memory

    config.data = data = ConfigDict()
    data.train = str(RECORDS / "train_with_logits_0.jsonl.gz")
    data.val = str(RECORDS / "val_with_logits_0.jsonl.gz")
    data.sequence_length = 128  # tokens, the length of the records

    config.batch = batch = ConfigDict()
    batch.global_size = 8  # rows
    batch.microbatch_size = 8

    config.loss = loss = ConfigDict()
    loss.kd_loss_weight = 1.0
    loss.sft_loss_weight = 0.4  # as in NeMo-Aligner's tutorial
    loss.tail = "ghost"  # the 16 stored logits leave out 28% of the teacher's probability: keep it as one more class

    config.optim = optim = ConfigDict()
    optim.lr = 3e-3
    optim.min_lr = 3e-4
    optim.warmup_steps = 10

    config.train = train = ConfigDict()
    train.steps = 200  # four epochs
    train.val_every = 50
    train.save_every = 100

    return config.lock()
