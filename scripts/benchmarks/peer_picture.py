"""The picture of scripts/benchmarks/compare_peer.py: one row per loss term, one column per length of training."""

import statistics
from pathlib import Path
from typing import Any

from peer_entries import OBJECTIVES, RECORDED, TERMS, Groups, Point


def draw(groups: Groups, path: Path) -> None:
    """Draws docs/peer.png: one row per loss term, one column per length of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = sorted({column for _, _, column in groups})
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(len(TERMS), len(columns), figsize=(5.6 * len(columns), 7.6), squeeze=False)
    for axes_of_row, (term, title) in zip(axes, reversed(TERMS.items()), strict=True):
        for axis, column in zip(axes_of_row, columns, strict=True):
            panel(axis, {key[:2]: curves for key, curves in groups.items() if key[2] == column}, term, column)
        axes_of_row[0].set_ylabel(f"validation {title}\nnats per token")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(f"{column} steps", loc="left", fontweight="bold")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    has_torch = any(side == "torch" for side, _, _ in groups)
    peer = ", dashed: scripts/benchmarks/torch_peer.py" if has_torch else ""
    note = f"lines: kdjax, mean over seeds; bands: lowest to highest seed; circles: recorded torch run, last step{peer}"
    figure.text(0.01, 0.005, note, color="#444444", fontsize=8.5)
    figure.tight_layout(rect=(0, 0.02, 1, 1), w_pad=2.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def panel(axis: Any, curves_of: dict[tuple[str, str], list[list[Point]]], term: str, column: int) -> None:
    """Draws one loss term over one length of training: a line for each objective, labelled at its end."""
    labels: list[tuple[float, str, str]] = []
    for (side, name), curves in curves_of.items():
        objective, steps = OBJECTIVES[name], [point.step for point in curves[0]]
        by_step = list(zip(*[[getattr(point, term) for point in curve] for curve in curves], strict=True))
        means = [statistics.mean(values) for values in by_step]
        if side == "torch":
            axis.plot(steps, means, color=objective.colour, linewidth=1, linestyle=(0, (4, 2)), alpha=0.8)
            continue
        axis.plot(steps, means, color=objective.colour, linewidth=1.8)
        lows, highs = [min(values) for values in by_step], [max(values) for values in by_step]
        axis.fill_between(steps, lows, highs, color=objective.colour, alpha=0.2, linewidth=0)
        recorded = RECORDED[name, column][list(TERMS).index(term)]
        circle = {"markersize": 6.5, "markerfacecolor": "white", "color": objective.colour, "clip_on": False}
        axis.plot(steps[-1], recorded, "o", zorder=5, **circle)
        labels.append((means[-1], f"{objective.label}  {means[-1]:.2f}", objective.colour))
    axis.set_xlim(left=0, right=max(point.step for curves in curves_of.values() for point in curves[0]))
    shown = [
        getattr(point, term)
        for curves in curves_of.values()
        for curve in curves
        for point in curve
        # The first descent is much the same for all and would flatten the rest: it may begin above the picture.
        if point.step >= curve[-1].step / 8
    ]
    shown += [RECORDED[name, column][list(TERMS).index(term)] for side, name in curves_of if side == "kdjax"]
    margin = 0.06 * (max(shown) - min(shown))
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    label_ends(axis, labels)


def label_ends(axis: Any, labels: list[tuple[float, str, str]]) -> None:
    """Writes each line's name right of its end, moved apart where they would touch."""
    low, high = axis.get_ylim()
    gap, places = (high - low) * 0.058, sorted(labels)
    heights = [value for value, _, _ in places]
    for _ in range(100):  # each pair that touches gives way on both sides; settles within a few rounds
        for i in range(1, len(heights)):
            push = max(0.0, gap - (heights[i] - heights[i - 1])) / 2
            heights[i - 1], heights[i] = heights[i - 1] - push, heights[i] + push
    for height, (value, text, colour) in zip(heights, places, strict=True):
        axis.annotate(
            text,
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.045, height),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)},
        )
