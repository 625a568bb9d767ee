"""Checks the whole configuration once, before any device work. Errors name the value, the reason and the remedy."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import NoReturn

from kdjax.config.schema import KNOBS, Config, DataConfig, ModelConfig
from kdjax.losses.dispatch import TEACHER_IMPLEMENTATIONS, check_implementation
from kdjax.losses.objective import Objective
from kdjax.parallel.axes import PIPE, TENSOR
from kdjax.types import UserError


def resolve(config: Config) -> Config:
    """Returns the configuration with derived values filled in, ready to be validated, printed and saved."""
    return dataclasses.replace(
        config,
        model=resolve_model(config.model, config.data.sequence_length),
        loss=dataclasses.replace(config.loss, cross_tokenizer=Objective.from_settings(config.loss).cross_tokenizer),
    )


def resolve_model(model: ModelConfig, sequence_length: int | None = None) -> ModelConfig:
    """Returns the architecture with derived values filled in; learned positions default to `sequence_length`."""
    return dataclasses.replace(
        model,
        n_groups=model.groups,
        head_dim=model.head_width,
        padded_vocab_size=model.vocab_rows,
        max_positions=model.max_positions or sequence_length if model.position == "learned" else None,
    )


def validate(config: Config) -> None:
    """Raises UserError for the first value of a resolved configuration that cannot work on any records or devices."""
    for key in KNOBS:
        _check_knob(config, key)
    _check_model(config)
    _check_data_and_batch(config)
    _check_train(config)
    _check_loss(config)
    if config.teacher.checkpoint is not None:
        _check_teacher(config)
    _check_learning_rate(config)
    _check_mesh(config)


def validate_model(model: ModelConfig) -> None:
    """Checks a resolved architecture by itself, such as a converted checkpoint's."""
    config = Config(model=model)
    for key in KNOBS:
        if key.startswith("model."):
            _check_knob(config, key)
    _check_model(config)


def _fail(config: Config, key: str, reason: str) -> NoReturn:
    raise UserError(f"{key} = {config[key]!r}: {reason}")


def _check_knob(config: Config, key: str) -> None:
    """Raises UserError unless the value is one of the knob's choices and within its bounds."""
    knob, value = KNOBS[key], config[key]
    if value is None:
        return
    if knob.choices is not None and value not in knob.choices:
        _fail(config, key, f"choose one of {', '.join(knob.choices)}")
    if knob.above is not None and not value > knob.above:
        _fail(config, key, knob.why or f"it must be greater than {knob.above:g}")
    if knob.low is not None and not value >= knob.low:
        _fail(config, key, f"it must be at least {knob.low:g}")
    if knob.high is not None and not value <= knob.high:
        _fail(config, key, f"it must be at most {knob.high:g}")
    if knob.below is not None and not value < knob.below:
        _fail(config, key, f"it must be below {knob.below:g}")


def _check_model(config: Config) -> None:
    model = config.model
    groups, head_width = model.groups, model.head_width
    if model.n_heads % groups:
        near = _largest_divisor(model.n_heads, groups)
        _fail(config, "model.n_groups", f"it must divide model.n_heads = {model.n_heads}; {near} does")
    if head_width * model.n_heads != model.d_model and model.head_dim == model.d_model // model.n_heads:
        _fail(config, "model.d_model", f"it is not a multiple of model.n_heads = {model.n_heads}; set model.head_dim")
    if model.position == "rope" and int(head_width * model.rope_fraction) % 2:
        _fail(config, "model.rope_fraction", f"it rotates an odd number of the head's {head_width} dimensions")
    llama3 = model.rope_llama3
    if llama3 is not None and (len(llama3) != 4 or min(llama3) <= 0 or llama3[1] >= llama3[2]):
        _fail(config, "model.rope_llama3", "give factor, low, high (above low), original positions: 8,1,4,8192 in 3.1")
    if model.keep_layers is not None and model.init_from is None:
        _fail(config, "model.keep_layers", "it selects layers of model.init_from, which is not set")
    if model.vocab_rows < model.vocab_size:
        _fail(config, "model.padded_vocab_size", f"it must be at least model.vocab_size = {model.vocab_size}")
    if model.position == "learned" and model.max_positions is None:
        _fail(config, "model.max_positions", "learned positions need their number")


def _check_data_and_batch(config: Config) -> None:
    data, batch, model = config.data, config.batch, config.model
    if model.max_positions is not None and model.max_positions < data.sequence_length:
        _fail(config, "data.sequence_length", f"the model has {model.max_positions} learned positions")
    if not data.train:
        _fail(config, "data.train", "name the files of training records")
    if data.top_k is not None and data.top_k > model.vocab_size:
        _fail(config, "data.top_k", f"it exceeds model.vocab_size = {model.vocab_size}")
    if batch.global_size % batch.microbatch_size:
        near = _largest_divisor(batch.global_size, batch.microbatch_size)
        _fail(config, "batch.microbatch_size", f"it must divide batch.global_size = {batch.global_size}; {near} does")


def _check_train(config: Config) -> None:
    train = config.train
    if train.early_stop_patience is not None and not config.data.val:
        _fail(config, "train.early_stop_patience", "stopping early needs validation records; set data.val")
    if config.checkpoint.keep_best and config.data.val and train.save_every % train.val_every:
        near = max(train.save_every // train.val_every, 1) * train.val_every
        _fail(
            config,
            "train.save_every",
            "to keep the best checkpoint, each save needs a validation before it: use a multiple of train.val_every = "
            f"{train.val_every}, such as {near}, or checkpoint.keep_best = 0",
        )
    if train.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        _fail(config, "train.wandb_project", "wandb is not installed; pip install 'kdjax[wandb]'")


def _check_loss(config: Config) -> None:
    objective = Objective.for_records(config.loss)
    objective.check("loss.")
    if config.loss.implementation is not None:
        check_implementation(config.loss.implementation, objective, prefix="loss.")
    require_one_temperature(config.data, config.loss.target_logits_scale)


def _check_teacher(config: Config) -> None:
    """Checks the knobs that go with a teacher on the mesh, which takes the place of cached entries."""
    Objective.from_settings(config.loss).check_whole("loss.")
    if config.loss.implementation not in TEACHER_IMPLEMENTATIONS:
        _fail(config, "loss.implementation", "it works on cached entries; with teacher.checkpoint use xla or none")
    if config.loss.include_vocab_padding:
        _fail(
            config,
            "loss.include_vocab_padding",
            "teacher.checkpoint is compared over token ids only, because its padding differs; set it to False",
        )
    if config.loss.kd_loss_weight == 0:
        _fail(config, "loss.kd_loss_weight", "teacher.checkpoint would run for nothing; leave teacher.checkpoint unset")
    for key in ("data.top_k", "data.kind", "data.teacher_temperature"):
        default = Config()[key]
        if config[key] != default:
            _fail(config, key, f"it is about cached entries, which teacher.checkpoint replaces; set it to {default}")


def require_one_temperature(data: DataConfig, target_logits_scale: float) -> None:
    """Raises UserError if the stored logits were divided by a temperature and the loss would scale them again."""
    if target_logits_scale != 1 and data.teacher_temperature != 1:
        raise UserError(
            f"loss.target_logits_scale = {target_logits_scale}: data.teacher_temperature = {data.teacher_temperature} "
            "says that the stored logits are already divided by a temperature, which would be applied twice; set 1"
        )


def _check_learning_rate(config: Config) -> None:
    optim, steps = config.optim, config.train.steps
    if optim.schedule == "constant":
        if optim.constant_steps:
            _fail(config, "optim.constant_steps", "the constant schedule does not use it; set it to 0")
        return
    if optim.min_lr > optim.lr:
        _fail(config, "optim.min_lr", f"it exceeds optim.lr = {optim.lr}; lower it (NeMo's default is lr / 33)")
    if optim.warmup_steps + optim.constant_steps >= steps:
        _fail(
            config,
            "optim.constant_steps" if optim.constant_steps else "optim.warmup_steps",
            f"warmup_steps {optim.warmup_steps} + constant_steps {optim.constant_steps} leave none of train.steps = "
            f"{steps} for the decay; together they may be at most {steps - 1}",
        )


def _check_mesh(config: Config) -> None:
    sizes = config.mesh.sizes
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            _fail(config, f"mesh.{axis}", "give a number of devices, or -1 for all that the other sizes leave")
    left_open = [axis for axis, size in sizes.items() if size == -1]
    if len(left_open) > 1:
        _fail(config, f"mesh.{left_open[1]}", f"mesh.{left_open[0]} is -1 too; only one size can be -1")
    if config.mesh.interleave > 1 and config.mesh.pipe == 1:
        _fail(config, "mesh.interleave", "there are no stages to interleave; set mesh.pipe, or mesh.interleave = 1")
    validate_split(config, {axis: size for axis, size in sizes.items() if size != -1})


def validate_split(config: Config, sizes: Mapping[str, int]) -> None:
    """Raises UserError if the model cannot be split over mesh axes of these sizes; absent axes count as 1."""
    model, pipe, tensor = config.model, sizes.get(PIPE, 1), sizes.get(TENSOR, 1)
    for name in ("n_heads", "n_groups", "d_ff"):
        size = getattr(model, name)
        if size % tensor:
            raise UserError(
                f"mesh.tensor = {tensor}: it must divide model.{name} = {size}; mesh.tensor = "
                f"{_largest_divisor(size, tensor)} does, or model.{name} = {-(-size // tensor) * tensor}"
            )
    rows, parts = model.vocab_rows, tensor * pipe
    if rows % parts:
        raise UserError(
            f"model.padded_vocab_size = {rows}: embedding and head are split over mesh.tensor {tensor} x mesh.pipe "
            f"{pipe} = {parts} devices, which must divide it; {-(-rows // parts) * parts} works, or "
            f"{_largest_divisor(rows, parts)} devices"
        )
    chunks = pipe * config.mesh.interleave
    if model.layers % chunks:
        below, above = model.layers // chunks * chunks, -(-model.layers // chunks) * chunks
        near = f"{below} or {above} layers" if below else f"{above} layers"
        raise UserError(
            f"mesh.pipe = {pipe}: model.layers = {model.layers} cannot be cut into {chunks} equal runs (mesh.pipe "
            f"{pipe} x mesh.interleave {config.mesh.interleave}); use mesh.pipe = "
            f"{_largest_divisor(model.layers, pipe)}, or {near} (model.keep_layers can select layers)"
        )


def _largest_divisor(size: int, limit: int) -> int:
    """Returns the largest divisor of `size` that is at most `limit`."""
    return next(n for n in range(limit, 0, -1) if size % n == 0)
