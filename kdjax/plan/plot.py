"""A plan as a picture: a device's memory and its limit, where a step's time goes, and the pipeline's ticks."""

import itertools
from pathlib import Path
from typing import Any

from kdjax import cli
from kdjax.parallel.pipeline import Schedule
from kdjax.plan.gpus import DEVICES_PER_HOST
from kdjax.plan.roofline import USABLE_MEMORY, Plan
from kdjax.types import GIB

MAX_TICKS = 28  # drawn
FORWARD, BACKWARD, IDLE, LINE = "#77aadd", "#ee8866", "#eeeeee", "#cc3311"
# Paul Tol's "bright" and "light" schemes, which colour-blind readers can tell apart too.
MEMORY = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#bbbbbb", "#ee6677", "#aa3377")
TIME = {"compute": "#4477aa", "exposed communication": "#ee6677", "hidden communication": "#ccbb44"}


def draw(plan: Plan, name: str, path: Path) -> None:
    """Writes the picture of a plan; `name` is that of its configuration."""
    plt, piped = cli.pyplot(), plan.schedule.stages > 1
    figure = plt.figure(figsize=(12, 7.4 if piped else 4.6), layout="constrained")
    panels = figure.subplot_mosaic(
        [["memory", "time"], ["memory", "communication"], *([["ticks", "ticks"]] if piped else [])],
        width_ratios=[1, 1.7],
        height_ratios=[1, 1.6, 1.5] if piped else [1, 1.6],
    )
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_shape.items() if size > 1) or "one device"
    figure.suptitle(
        f"{name} on {plan.devices} x {plan.gpu.description}\n{sizes}; {plan.config.batch.microbatch_size} x "
        f"{plan.config.data.sequence_length} tokens a microbatch; remat {plan.config.model.remat}; times are estimates",
        fontsize=12,
    )
    _draw_memory(panels["memory"], plan)
    _draw_time(panels["time"], plan)
    _draw_communication(panels["communication"], plan)
    if piped:
        _draw_ticks(panels["ticks"], plan.schedule, plan.config.mesh.schedule == "gpipe")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_memory(axes: Any, plan: Plan) -> None:
    """Draws the parts of a device's memory as one bar, with lines at the limit and at the GPU's memory."""
    bottom, top = 0.0, max(plan.gpu.memory, plan.total_bytes) / GIB
    for (part, nbytes), colour in zip(plan.memory.items(), MEMORY, strict=False):
        size = nbytes / GIB
        axes.bar(0, size, bottom=bottom, width=0.8, color=colour, label=f"{part}: {size:.1f}" if size >= 0.05 else None)
        bottom += size
    axes.axhline(plan.gpu.memory / GIB, color="black", linewidth=1)
    axes.axhline(USABLE_MEMORY * plan.gpu.memory / GIB, color=LINE, linewidth=1, linestyle="--")
    limit = f"limit: {USABLE_MEMORY:.0%}"
    axes.text(3.3, 0.995 * USABLE_MEMORY * plan.gpu.memory / GIB, limit, color=LINE, ha="right", va="top", fontsize=9)
    axes.text(3.3, plan.gpu.memory / GIB, "GPU memory", ha="right", va="bottom", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8, frameon=False)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    axes.set(xlim=(-0.5, 3.4), ylim=(0, 1.1 * top), xticks=[], ylabel="GiB")
    axes.set_title(f"memory per device: {plan.total_bytes / GIB:.1f} GiB, {verdict}", fontsize=10)


def _draw_time(axes: Any, plan: Plan) -> None:
    """Draws the step as scheduled, and the hidden communication below it."""
    exposed, hidden, bound_s = plan.exposed_s, plan.hidden_s, plan.lower_bound_s
    for row, start, seconds, part in (
        (1, 0.0, plan.compute_s, "compute"),
        (1, plan.compute_s, exposed, "exposed communication"),
        (0, 0.0, hidden, "hidden communication"),
    ):
        axes.barh(row, seconds, left=start, color=TIME[part], label=f"{part}: {seconds:.3f} s", height=0.7)
    axes.axvline(bound_s, color="black", linestyle=":", linewidth=1, label=f"lower bound: {bound_s:.3f} s")
    axes.set(yticks=[], xlim=(0, 1.02 * max(plan.step_s, bound_s)))
    axes.xaxis.set_major_formatter("{x:g} s")
    axes.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    rate, bubble = plan.tokens / plan.step_s, f", bubble {plan.schedule.bubble:.0%}" if plan.schedule.stages > 1 else ""
    axes.set_title(f"step: {plan.step_s:.3f} s, {rate:,.0f} tokens/s, MFU {plan.mfu:.0%}{bubble}", fontsize=10)


def _draw_communication(axes: Any, plan: Plan) -> None:
    """Draws the seconds of each kind of collective, exposed and hidden."""
    sums: dict[str, tuple[float, float]] = {}
    for c in plan.collectives:
        where = "across hosts" if c.spans_hosts(DEVICES_PER_HOST) else "within a host"
        label = f"{c.kind}, {' x '.join(c.axes(plan.mesh_shape))} ({where})"
        seconds, hidden = sums.get(label, (0.0, 0.0))
        sums[label] = seconds + plan.collective_s(c), hidden + plan.collective_hidden_s(c)
    visible = [item for item in sums.items() if item[1][0] > 0.005 * plan.communication_s]
    rows = sorted(visible, key=lambda item: item[1][0])[-8:]
    for row, (_, (seconds, hidden)) in enumerate(rows):
        axes.barh(row, seconds - hidden, color=TIME["exposed communication"], height=0.7)
        axes.barh(row, hidden, left=seconds - hidden, color=TIME["hidden communication"], height=0.7)
    axes.set(yticks=range(len(rows)), xlim=(0, None))
    axes.xaxis.set_major_locator(cli.pyplot().MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g} s")
    axes.set_yticklabels([label for label, _ in rows], fontsize=8)
    axes.set_title("communication, by mesh axes" if rows else "no communication", fontsize=10)


def _draw_ticks(axes: Any, schedule: Schedule, gpipe: bool) -> None:
    """Draws the microbatch that each stage works on per tick: forward in the upper half of a row, backward below."""
    from matplotlib.patches import Rectangle

    half = schedule.phases[1].stop  # where GPipe turns to its backward pass
    last = 2 * half if gpipe else schedule.phases[-1].stop
    shown = min(last, MAX_TICKS)
    for stage, tick in itertools.product(range(schedule.stages), range(shown)):
        backward = schedule.forward(2 * half - 1 - tick, stage) if gpipe else schedule.backward(tick, stage)
        for item, y, colour in ((schedule.forward(tick, stage), stage, FORWARD), (backward, stage + 0.45, BACKWARD)):
            axes.add_patch(Rectangle((tick + 0.02, y), 0.96, 0.43, color=colour if item.exists else IDLE, linewidth=0))
            if item.exists:
                axes.text(tick + 0.5, y + 0.23, str(item.microbatch), fontsize=7, ha="center", va="center")
    stages = range(schedule.stages)
    axes.set(xlim=(0, shown), ylim=(schedule.stages, 0), xlabel="tick", yticks=[stage + 0.45 for stage in stages])
    axes.set_yticklabels([f"stage {stage}" for stage in stages], fontsize=8)
    axes.xaxis.set_major_locator(cli.pyplot().MultipleLocator(2))
    more = f"; the first {shown} of {last} ticks" if shown < last else ""
    axes.set_title(
        f"microbatches in the pipeline: forward above (blue), backward below (orange), idle grey; bubble "
        f"{schedule.bubble:.0%}{more}",
        fontsize=10,
    )
