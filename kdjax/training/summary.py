"""What a run says before its first step: the configuration, the records, the size of things, the learning rate."""

import logging
import os

import jax

from kdjax import config as configs
from kdjax.config import Config
from kdjax.config.validate import validate_split
from kdjax.data.dataset import Dataset
from kdjax.model import param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.training.memory import held
from kdjax.training.optim import schedule
from kdjax.types import UserError

log = logging.getLogger("kdjax")

GIB = 2**30


def check_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError when these devices cannot do what the configuration asks of them."""
    meshes.check_split(mesh, config.batch)
    validate_split(config, mesh.shape)
    device = mesh.devices.flat[0]
    if meshes.spans_hosts(mesh, "tensor"):
        log.warning(
            "mesh.tensor = %d spans hosts, so that every layer waits for the network between them", mesh.shape["tensor"]
        )
    if config.model.attention == "cudnn" and device.platform != "gpu":
        raise UserError(
            f"model.attention = 'cudnn' needs an NVIDIA GPU, and this is {device.device_kind}; 'xla' runs here"
        )


def tell(config: Config, mesh: jax.sharding.Mesh, train_set: Dataset, val_set: Dataset | None) -> None:
    """Prints it all. Raises UserError when the state or the batches cannot fit in memory."""
    changed = configs.differences(Config(), config)
    print("configuration (where it differs from the defaults; all of it is in config.json):")
    print("\n".join(f"  {key} = {value!r}" for key, _, value in changed))
    for name, data in (("train", train_set), ("val", val_set)):
        if data is not None:
            print("\n".join(f"{name}: {line}" for line in data.summary()))
    if train_set.top_k == 1 and config.loss.tail == "renormalize" and config.loss.kd_loss_weight > 0:
        log.warning(
            "one teacher entry a position, renormalised: the KD term is identically 0; loss.tail = 'ghost' is not"
        )
    print(_sizes(config, mesh, train_set))
    print(_rates(config), flush=True)


def _sizes(config: Config, mesh: jax.sharding.Mesh, train_set: Dataset) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config.model)))
    state = sum(held(config, mesh).values())
    T, K = config.data.sequence_length, train_set.top_k
    batch = config.batch.global_size * T * (8 * K + 16)
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    have = stats.get("bytes_limit", host // len(mesh.local_devices))
    if state > have:
        raise UserError(
            f"parameters, gradients and optimiser state take {state / GIB:.1f} GiB ({count:,} parameters) and {device} "
            f"has {have / GIB:.1f} GiB; mesh.tensor and mesh.pipe split all of them over more devices, mesh.fsdp some"
        )
    rows = meshes.process_rows(mesh, config.batch.global_size)
    here = batch * (rows.stop - rows.start) // config.batch.global_size
    if here * (config.data.prefetch + 1) > host:
        raise UserError(
            f"batch.global_size {config.batch.global_size} x data.sequence_length {T} x {K} teacher entries take "
            f"{here / GIB:.1f} GiB a batch, {config.data.prefetch + 1} at once; the host has {host / GIB:.1f}; lower "
            "data.top_k, data.prefetch or batch.global_size"
        )
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return (
        f"{count:,} parameters; {state / GIB:.2f} GiB of parameters, gradients and optimiser state on each device; "
        f"{batch / 2**20:.1f} MiB a global batch; {mesh.size} x {device.device_kind} ({shape})"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
    )


def _rates(config: Config) -> str:
    steps, rate = config.train.steps, schedule(config.optim, config.train.steps)
    marks = sorted(
        {0, config.optim.warmup_steps, steps // 4, steps // 2, 3 * steps // 4, steps - 1} & set(range(steps))
    )
    return "learning rate: " + ", ".join(f"step {step}: {float(rate(step)):.3g}" for step in marks)
