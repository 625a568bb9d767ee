"""Searches for the mesh, microbatch size and rematerialisation that suit some devices best.

Every candidate gets two numbers without being compiled: a lower bound of its memory (what a device holds throughout a
step, the inputs that a stage keeps, and what a layer keeps for its backward pass) and a rough step time (model
operations with recomputation and the pipeline's bubble, writing and reading what is kept, and all communication, none
of it hidden). Candidates that cannot fit are dropped. The others are compiled in the order of the rough step time, some
of each kind of mesh, until the budget is spent, and then ranked by their plans.
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
from kdjax.checkpoint import lay_out, read_teacher
from kdjax.config import Config
from kdjax.config.validate import validate
from kdjax.parallel import mesh as meshes
from kdjax.parallel.axes import DATA, FSDP, PIPE, TENSOR
from kdjax.plan.gpus import DEVICES_PER_HOST, TARGETS, Target
from kdjax.plan.roofline import GEMM_EFFICIENCY, USABLE_MEMORY, Plan, matmul_parameters, model_flops
from kdjax.training.layout import pipeline_schedule
from kdjax.training.memory import held_bytes
from kdjax.types import GIB, UserError

MICROBATCHES = (1, 2, 4)  # rows
REMAT = ("none", "dots", "layer")  # the first keeps most
INTERLEAVE = (1, 2)
SIMILARITY_PENALTY = 0.05  # relative time added per better candidate with the same pipe and tensor


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run, before it is compiled."""

    config: Config  # with every size of its mesh given
    min_bytes: int  # lower bound of a device's memory
    rough_step_s: float

    def needs_at_least(self, other: "Candidate") -> bool:
        """Returns whether this needs no less memory than `other`: the same mesh, and no less of what takes memory."""
        mine, theirs = self.config, other.config
        return (
            mine.mesh == theirs.mesh
            and mine.batch.microbatch_size >= theirs.batch.microbatch_size
            and REMAT.index(mine.model.remat) <= REMAT.index(theirs.model.remat)
        )


def search(
    config: Config, target: str, devices: Sequence[jax.Device], budget: int, make: Callable[[Config], Plan]
) -> list[Plan]:
    """Returns the plans of at most `budget` candidates, those that fit first, then by step time. Prints its progress.

    `target` is a key of TARGETS; `make` compiles a configuration. Raises UserError when no candidate can fit.
    """
    possible = list(candidates(config, TARGETS[target], devices))
    remaining = by_promise(c for c in possible if c.min_bytes <= USABLE_MEMORY * TARGETS[target].memory)
    print(
        f"{len(possible)} candidates (mesh, microbatch, remat, interleave), of which {len(possible) - len(remaining)} "
        f"cannot fit by a lower bound of their memory; compiling the {min(budget, len(remaining))} most promising",
        flush=True,
    )
    if not remaining:
        needs = f"the least needs {min(c.min_bytes for c in possible) / GIB:.1f} GiB per device" if possible else ""
        reason = f"{needs}; give more --devices" if possible else "no mesh divides them"
        raise UserError(f"nothing fits {len(devices)} x {target}: {reason}")
    plans, too_large, skipped, began = list[Plan](), list[Candidate](), 0, time.monotonic()
    while remaining and len(plans) < budget:
        # If nothing fits for half of the budget, try the smallest first.
        smallest_first = not any(plan.fits for plan in plans) and len(plans) >= budget // 2
        candidate = min(remaining, key=lambda c: c.min_bytes) if smallest_first else remaining[0]
        remaining.remove(candidate)
        if any(candidate.needs_at_least(other) for other in too_large):
            skipped += 1
            continue
        plans.append(make(candidate.config))
        if not plans[-1].fits:
            too_large.append(candidate)
        print(f"{len(plans):3} of {budget} {time.monotonic() - began:5.0f} s  {summary_line(plans[-1])}", flush=True)
    print(
        f"{len(plans)} compiled, {skipped} skipped because they need more than one that does not fit, "
        f"{len(remaining)} not tried"
    )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.total_bytes))


def by_promise(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Returns the candidates by rough step time, with those alike spread out, since that time is not precise."""
    better = Counter[tuple[int, int]]()
    penalised = []
    for candidate in sorted(candidates, key=lambda c: c.rough_step_s):
        kind = candidate.config.mesh.pipe, candidate.config.mesh.tensor
        penalised.append((candidate.rough_step_s * (1 + SIMILARITY_PENALTY * better[kind]), candidate))
        better[kind] += 1
    return [candidate for _, candidate in sorted(penalised, key=lambda pair: pair[0])]


def summary_line(plan: Plan) -> str:
    """Returns a plan's choices, memory and step time in one line."""
    config, fits = plan.config, "fits" if plan.fits else "too large"
    sizes = " x ".join(f"{axis} {size:<3}" for axis, size in plan.mesh_shape.items())
    chosen = f"interleave {config.mesh.interleave}  rows {config.batch.microbatch_size}  remat {config.model.remat:5}"
    memory = f"{plan.total_bytes / GIB:6.1f} GiB {fits:9}"
    return f"{sizes}  {chosen}  {memory}  step {plan.step_s:7.3f} s  MFU {plan.mfu:3.0%}"


def config_flags(plan: Plan) -> str:
    """Returns the command-line flags that choose this plan."""
    config = plan.config
    chosen: dict[str, Any] = {f"mesh.{axis}": size for axis, size in plan.mesh_shape.items()}
    chosen |= {"mesh.interleave": config.mesh.interleave, "batch.microbatch_size": config.batch.microbatch_size}
    chosen |= {"model.remat": config.model.remat}
    return " ".join(f"--config.{key}={value}" for key, value in chosen.items())


def candidates(config: Config, target: Target, devices: Sequence[jax.Device]) -> Iterator[Candidate]:
    """Yields all that model, batch and devices allow, with tensor parallelism within a host only."""
    count = len(devices)
    rows = sorted({*MICROBATCHES, config.batch.microbatch_size})
    for pipe, tensor in itertools.product(_divisors(count), _divisors(min(count, DEVICES_PER_HOST))):
        if config.model.layers % pipe or count % (pipe * tensor):
            continue
        for fsdp in _divisors(count // (pipe * tensor)):
            sizes = {PIPE: pipe, TENSOR: tensor, FSDP: fsdp, DATA: count // (pipe * tensor * fsdp)}
            changes = {f"mesh__{axis}": size for axis, size in sizes.items()}
            meshed = configs.replace(config, **changes, mesh__interleave=1)
            if not _is_possible(meshed):
                continue
            mesh, teacher = meshes.make_mesh(sizes, devices), read_teacher(meshed)
            try:
                held = held_bytes(lay_out(meshed, teacher, mesh))
            except UserError:  # the teacher cannot be split like this
                continue
            for size, remat, chunks in itertools.product(rows, REMAT, INTERLEAVE if pipe > 1 else (1,)):
                changed = configs.replace(
                    meshed, batch__microbatch_size=size, model__remat=remat, mesh__interleave=chunks
                )
                if _is_possible(changed, mesh):
                    min_bytes = sum(held.values()) + activation_bytes(changed, mesh)
                    step_s = rough_step_s(changed, mesh, target, held)
                    if teacher is not None:
                        step_s += forward_s(dataclasses.replace(teacher, batch=changed.batch), mesh, target)
                    yield Candidate(changed, min_bytes, step_s)


def _is_possible(config: Config, mesh: Mesh | None = None) -> bool:
    try:
        validate(config)
        if mesh is not None:
            meshes.check_batch(mesh, config.batch.global_size, config.batch.microbatch_size)
    except UserError:
        return False
    return True


def activation_bytes(config: Config, mesh: Mesh) -> int:
    """Returns a lower bound of the activations that a device keeps between forward and backward pass, in bytes."""
    model, shape, ring = config.model, mesh.shape, pipeline_schedule(config, mesh.shape).ring
    width, positions = shape[TENSOR], config.batch.microbatch_size * config.data.sequence_length
    itemsize = jnp.dtype(model.dtype).itemsize
    per_layer = model.d_model
    if model.remat != "layer":  # queries, keys, values, their output, the MLP's two or three
        ups = 2 if model.activation == "swiglu" else 1
        per_layer += 2 * model.d_model
        per_layer += ((model.n_heads + 2 * model.groups) * model.head_width + model.d_ff * ups) // width
    if model.remat == "none" and model.attention == "xla":
        per_layer += model.n_heads // width * config.data.sequence_length  # the scores
    layers = model.layers // (shape[PIPE] * config.mesh.interleave)
    stage_inputs = ring * model.d_model if shape[PIPE] > 1 else 0
    return (layers * per_layer + stage_inputs) * positions * itemsize


def rough_step_s(config: Config, mesh: Mesh, target: Target, held: dict[str, int]) -> float:
    """Returns a rough step time in seconds, to order candidates by. `held` is `held_bytes`."""
    model, shape, schedule = config.model, mesh.shape, pipeline_schedule(config, mesh.shape)
    pipe, tensor, fsdp, data = (shape[axis] for axis in (PIPE, TENSOR, FSDP, DATA))
    head = model.vocab_size * model.d_model / matmul_parameters(config)
    matmul_s = model_flops(config) / 3 / mesh.size / (GEMM_EFFICIENCY * target.peak)
    passes = 3 + (model.remat == "layer") + (pipe > 1)  # a pipeline keeps a chunk's input, and computes it again
    compute_s = matmul_s * (passes * (1 - head) / (1 - schedule.bubble) + 3 * head)

    x = config.batch.microbatch_size * config.data.sequence_length * model.d_model * jnp.dtype(model.dtype).itemsize
    runs = schedule.items + schedule.stages - 1  # of a chunk
    sums = 2 * (passes - 1) * model.layers / (pipe * config.mesh.interleave) * runs  # two per layer and pass

    def ring_s(nbytes: float, size: int, stride: int) -> float:
        """Returns the seconds of a ring over `size` devices, each `stride` devices from the next."""
        ports = target.port * max(1, DEVICES_PER_HOST // stride)
        spans_hosts = size * stride > DEVICES_PER_HOST
        return nbytes * (size - 1) / size / (min(ports, target.nvlink) if spans_hosts else target.nvlink)

    gathered = held["parameters, gathered and rounded"]
    return (
        compute_s
        + 2 * activation_bytes(config, mesh) * schedule.microbatches * schedule.chunks / target.memory_bandwidth
        + sums * ring_s(2 * x, tensor, 1)
        + ring_s(gathered, fsdp, tensor)
        + ring_s(held["gradients"], fsdp, tensor)
        + ring_s(2 * held["parameters"], data, fsdp * tensor)
        + ring_s(4 * x * (runs + schedule.microbatches), pipe, data * fsdp * tensor)
    )


def forward_s(teacher: Config, mesh: Mesh, target: Target) -> float:
    """Returns the rough seconds of a teacher's forward pass, without its communication."""
    matmul_s = model_flops(teacher) / 3 / mesh.size / (GEMM_EFFICIENCY * target.peak)
    return matmul_s / (1 - pipeline_schedule(teacher, mesh.shape).bubble)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
