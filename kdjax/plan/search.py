"""Which mesh, microbatch size and recomputation suit some devices: many are considered, few compiled.

Every candidate gets two numbers without compiling: a lower bound of its memory (what a device holds throughout a step,
the inputs that a stage keeps, what a layer keeps for its backward pass) and a guess of its step (model operations with
recomputation and the pipeline's bubble, writing and reading what is kept, and all communication, none of it hidden).
Those that cannot fit are dropped, the others compiled in the order of the guess as far as the budget goes, some of each
kind of mesh. What was compiled is ranked by the estimate.
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdjax import config as configs
from kdjax.config import Config
from kdjax.config.validate import validate
from kdjax.parallel import mesh as meshes
from kdjax.plan.gpus import DEVICES_PER_HOST, TARGETS, Target
from kdjax.plan.roofline import FITS, GEMM_SHARE, Plan, matmul_parameters, model_flops, schedule
from kdjax.training.memory import held
from kdjax.types import UserError

GIB = 2**30
MICROBATCHES = (1, 2, 4)  # rows
REMAT = ("none", "dots", "layer")  # the first keeps most
INTERLEAVE = (1, 2)
LIKENESS = 0.05  # a candidate counts as so much slower for each better one of the same pipe and tensor


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run; what is known before it is compiled."""

    config: Config  # every size of its mesh is given
    floor: int  # bytes a device needs at least
    guess_s: float  # a step

    @property
    def fits_where(self) -> tuple[Any, int, int]:
        """The choices that memory depends on: if it does not fit, neither do those with the same first and more of the
        others.
        """
        keeps = len(REMAT) - REMAT.index(self.config.model.remat)
        return dataclasses.astuple(self.config.mesh), self.config.batch.microbatch_size, keeps


def search(
    config: Config, target: str, devices: Sequence[jax.Device], budget: int, make: Callable[[Config], Plan]
) -> list[Plan]:
    """Plans of at most `budget` candidates, the fitting ones first, then by estimated step. Prints its progress.

    Raises UserError when there is no candidate.
    """
    possible = list(candidates(config, TARGETS[target], devices))
    left = in_order(c for c in possible if c.floor <= FITS * TARGETS[target].memory)
    print(
        f"{len(possible)} candidates (mesh, microbatch, remat, interleave); {len(possible) - len(left)} cannot fit, by "
        f"a lower bound of their memory; of {len(left)} the most promising {min(budget, len(left))} are compiled",
        flush=True,
    )
    if not left:
        needs = min((c.floor for c in possible), default=0) / GIB
        raise UserError(
            f"nothing fits {len(devices)} x {target}: "
            + (f"the least needs {needs:.1f} GiB a device; give more --devices" if possible else "no mesh divides them")
        )
    plans, too_large, skipped, began = list[Plan](), list[Candidate](), 0, time.monotonic()
    while left and len(plans) < budget:
        # When nothing fits for long, the smallest is the likeliest to.
        desperate = not any(plan.fits for plan in plans) and len(plans) >= budget // 2
        candidate = min(left, key=lambda c: c.floor) if desperate else left[0]
        left.remove(candidate)
        if any(_at_least(candidate.fits_where, other.fits_where) for other in too_large):
            skipped += 1
            continue
        plans.append(make(candidate.config))
        if not plans[-1].fits:
            too_large.append(candidate)
        print(f"{len(plans):3} of {budget} {time.monotonic() - began:5.0f} s  {one_line(plans[-1])}", flush=True)
    print(f"{len(plans)} compiled, {skipped} skipped for needing more than one that does not fit, {len(left)} left")
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.nbytes))


def in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The most promising first, but not all of them alike: the guess is no better than `LIKENESS`."""
    alike = Counter[tuple[int, int]]()
    keyed = []
    for candidate in sorted(candidates, key=lambda c: c.guess_s):
        kind = candidate.config.mesh.pipe, candidate.config.mesh.tensor
        keyed.append((candidate.guess_s * (1 + LIKENESS * alike[kind]), candidate))
        alike[kind] += 1
    return [candidate for _, candidate in sorted(keyed, key=lambda pair: pair[0])]


def _at_least(one: tuple[Any, int, int], other: tuple[Any, int, int]) -> bool:
    return one[0] == other[0] and one[1] >= other[1] and one[2] >= other[2]


def one_line(plan: Plan) -> str:
    """A plan's choices and what they lead to."""
    config, fits = plan.config, "fits" if plan.fits else "too large"
    sizes = " x ".join(f"{axis} {size:<3}" for axis, size in plan.shape.items())
    chosen = f"interleave {config.mesh.interleave}  rows {config.batch.microbatch_size}  remat {config.model.remat:5}"
    return f"{sizes}  {chosen}  {plan.nbytes / GIB:6.1f} GiB {fits:9}  step {plan.step_s:7.3f} s  MFU {plan.mfu:3.0%}"


def flags(plan: Plan) -> str:
    """What to type for it."""
    config = plan.config
    chosen: dict[str, Any] = {f"mesh.{axis}": size for axis, size in plan.shape.items()}
    chosen |= {"mesh.interleave": config.mesh.interleave, "batch.microbatch_size": config.batch.microbatch_size}
    chosen |= {"model.remat": config.model.remat}
    return " ".join(f"--config.{key}={value}" for key, value in chosen.items())


def candidates(config: Config, target: Target, devices: Sequence[jax.Device]) -> Iterator[Candidate]:
    """All that the model, the batch and the devices allow. Tensor parallelism stays within a host."""
    count = len(devices)
    rows = sorted({*MICROBATCHES, config.batch.microbatch_size})
    for pipe, tensor in itertools.product(_divisors(count), _divisors(min(count, DEVICES_PER_HOST))):
        if config.model.layers % pipe or count % (pipe * tensor):
            continue
        for fsdp in _divisors(count // (pipe * tensor)):
            sizes = {"mesh__pipe": pipe, "mesh__tensor": tensor, "mesh__fsdp": fsdp}
            sizes["mesh__data"] = count // (pipe * tensor * fsdp)
            meshed = configs.replace(config, **sizes, mesh__interleave=1)
            if not _possible(meshed):
                continue
            mesh = meshes.make_mesh(meshed.mesh, devices)
            holds = held(meshed, mesh)
            for size, remat, chunks in itertools.product(rows, REMAT, INTERLEAVE if pipe > 1 else (1,)):
                changed = configs.replace(
                    meshed, batch__microbatch_size=size, model__remat=remat, mesh__interleave=chunks
                )
                if _possible(changed, mesh):
                    floor = sum(holds.values()) + kept(changed, mesh)
                    yield Candidate(changed, floor, guess_s(changed, mesh, target, holds))


def _possible(config: Config, mesh: Mesh | None = None) -> bool:
    try:
        validate(config)
        if mesh is not None:
            meshes.check_split(mesh, config.batch)
    except UserError:
        return False
    return True


def kept(config: Config, mesh: Mesh) -> int:
    """Bytes of activations that a device keeps at least, between forward and backward pass."""
    model, shape, ring = config.model, mesh.shape, schedule(config, dict(mesh.shape)).ring
    width, positions = shape["tensor"], config.batch.microbatch_size * config.data.sequence_length
    itemsize = jnp.dtype(model.dtype).itemsize
    heads, head = model.n_heads, model.head_width
    layer = model.d_model
    if model.remat != "layer":  # queries, keys, values, their output, the MLP's two or three
        layer += 2 * model.d_model
        layer += ((heads + 2 * model.groups) * head + model.d_ff * _ups(config)) // width
    if model.remat == "none" and model.attention == "xla":
        layer += heads // width * config.data.sequence_length  # the scores
    layers = model.layers // (shape["pipe"] * config.mesh.interleave)
    stages = ring * model.d_model if shape["pipe"] > 1 else 0
    return (layers * layer + stages) * positions * itemsize


def _ups(config: Config) -> int:
    return 2 if config.model.activation == "swiglu" else 1


def guess_s(config: Config, mesh: Mesh, target: Target, holds: dict[str, int]) -> float:
    """Seconds of a step, roughly: what candidates are put in order by."""
    model, shape, plan = config.model, mesh.shape, schedule(config, dict(mesh.shape))
    pipe, tensor, fsdp, data = (shape[axis] for axis in ("pipe", "tensor", "fsdp", "data"))
    head = model.vocab_size * model.d_model / matmul_parameters(config)
    forward_s = model_flops(config) / 3 / mesh.size / (GEMM_SHARE * target.peak)
    passes = 3 + (model.remat == "layer") + (pipe > 1)  # a pipeline keeps a chunk's input, and computes it again
    compute_s = forward_s * (passes * (1 - head) / (1 - plan.bubble) + 3 * head)

    x = config.batch.microbatch_size * config.data.sequence_length * model.d_model * jnp.dtype(model.dtype).itemsize
    runs = plan.items + plan.stages - 1  # of a chunk
    sums = 2 * (passes - 1) * model.layers / (pipe * config.mesh.interleave) * runs  # two a layer and pass

    def ring_s(nbytes: float, size: int, each: int) -> float:
        """Over `size` devices, one in `each`."""
        ports = target.port * max(1, DEVICES_PER_HOST // each)
        across = size * each > DEVICES_PER_HOST
        return nbytes * (size - 1) / size / (min(ports, target.nvlink) if across else target.nvlink)

    whole = holds["parameters, gathered and rounded"]
    return (
        compute_s
        + 2 * kept(config, mesh) * plan.microbatches * plan.chunks / target.memory_bandwidth
        + sums * ring_s(2 * x, tensor, 1)
        + ring_s(whole, fsdp, tensor)
        + ring_s(holds["gradients"], fsdp, tensor)
        + ring_s(2 * holds["parameters"], data, fsdp * tensor)
        + ring_s(4 * x * (runs + plan.microbatches), pipe, data * fsdp * tensor)
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
