"""NeMo-Aligner's objective, order of records and updates, to compare kdjax with a NeMo-Aligner run step by step.

Purpose   reproduce a NeMo-Aligner run; the tests reproduce four recorded runs of Megatron GPTs
Source    Megatron-Core GPT (float32, CPU) trained by NeMo-Aligner's top-k loss and torch AdamW for 16 steps. Its
          records are in the repository only: with an installed package, set data.train
Hardware  any
Time      seconds
Expect    lr, loss, kd_loss, sft_loss and grad_norm of every step within 5e-5 relative, given the same initial weights
Run       kdjax train --config parity_nemo --config.model.init_from=CONVERTED --workdir RUN
"""

from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "trajectory" / "llamaish"


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.init_from = placeholder(str)  # the other run's initial weights, converted; without them only shapes agree
    model.layers = 4
    model.d_model = 64
    model.n_heads = 4
    model.n_groups = 2
    model.d_ff = 160
    model.vocab_size = 500
    model.padded_vocab_size = 512  # Megatron pads to a multiple of 128 x its tensor-parallel size
    model.tied = False
    model.dtype = "float32"

    config.data = data = ConfigDict()
    data.train = str(RECORDS / "train_with_logits_0.jsonl")
    data.sequence_length = 32  # tokens
    data.top_k = 8
    data.shuffle = False  # the order of the file, again and again

    config.batch = batch = ConfigDict()
    batch.global_size = 8  # rows
    batch.microbatch_size = 2  # changes the result only with reduction = "nemo"

    config.loss = loss = ConfigDict()
    loss.kd_loss = "fwd_kl"
    loss.kd_loss_weight = 1.0
    loss.sft_loss_weight = 0.4
    loss.reduction = "token"  # "nemo" is NeMo-Aligner's mean of microbatch means
    loss.include_vocab_padding = True  # Megatron's softmax includes the padded rows

    config.optim = optim = ConfigDict()
    optim.lr = 3e-3
    optim.min_lr = 3e-4
    optim.warmup_steps = 4
    optim.b2 = 0.98
    optim.weight_decay = 0.01
    optim.decay_rule = "megatron"
    optim.clip_norm = 1.0

    config.train = train = ConfigDict()
    train.steps = 16
    train.save_every = 16

    return config.lock()
