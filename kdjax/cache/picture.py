"""A cache as a picture: entries and mass at each position, the teacher's entropy, and where the bytes go."""

from pathlib import Path
from typing import Any

import numpy as np

from kdjax import cli
from kdjax.cache.info import sample
from kdjax.cache.statistics import label_nll, log_probs
from kdjax.data.shards.reader import Cache

BLUE, RED = "#4477aa", "#ee6677"


def draw(cache: Cache, path: Path) -> None:
    """Writes the picture."""
    cli.check_picture_path(path)
    plt = cli.pyplot()
    entries, mass, nll, index = [], [], [], []
    for record in sample(cache):
        unmasked_S = record.loss_mask > 0
        p = np.exp(log_probs(record))[unmasked_S]
        entries.append(np.isfinite(record.log_probs[unmasked_S]).sum(axis=1))
        mass.append(p.sum(axis=1))
        nll.append(label_nll(record, cache.manifest)[unmasked_S])
        index.append(p)
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _histogram(panels[0, 0], np.concatenate(entries), "entries", "positions by their number of entries")
    _histogram(
        panels[0, 1], np.concatenate(mass), "probability", "positions by the probability that their entries hold"
    )
    _histogram(panels[1, 0], np.concatenate(nll), "nats", "positions by the teacher's loss on the label")
    width = max(p.shape[1] for p in index)
    by_rank = np.zeros(width)
    count = sum(len(p) for p in index)
    for p in index:
        by_rank[: p.shape[1]] += np.sort(p, axis=1)[:, ::-1].sum(axis=0)
    panels[1, 1].plot(np.arange(1, width + 1), np.cumsum(by_rank) / max(1, count), color=BLUE)
    panels[1, 1].set(xlabel="entries, largest first", ylabel="probability they hold", ylim=(0, 1), title="mean mass")
    size = sum(entry.bytes for entry in cache.manifest.shards) / max(1, cache.manifest.tokens)
    figure.suptitle(f"{cache.path.name}: {cache.manifest.tokens:,} tokens, {size:.1f} bytes a token")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _histogram(panel: Any, values: np.ndarray, unit: str, title: str) -> None:
    panel.hist(values, bins=40, color=BLUE)
    panel.axvline(values.mean(), color=RED, label=f"mean {values.mean():.3g}")
    panel.set(xlabel=unit, ylabel="positions", title=title)
    panel.legend(frameon=False)
