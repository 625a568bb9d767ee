"""A plan as a picture: a device's memory against its card, where a step's time goes, and the pipeline's ticks."""

from pathlib import Path
from typing import Any

from kdjax.parallel.pipeline import Schedule
from kdjax.plan.gpus import DEVICES_PER_HOST
from kdjax.plan.roofline import FITS, Plan
from kdjax.types import UserError

GIB = 2**30
SUFFIXES = (".svg", ".png")
TICKS = 28  # drawn at most
FORWARD, BACKWARD, IDLE, LINE = "#77aadd", "#ee8866", "#eeeeee", "#cc3311"
# Paul Tol's "bright" and "light" schemes: told apart by colour-blind readers too.
MEMORY = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#bbbbbb", "#ee6677", "#aa3377")
TIME = {"compute": "#4477aa", "exposed communication": "#ee6677", "hidden communication": "#ccbb44"}


def check(path: Path) -> None:
    """Raises UserError where no picture could be written there, before any time is spent on its contents."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--picture {path}: name a file that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no directory {path.absolute().parent}")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--picture draws with matplotlib: pip install 'kdjax[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched and read aloud
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(plan: Plan, name: str, path: Path) -> None:
    """Writes the picture; `name` is the configuration's."""
    plt, piped = _pyplot(), plan.schedule.stages > 1
    figure = plt.figure(figsize=(12, 7.4 if piped else 4.6), layout="constrained")
    panels = figure.subplot_mosaic(
        [["memory", "time"], ["memory", "sent"], ["ticks", "ticks"]]
        if piped
        else [["memory", "time"], ["memory", "sent"]],
        width_ratios=[1, 1.7],
        height_ratios=[1, 1.6, 1.5] if piped else [1, 1.6],
    )
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.shape.items() if size > 1) or "one device"
    figure.suptitle(
        f"{name} on {plan.devices} x {plan.card.description}\n{sizes}; {plan.config.batch.microbatch_size} x "
        f"{plan.config.data.sequence_length} tokens a microbatch; remat {plan.config.model.remat}; times are estimates",
        fontsize=12,
    )
    _memory(panels["memory"], plan)
    _time(panels["time"], plan)
    _sent(panels["sent"], plan)
    if piped:
        _ticks(panels["ticks"], plan.schedule, plan.config.mesh.schedule == "gpipe")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _memory(axes: Any, plan: Plan) -> None:
    """A bar of a device's bytes, the largest part at the bottom, beside the card's."""
    bottom, top = 0.0, max(plan.card.memory, plan.nbytes) / GIB
    for (part, nbytes), colour in zip(plan.memory.items(), MEMORY, strict=False):
        size = nbytes / GIB
        axes.bar(0, size, bottom=bottom, width=0.8, color=colour, label=f"{part}: {size:.1f}" if size >= 0.05 else None)
        bottom += size
    axes.axhline(plan.card.memory / GIB, color="black", linewidth=1)
    axes.axhline(FITS * plan.card.memory / GIB, color=LINE, linewidth=1, linestyle="--")
    axes.text(
        3.3,
        0.995 * FITS * plan.card.memory / GIB,
        f"{FITS:.0%}: what fits",
        color=LINE,
        ha="right",
        va="top",
        fontsize=9,
    )
    axes.text(3.3, plan.card.memory / GIB, "the card", ha="right", va="bottom", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8, frameon=False)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    axes.set(xlim=(-0.5, 3.4), ylim=(0, 1.1 * top), xticks=[], ylabel="GiB")
    axes.set_title(f"memory of a device: {plan.nbytes / GIB:.1f} GiB, {verdict}", fontsize=10)


def _time(axes: Any, plan: Plan) -> None:
    """The step as scheduled, and what hides beneath it."""
    exposed, hidden = plan.exposed_s, plan.hidden_s
    for row, start, seconds, part in (
        (1, 0.0, plan.compute_s, "compute"),
        (1, plan.compute_s, exposed, "exposed communication"),
        (0, 0.0, hidden, "hidden communication"),
    ):
        axes.barh(row, seconds, left=start, color=TIME[part], label=f"{part}: {seconds:.3f} s", height=0.7)
    axes.axvline(plan.best_s, color="black", linestyle=":", linewidth=1, label=f"at best: {plan.best_s:.3f} s")
    axes.set(yticks=[], xlim=(0, 1.02 * max(plan.step_s, plan.best_s)))
    axes.xaxis.set_major_formatter("{x:g} s")
    axes.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    rate, bubble = plan.tokens / plan.step_s, f", bubble {plan.schedule.bubble:.0%}" if plan.schedule.stages > 1 else ""
    axes.set_title(f"a step: {plan.step_s:.3f} s, {rate:,.0f} tokens/s, MFU {plan.mfu:.0%}{bubble}", fontsize=10)


def _sent(axes: Any, plan: Plan) -> None:
    """Each kind of collective: seconds, and how much of them is hidden."""
    sums: dict[str, tuple[float, float]] = {}
    for c in plan.collectives:
        across = "hosts" if c.spans(DEVICES_PER_HOST) else "a host"
        label = f"{c.kind}, {' x '.join(c.axes(plan.shape))} ({across})"
        sent, hidden = sums.get(label, (0.0, 0.0))
        sums[label] = sent + plan.sent_s(c), hidden + plan.hidden_part_s(c)
    rows = sorted((item for item in sums.items() if item[1][0] > 0.005 * plan.wire_s), key=lambda item: item[1][0])[-8:]
    for row, (_, (sent, hidden)) in enumerate(rows):
        axes.barh(row, sent - hidden, color=TIME["exposed communication"], height=0.7)
        axes.barh(row, hidden, left=sent - hidden, color=TIME["hidden communication"], height=0.7)
    axes.set(yticks=range(len(rows)), xlim=(0, None))
    axes.xaxis.set_major_locator(_pyplot().MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g} s")
    axes.set_yticklabels([label for label, _ in rows], fontsize=8)
    axes.set_title("communication, over which mesh axes" if rows else "no communication", fontsize=10)


def _ticks(axes: Any, schedule: Schedule, gpipe: bool) -> None:
    """Which microbatch each stage works on, tick by tick: forward in the upper half of a row, backward in the lower."""
    half = schedule.phases[1].stop  # where GPipe turns round
    last = 2 * half if gpipe else schedule.phases[-1].stop
    shown = min(last, TICKS)
    for stage in range(schedule.stages):
        for tick in range(shown):
            for item, offset, colour in (
                (schedule.forward(tick, stage), 0.0, FORWARD),
                (
                    schedule.forward(2 * half - 1 - tick, stage) if gpipe else schedule.backward(tick, stage),
                    0.45,
                    BACKWARD,
                ),
            ):
                busy = bool(item.exists)
                axes.add_patch(_cell(tick, stage + offset, colour if busy else IDLE))
                if busy:
                    axes.text(
                        tick + 0.5, stage + offset + 0.23, str(item.microbatch), fontsize=7, ha="center", va="center"
                    )
    axes.set(
        xlim=(0, shown), ylim=(schedule.stages, 0), xlabel="tick", yticks=[s + 0.45 for s in range(schedule.stages)]
    )
    axes.set_yticklabels([f"stage {stage}" for stage in range(schedule.stages)], fontsize=8)
    axes.xaxis.set_major_locator(_pyplot().MultipleLocator(2))
    more = f"; the first {shown} of {last} ticks" if shown < last else ""
    axes.set_title(
        f"microbatches in the pipeline: forward above (blue), backward below (orange), idle grey; bubble "
        f"{schedule.bubble:.0%}{more}",
        fontsize=10,
    )


def _cell(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.02, y), 0.96, 0.43, color=colour, linewidth=0)
