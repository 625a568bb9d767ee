"""A plan as text: memory, collectives, times."""

from typing import Any

from kdjax.plan.gpus import DEVICES_PER_HOST
from kdjax.plan.roofline import FITS, Plan

MIB, GIB = 2**20, 2**30


def tell(plan: Plan) -> str:
    """The plan in words and numbers."""
    config, card, schedule = plan.config, plan.card.memory, plan.schedule
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.shape.items())
    lines = [
        f"{plan.devices} x {plan.card.description}; mesh {sizes}; {config.batch.global_size} rows of "
        f"{config.data.sequence_length} a step, {config.batch.microbatch_size} at once; remat {config.model.remat}; "
        f"XLA flags {plan.flags}; compiled in {plan.compile_s:.0f} s",
        "",
        "memory of a device",
    ]
    for name, size in [*plan.memory.items(), ("in all", plan.nbytes)]:
        lines.append(f"  {name:34}{size / GIB:8.2f} GiB{size / card:7.0%}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [
        f"  {verdict}: {FITS:.0%} of {card / GIB:.1f} GiB are to be had",
        "",
        "collectives of a step, on a device",
    ]
    lines += _tell_collectives(plan) or ["  none"]
    lines += [
        "",
        "a step, estimated from a roofline (see --help), not measured",
        f"  matmuls        {plan.matmul_s:9.3f} s  {plan.flops / 1e12:.1f} TFLOP a device, recomputation"
        f"{' and bubble' if schedule.stages > 1 else ''} included",
        f"  compute        {plan.compute_s:9.3f} s  all kernels, matmuls among them",
        f"  communication  {plan.wire_s:9.3f} s  of which {plan.hidden_s:.3f} s hidden, {plan.exposed_s:.3f} s exposed",
        f"  step           {plan.step_s:9.3f} s  as scheduled: compute + exposed; at best {plan.best_s:.3f} s",
        f"  tokens/s       {plan.tokens / plan.step_s:9,.0f}    at best {plan.tokens / plan.best_s:,.0f}",
        f"  MFU            {plan.mfu:9.1%}    model operations, nothing computed twice, at the card's bfloat16 peak",
    ]
    if schedule.stages > 1:
        lines.append(
            f"  bubble         {schedule.bubble:9.1%}    of the layers' time: {schedule.stages} stages x "
            f"{schedule.chunks} chunks, {schedule.microbatches} microbatches"
        )
    return "\n".join(lines)


def _tell_collectives(plan: Plan) -> list[str]:
    """A table: what is sent over which axes of the mesh, how often, how much of it hidden behind compute."""
    rows: dict[tuple[Any, ...], list[float]] = {}
    for c in plan.collectives:
        key = (c.kind, c.axes(plan.shape), c.spans(DEVICES_PER_HOST), c.in_loop, c.overlapped)
        row = rows.setdefault(key, [0, 0, 0, 0])
        for i, more in enumerate((c.times, c.wire_bytes, plan.sent_s(c), plan.hidden_part_s(c))):
            row[i] += more
    loop = "in ticks" if plan.schedule.stages > 1 else "in microbatches"
    lines, rest = list[str](), 0
    for (kind, axes, across, in_loop, overlapped), (times, nbytes, sent, hidden) in sorted(
        rows.items(), key=lambda row: -row[1][2]
    ):
        if nbytes < MIB:
            rest += round(times)
            continue
        over, where, often = " x ".join(axes), "across hosts" if across else "of a host", loop if in_loop else "a step"
        beside = f"overlapped, {hidden / sent if sent else 0:4.0%} hidden" if overlapped else "exposed"
        told = f"  {kind:19}over {over:20}{where:13}{times:6.0f} times {often:15}{nbytes / GIB:9.3f} GiB sent"
        lines.append(f"{told}{sent:9.4f} s  {beside}")
    return [*lines, f"  and {rest} times less than a MiB"] if rest else lines
