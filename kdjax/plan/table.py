"""A plan as text: memory, collectives, times."""

from collections.abc import Mapping
from typing import Any

from kdjax.plan.gpus import DEVICES_PER_HOST
from kdjax.plan.roofline import USABLE_MEMORY, Plan
from kdjax.types import GIB, MIB


def render(plan: Plan) -> str:
    """Returns the plan as lines of text."""
    config, capacity, schedule = plan.config, plan.gpu.memory, plan.schedule
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_shape.items())
    lines = [
        f"{plan.devices} x {plan.gpu.description}; mesh {sizes}; global batch {config.batch.global_size} x "
        f"{config.data.sequence_length} tokens, microbatch {config.batch.microbatch_size} x "
        f"{config.data.sequence_length}; remat {config.model.remat}; XLA flags {plan.flags}; compiled in "
        f"{plan.compile_s:.0f} s",
        "",
        "memory per device",
    ]
    lines += [*memory_lines(plan.memory, capacity), ""]
    lines += ["collectives per step and device", *(_collective_lines(plan) or ["  none"])]
    redone = "recomputation and bubble" if schedule.stages > 1 else "recomputation"
    bound_s = plan.lower_bound_s
    split = f"{plan.hidden_s:.3f} s hidden, {plan.exposed_s:.3f} s exposed"
    lines += [
        "",
        "step time, estimated from a roofline (see --help), not measured",
        f"  matmuls        {plan.matmul_s:9.3f} s  {plan.flops / 1e12:.1f} TFLOP per device, with {redone}",
        f"  compute        {plan.compute_s:9.3f} s  all kernels, including matmuls",
        f"  communication  {plan.communication_s:9.3f} s  of which {split}",
        f"  step           {plan.step_s:9.3f} s  compute + exposed communication; lower bound {bound_s:.3f} s",
        f"  tokens/s       {plan.tokens / plan.step_s:9,.0f}    upper bound {plan.tokens / bound_s:,.0f}",
        f"  MFU            {plan.mfu:9.1%}    of the GPU's bfloat16 peak, model operations without recomputation",
    ]
    if schedule.stages > 1:
        lines.append(
            f"  bubble         {schedule.bubble:9.1%}    of the layers' time: {schedule.stages} stages x "
            f"{schedule.chunks} chunks, {schedule.microbatches} microbatches"
        )
    return "\n".join(lines)


def memory_lines(memory: Mapping[str, int], capacity: int) -> list[str]:
    """Returns what a device holds, and whether that fits into `capacity` bytes."""
    total = sum(memory.values())
    lines = [f"  {name:34}{size / GIB:8.2f} GiB{size / capacity:7.0%}" for name, size in memory.items()]
    verdict = "fits" if total <= USABLE_MEMORY * capacity else "DOES NOT FIT"
    lines.append(f"  {'total':34}{total / GIB:8.2f} GiB{total / capacity:7.0%}")
    return [*lines, f"  {verdict}; limit: {USABLE_MEMORY:.0%} of {capacity / GIB:.1f} GiB"]


def _collective_lines(plan: Plan) -> list[str]:
    """Returns a table of what is sent over which mesh axes, how often, and how much of it compute hides."""
    rows: dict[tuple[Any, ...], list[float]] = {}
    for c in plan.collectives:
        key = (c.kind, c.axes(plan.mesh_shape), c.spans_hosts(DEVICES_PER_HOST), c.in_loop, c.is_overlapped)
        row = rows.setdefault(key, [0, 0, 0, 0])
        for i, more in enumerate((c.times, c.sent_bytes, plan.collective_s(c), plan.collective_hidden_s(c))):
            row[i] += more
    loop = "in ticks" if plan.schedule.stages > 1 else "in microbatches"
    lines, small = list[str](), 0
    for (kind, axes, across, in_loop, is_overlapped), (times, nbytes, seconds, hidden) in sorted(
        rows.items(), key=lambda row: -row[1][2]
    ):
        if nbytes < MIB:
            small += round(times)
            continue
        over, where = " x ".join(axes), "across hosts" if across else "within a host"
        when = loop if in_loop else "per step"
        overlap = f"overlapped, {hidden / seconds if seconds else 0:4.0%} hidden" if is_overlapped else "exposed"
        line = f"  {kind:19}over {over:20}{where:14}{times:6.0f} times {when:15}{nbytes / GIB:9.3f} GiB sent"
        lines.append(f"{line}{seconds:9.4f} s  {overlap}")
    return [*lines, f"  and {small} that send less than 1 MiB"] if small else lines
