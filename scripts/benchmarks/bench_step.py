"""Measures one training step of kdjax and of eager torch: time and memory, in one table.

Both sides make the same update of the same student (configs/quickstart.py: 8 x 128 tokens, vocabulary 49,152,
float32, forward KL on the renormalised top-16 plus 0.4 of cross-entropy, AdamW) on the bundled records, with all
cores. The sides alternate, each in a fresh process, so that memory peaks are separate and other load on the machine
affects both. The torch side is scripts/benchmarks/torch_peer.py.

    python scripts/benchmarks/bench_step.py                                   # torch in this environment
    python scripts/benchmarks/bench_step.py --torch-python ~/torch/bin/python --rounds 5 --out docs/bench_step.md
    python scripts/benchmarks/bench_step.py --config.batch.microbatch_size=2  # on the kdjax side only
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import host

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.py"
SIDES = ("kdjax", "torch")
Result = dict[str, Any]


def measure_kdjax(steps: int, overrides: Mapping[str, str]) -> Result:
    """Runs one untimed step, which compiles, then `steps` timed ones. Returns the same keys as torch_peer.py prints."""
    # Imported here: the process that starts the others must stay small (host.peak_rss_bytes).
    import platform

    import jax

    from kdjax.config import build
    from kdjax.config.command_line import load
    from kdjax.config.validate import resolve, validate
    from kdjax.data.dataset import open_dataset
    from kdjax.data.loader import train_batches
    from kdjax.parallel import mesh as meshes
    from kdjax.training.layout import Layout
    from kdjax.training.step import make_train_step

    config = resolve(build(load(CONFIG), {"loss.tail": "renormalize", "train.steps": str(steps + 100), **overrides}))
    validate(config)
    mesh = meshes.make_mesh(config.mesh.sizes)
    records = open_dataset(config.data.train, config.data, vocab_size=config.model.vocab_size)
    rows = slice(0, config.batch.global_size)
    batches = train_batches(
        records, config.data, global_size=config.batch.global_size, start_step=0, stop_step=steps + 1, rows=rows
    )
    state, train_step = Layout(config, mesh).init_state(), make_train_step(Layout(config, mesh))
    jax.block_until_ready(state)
    before, times, losses = host.rss_bytes(), [], []
    for batch in batches:
        on_device = jax.block_until_ready(meshes.put_rows(mesh, batch))
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(train_step(state, on_device))
        times.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    median = statistics.median(times[1:])
    device = jax.devices()[0].device_kind
    return {
        "median_step_s": median,
        "fastest_step_s": min(times[1:]),
        "tokens_per_s": config.batch.global_size * config.data.sequence_length / median,
        "first_step_s": times[0],
        "peak_rss_bytes": host.peak_rss_bytes(),
        "rss_before_bytes": before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "versions": f"jax {jax.__version__} on {device}, {host.threads()} threads, Python {platform.python_version()}",
    }


def run_side(side: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> Result:
    """Measures one side in a separate process and returns its JSON. Exits with that process's message if it fails."""
    command = {
        "kdjax": [sys.executable, str(HERE / "bench_step.py"), "--side", "kdjax", *overrides],
        "torch": [arguments.torch_python, str(HERE / "torch_peer.py"), "--mode", "time", "--objective", "nemo"],
    }[side]
    command += ["--steps", str(arguments.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        missing = "No module named 'torch'" in done.stderr
        hint = "\n--torch-python names an interpreter that has torch" if missing else ""
        sys.exit(f"the {side} side failed ({' '.join(command)}):\n{done.stderr[-3000:]}{hint}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Runs all rounds and returns the report in markdown."""
    rounds: dict[str, list[Result]] = {side: [] for side in SIDES}
    began, total = time.monotonic(), arguments.rounds * len(SIDES)
    for number, (round_, side) in enumerate(itertools.product(range(arguments.rounds), SIDES), 1):
        result = run_side(side, arguments, overrides)
        rounds[side].append(result)
        left = (time.monotonic() - began) / number * (total - number)
        told = f"{result['median_step_s']:.3f} s a step, peak {result['peak_rss_bytes'] / host.MIB:,.0f} MiB"
        line = f"round {round_ + 1}/{arguments.rounds}  {side:5}  {told}  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
    return report(rounds, arguments, overrides)


def report(rounds: Mapping[str, Sequence[Result]], arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Returns the table (medians over rounds, with smallest and largest) and a description of the machine."""
    rows = [
        ("step, median", "median_step_s", 1.0, "{:.3f} s"),
        ("step, fastest", "fastest_step_s", 1.0, "{:.3f} s"),
        ("tokens/s", "tokens_per_s", 1.0, "{:,.0f}"),
        ("peak resident memory", "peak_rss_bytes", host.MIB, "{:,.0f} MiB"),
        ("resident before the first step", "rss_before_bytes", host.MIB, "{:,.0f} MiB"),
        ("first step, set aside", "first_step_s", 1.0, "{:.1f} s"),
        ("loss before the first update", "first_loss", 1.0, "{:.3f}"),
        ("loss before the last", "last_loss", 1.0, "{:.3f}"),
    ]
    lines = [
        "# One training step beside eager torch",
        "",
        "| | kdjax | eager torch | kdjax / torch |",
        "|---|---|---|---|",
    ]
    for title, key, unit, form in rows:
        values = {side: [result[key] / unit for result in rounds[side]] for side in SIDES}
        medians = {side: statistics.median(values[side]) for side in SIDES}
        cells = []
        for side in SIDES:
            low, high = form.format(min(values[side])), form.format(max(values[side]))
            cells.append(form.format(medians[side]) + (f" ({low} to {high})" if low != high else ""))
        ratio = f"{medians['kdjax'] / medians['torch']:.2f}"
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {ratio if 'loss' not in key else ''} |")
    notes = [
        "",
        f"{arguments.rounds} rounds of {arguments.steps} steps a side, alternating, each in a process of its own:",
        "medians over rounds, smallest to largest in brackets. Other work on the machine only ever adds time: where",
        "the median and the fastest step are far apart, measure again. kdjax's first step compiles, and its peak",
        "memory includes that. The sides draw weights and batches of their own, so the losses agree only roughly.",
        *([f"kdjax ran with {' '.join(overrides)}."] if overrides else []),
        "",
        f"- machine: {host.describe()}; load average at the end {os.getloadavg()[0]:.1f}",
        *(f"- {side}: {rounds[side][0]['versions']}" for side in SIDES),
    ]
    return "\n".join(lines + notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.GROUP.KEY=VALUE changes the kdjax side; python -m kdjax.train --help lists the knobs",
    )
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side; default: 3")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a process; default: 20")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--side", choices=("kdjax",), help="measure this side here and print JSON (used by the above)")
    arguments, rest = parser.parse_known_args()
    unknown = [word for word in rest if not (word.startswith("--config.") and "=" in word)]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; configuration is changed by --config.GROUP.KEY=VALUE")
    if arguments.side == "kdjax":
        overrides = dict(word.removeprefix("--config.").split("=", 1) for word in rest)
        print(json.dumps(measure_kdjax(arguments.steps, overrides)))
        return
    text = compare(arguments, rest)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
