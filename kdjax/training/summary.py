"""The summary that a run prints before its first step: configuration, records, sizes, learning rate."""

import logging
import os

import jax

from kdjax import config as configs
from kdjax.config import Config
from kdjax.config.validate import validate_split
from kdjax.data.dataset import Dataset
from kdjax.losses import Objective
from kdjax.model import param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.parallel.axes import TENSOR
from kdjax.training.layout import Layout
from kdjax.training.memory import held_bytes
from kdjax.training.optim import learning_rate
from kdjax.types import GIB, UserError

log = logging.getLogger("kdjax")


def check_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError when these devices cannot run the configuration."""
    meshes.check_batch(mesh, config.batch.global_size, config.batch.microbatch_size)
    validate_split(config, mesh.shape)
    device = mesh.devices.flat[0]
    if meshes.spans_hosts(mesh, TENSOR):
        log.warning("mesh.tensor = %d spans hosts: every layer waits for the network between them", mesh.shape[TENSOR])
    if config.model.attention == "cudnn" and device.platform != "gpu":
        raise UserError(
            f"model.attention = 'cudnn' needs an NVIDIA GPU, and this device is {device.device_kind}; use 'xla'"
        )


def print_summary(layout: Layout, train_set: Dataset, val_set: Dataset | None) -> None:
    """Prints the summary. Raises UserError when the state or the batches cannot fit in memory."""
    config = layout.config
    changed = configs.differences(Config(), config)
    print("configuration (values that differ from the defaults; config.json has all of them):")
    print("\n".join(f"  {key} = {value!r}" for key, _, value in changed))
    for name, data in (("train", train_set), ("val", val_set)):
        if data is not None:
            print("\n".join(f"{name}: {line}" for line in data.summary()))
    objective = Objective.from_settings(config.loss)
    if layout.teacher is not None:
        print(_teacher(layout, layout.teacher))
    if train_set.top_k == 1 and not objective.needs_teacher_log_sum and objective.kd_loss_weight > 0:
        log.warning(
            "with one teacher entry per position, renormalised, the KD loss is always 0; use loss.tail = 'ghost'"
        )
    print(_sizes(layout, train_set.top_k))
    print(_learning_rates(config), flush=True)


def _teacher(layout: Layout, teacher: Layout) -> str:
    """Returns the line about the teacher that the student learns from."""
    config, model = layout.config, teacher.config.model
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    return (
        f"learns from {config.teacher.checkpoint} on the mesh ({count:,} parameters, {model.layers} layers, "
        f"{model.dtype}, {held_bytes(layout)['teacher'] / GIB:.2f} GiB on each device): {config.loss.kd_loss} over all "
        f"{model.vocab_size:,} token ids"
    )


def _sizes(layout: Layout, top_k: int) -> str:
    """Returns the line about memory. Raises UserError when something does not fit."""
    config, mesh = layout.config, layout.mesh
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config.model)))
    state = sum(held_bytes(layout).values())
    T = config.data.sequence_length
    entry = 12 if config.loss.targets == "sampled" else 8  # bytes
    batch = config.batch.global_size * T * (entry * top_k + 16)
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = stats.get("bytes_limit", host // len(mesh.local_devices))
    if state > available:
        raise UserError(
            f"parameters, gradients and optimiser state take {state / GIB:.1f} GiB ({count:,} parameters) and {device} "
            f"has {available / GIB:.1f} GiB; raise mesh.tensor or mesh.pipe to split all of them over more devices, or "
            "mesh.fsdp to split all but the gradients"
        )
    rows = meshes.process_rows(mesh, config.batch.global_size)
    here = batch * (rows.stop - rows.start) // config.batch.global_size
    if here * (config.data.prefetch + 1) > host:
        raise UserError(
            f"batch.global_size {config.batch.global_size} x data.sequence_length {T} x {top_k} teacher entries take "
            f"{here / GIB:.1f} GiB a batch, {config.data.prefetch + 1} batches at once; the host has {host / GIB:.1f} "
            "GiB; lower data.top_k, data.prefetch or batch.global_size"
        )
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return (
        f"{count:,} parameters; {state / GIB:.2f} GiB of parameters, gradients and optimiser state "
        f"{'' if layout.teacher is None else 'and teacher '}on each device; "
        f"{batch / 2**20:.1f} MiB a global batch; {mesh.size} x {device.device_kind} ({shape})"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
    )


def _learning_rates(config: Config) -> str:
    steps, rate = config.train.steps, learning_rate(config.optim, config.train.steps)
    marks = {0, config.optim.warmup_steps, steps // 4, steps // 2, 3 * steps // 4, steps - 1} & set(range(steps))
    return "learning rate: " + ", ".join(f"step {step}: {float(rate(step)):.3g}" for step in sorted(marks))
