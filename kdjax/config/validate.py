"""One check of the whole configuration, before any device work: value, why it cannot work, what would."""

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

from kdjax.config import Config, ModelConfig
from kdjax.types import UserError

CHOICES: dict[str, Collection[str]] = {
    "model.position": ("rope", "learned"),
    "model.norm": ("rmsnorm", "layernorm", "layernorm_1p"),
    "model.activation": ("swiglu", "gelu", "gelu_tanh", "squared_relu"),
    "model.dtype": ("bfloat16", "float32"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "layer"),
    "model.attention": ("xla", "cudnn"),
    "data.over_long": ("error", "drop", "truncate"),
    "data.kind": ("logits", "log_probs", "probs"),
    "loss.kd_loss": ("fwd_kl", "bwd_kl", "jsd"),
    "loss.cross_tokenizer": ("rank_match",),
    "loss.tail": ("renormalize", "ghost"),
    "loss.reduction": ("token", "nemo"),
    "loss.implementation": ("reference", "xla", "pallas", "triton", "pallas_interpret", "gathered"),
    "optim.name": ("adamw", "lion", "sgd"),
    "optim.schedule": ("cosine", "constant", "wsd"),
    "optim.decay_rule": ("megatron", "nemo"),
    "mesh.schedule": ("1f1b", "gpipe"),
    "checkpoint.best_metric": ("loss", "kd_loss", "sft_loss"),
}
POSITIVE = {
    "model": "layers d_model n_heads d_ff vocab_size n_groups head_dim padded_vocab_size max_positions "
    "rope_theta rope_linear_factor norm_eps init_std",
    "data": "sequence_length top_k n_chunks n_examples_per_chunk read_threads prefetch teacher_temperature",
    "batch": "global_size microbatch_size",
    "loss": "logits_scale target_logits_scale",
    "optim": "lr eps clip_norm",
    "train": "steps val_every val_batches save_every log_every early_stop_patience max_skipped_steps",
    "mesh": "interleave",
    "checkpoint": "keep_last",
}
NOT_NEGATIVE = {
    "data": "max_bad_records seed",
    "loss": "kd_loss_weight sft_loss_weight",
    "optim": "min_lr warmup_steps constant_steps weight_decay",
    "train": "seed",
    "checkpoint": "keep_best",
}
SHARES = {"model": "rope_fraction", "optim": "b1 b2"}  # between 0 and 1


def keys(groups: dict[str, str]) -> list[str]:
    """The dotted keys of a table of groups."""
    return [f"{group}.{name}" for group, names in groups.items() for name in names.split()]


WHY = {
    "model.layers": "set it, or model.init_from to a converted checkpoint",
    "optim.clip_norm": "None turns clipping off",
    "train.steps": "set the number of updates",
    "data.sequence_length": "set it to the length the records were made with",
}


def resolve(config: Config) -> Config:
    """The configuration with what follows from other values filled in, ready to be validated, printed and saved."""
    loss = config.loss
    aliases: dict[Any, Any] = {True: "rank_match", False: None}  # NeMo-Aligner's spelling
    cross_tokenizer = aliases.get(loss.cross_tokenizer, loss.cross_tokenizer)
    return dataclasses.replace(
        config,
        model=resolve_model(config.model, config.data.sequence_length),
        loss=dataclasses.replace(loss, cross_tokenizer=cross_tokenizer),
    )


def resolve_model(model: ModelConfig, sequence_length: int | None = None) -> ModelConfig:
    """The architecture with what follows from other values filled in; learned positions reach `sequence_length`."""
    return dataclasses.replace(
        model,
        n_groups=model.groups,
        head_dim=model.head_width,
        padded_vocab_size=model.vocab_rows,
        max_positions=model.max_positions or sequence_length if model.position == "learned" else None,
    )


def validate(config: Config) -> None:
    """Raises UserError at the first thing that cannot work, whatever the records and the devices."""
    _choices(config)
    _ranges(config)
    _model(config.model)
    _data_and_batch(config)
    _loss(config)
    _schedule(config)
    _mesh(config)


def validate_model(model: ModelConfig) -> None:
    """The part of `validate` that needs no more than a resolved architecture, such as a converted checkpoint's."""
    config = Config(model=model)
    _choices(config, "model.")
    _ranges(config, "model.")
    _model(model)


def _fail(key: str, value: Any, reason: str) -> None:
    raise UserError(f"{key} = {value!r}: {reason}")


def _choices(config: Config, prefix: str = "") -> None:
    for key, allowed in CHOICES.items():
        if key.startswith(prefix) and config[key] is not None and config[key] not in allowed:
            _fail(key, config[key], f"choose one of {', '.join(allowed)}")


def _ranges(config: Config, prefix: str = "") -> None:
    """Of the keys that begin with the prefix."""
    positive, not_negative, shares = (
        [key for key in keys(table) if key.startswith(prefix)] for table in (POSITIVE, NOT_NEGATIVE, SHARES)
    )
    for key in positive:
        if config[key] is not None and not config[key] > 0:
            _fail(key, config[key], WHY.get(key, "it must be greater than 0"))
    for key in not_negative:
        if not config[key] >= 0:
            _fail(key, config[key], "it must not be negative")
    for key in shares:
        if not 0 <= config[key] <= 1:
            _fail(key, config[key], "it must lie between 0 and 1")


def _model(model: ModelConfig) -> None:
    groups, head_dim = model.groups, model.head_width
    if model.n_heads % groups:
        near = max(g for g in range(1, model.n_heads + 1) if model.n_heads % g == 0 and g <= max(groups, 1))
        _fail(
            "model.n_groups",
            groups,
            f"it must divide model.n_heads = {model.n_heads}; the nearest that does is {near}",
        )
    if head_dim * model.n_heads != model.d_model and model.head_dim == model.d_model // model.n_heads:
        _fail(
            "model.d_model",
            model.d_model,
            f"it is no multiple of model.n_heads = {model.n_heads}; set model.head_dim",
        )
    if model.position == "rope" and int(head_dim * model.rope_fraction) % 2:
        _fail(
            "model.rope_fraction",
            model.rope_fraction,
            f"it rotates an odd number of the head's {head_dim} dimensions",
        )
    llama3 = model.rope_llama3
    if llama3 is not None and (len(llama3) != 4 or min(llama3) <= 0 or llama3[1] >= llama3[2]):
        _fail("model.rope_llama3", llama3, "give factor, low, high (above low), original positions; 8,1,4,8192 in 3.1")
    if model.keep_layers is not None and model.init_from is None:
        _fail("model.keep_layers", model.keep_layers, "it picks layers of model.init_from; set that too")
    if model.vocab_rows < model.vocab_size:
        _fail(
            "model.padded_vocab_size",
            model.padded_vocab_size,
            f"it must be at least model.vocab_size = {model.vocab_size}",
        )
    if model.position == "learned" and model.max_positions is None:
        _fail("model.max_positions", None, "learned positions need their number")


def _data_and_batch(config: Config) -> None:
    data, batch, vocab = config.data, config.batch, config.model.vocab_size
    positions = config.model.max_positions
    if positions is not None and positions < data.sequence_length:
        _fail("data.sequence_length", data.sequence_length, f"the model has {positions} learned positions")
    if data.verify_records < -1:
        _fail("data.verify_records", data.verify_records, "give a number of records, or -1 for all")
    if not data.train:
        _fail("data.train", data.train, "name the files of training records")
    if data.top_k is not None and data.top_k > vocab:
        _fail("data.top_k", data.top_k, f"it exceeds model.vocab_size = {vocab}")
    if batch.global_size % batch.microbatch_size:
        near = max(m for m in range(1, batch.microbatch_size + 1) if batch.global_size % m == 0)
        _fail(
            "batch.microbatch_size",
            batch.microbatch_size,
            f"it must divide batch.global_size = {batch.global_size}; {near} does",
        )
    if config.train.early_stop_patience is not None and not data.val:
        _fail("train.early_stop_patience", config.train.early_stop_patience, "stopping early needs data.val")
    if config.checkpoint.keep_best and data.val and config.train.save_every % config.train.val_every:
        near = max(config.train.save_every // config.train.val_every, 1) * config.train.val_every
        _fail(
            "train.save_every",
            config.train.save_every,
            f"keeping the best needs a validation before each save: a multiple of train.val_every = "
            f"{config.train.val_every}, such as {near} (or checkpoint.keep_best = 0)",
        )
    if config.train.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        _fail(
            "train.wandb_project",
            config.train.wandb_project,
            "wandb is not installed; pip install 'kdjax[wandb]'",
        )


def _loss(config: Config) -> None:
    loss, data = config.loss, config.data
    if loss.kd_loss_weight == 0 and loss.sft_loss_weight == 0:
        _fail(
            "loss.kd_loss_weight",
            0.0,
            "loss.sft_loss_weight is 0 too, so there is nothing to learn; set one of them",
        )
    if not 0 < loss.jsd_beta < 1:
        _fail("loss.jsd_beta", loss.jsd_beta, "it must lie strictly between 0 and 1")
    if loss.tail == "ghost" and loss.target_logits_scale != 1:
        _fail(
            "loss.target_logits_scale",
            loss.target_logits_scale,
            "loss.tail = 'ghost' uses the stored logsumexp, which belongs to the unscaled logits; set it to 1",
        )
    if loss.implementation == "gathered" and (loss.sft_loss_weight or loss.tail == "ghost" or loss.cross_tokenizer):
        _fail(
            "loss.implementation",
            loss.implementation,
            "it reads the teacher's K ids only, which leaves out loss.sft_loss_weight > 0, loss.tail = 'ghost' and"
            " loss.cross_tokenizer; set it to None",
        )
    if loss.target_logits_scale != 1 and data.teacher_temperature != 1:
        _fail(
            "loss.target_logits_scale",
            loss.target_logits_scale,
            f"data.teacher_temperature = {data.teacher_temperature} says that the stored logits are scaled already, so "
            "this would be applied twice; set one of the two to 1",
        )


def _schedule(config: Config) -> None:
    optim, steps = config.optim, config.train.steps
    if optim.schedule != "constant" and optim.min_lr > optim.lr:
        _fail(
            "optim.min_lr",
            optim.min_lr,
            f"it exceeds optim.lr = {optim.lr}; set it at or below (NeMo's default: lr / 33)",
        )
    if optim.schedule == "constant" and optim.constant_steps:
        _fail("optim.constant_steps", optim.constant_steps, "the constant schedule does not use it; set it to 0")
    if optim.schedule != "constant" and optim.warmup_steps + optim.constant_steps >= steps:
        _fail(
            "optim.constant_steps" if optim.constant_steps else "optim.warmup_steps",
            optim.constant_steps or optim.warmup_steps,
            f"warmup_steps {optim.warmup_steps} + constant_steps {optim.constant_steps} leave none of train.steps = "
            f"{steps} for the decay; together they may be at most {steps - 1}",
        )


def _largest(size: int, below: int) -> int:
    """The largest number up to `below` that divides `size`."""
    return next(n for n in range(below, 0, -1) if size % n == 0)


def _mesh(config: Config) -> None:
    sizes = {name: getattr(config.mesh, name) for name in ("pipe", "data", "fsdp", "tensor")}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            _fail(f"mesh.{name}", size, "give a number of devices, or -1 for all that the other sizes leave")
    open_ended = [name for name, size in sizes.items() if size == -1]
    if len(open_ended) > 1:
        _fail(f"mesh.{open_ended[1]}", -1, f"mesh.{open_ended[0]} is -1 too; only one size can take what is left")
    if config.mesh.interleave > 1 and config.mesh.pipe == 1:
        _fail("mesh.interleave", config.mesh.interleave, "there are no stages to interleave; set mesh.pipe, or it to 1")
    validate_split(config, {name: size for name, size in sizes.items() if size != -1})


def validate_split(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises UserError where the model cannot be split over mesh axes of these sizes; those not given count as 1."""
    model, pipe, tensor = config.model, sizes.get("pipe", 1), sizes.get("tensor", 1)
    for name in ("n_heads", "n_groups", "d_ff"):
        size = getattr(model, name)
        if size % tensor:
            near = -(-size // tensor) * tensor
            reason = f"it must divide model.{name} = {size}; {_largest(size, tensor)} does, or {near} of those"
            _fail("mesh.tensor", tensor, reason)
    rows = model.vocab_rows
    if rows % (tensor * pipe):
        near, fits = -(-rows // (tensor * pipe)) * tensor * pipe, _largest(rows, tensor * pipe)
        _fail(
            "model.padded_vocab_size",
            rows,
            f"embedding and head are split over mesh.tensor {tensor} x mesh.pipe {pipe} = {tensor * pipe} devices,"
            f" which must divide it; {near} does, or {fits} devices",
        )
    stretch = pipe * config.mesh.interleave
    if model.layers % stretch:
        below, above = model.layers // stretch * stretch, -(-model.layers // stretch) * stretch
        near = f"{below} or {above} layers" if below else f"{above} layers"
        _fail(
            "mesh.pipe",
            pipe,
            f"model.layers = {model.layers} cannot be cut into {stretch} equal runs (mesh.pipe {pipe} x "
            f"mesh.interleave {config.mesh.interleave}); mesh.pipe {_largest(model.layers, pipe)} can, or {near} "
            "(model.keep_layers picks some)",
        )
