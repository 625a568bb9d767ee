"""Time and memory of the losses: each implementation, naive JAX autodiff, and NeMo-Aligner's algorithm in torch.

Measures the loss and its gradients on random inputs, in float32 unless a row says otherwise: forward KL over the top-k,
with or without 0.4 of cross-entropy. "linear" starts from hidden states and the unembedding, "logits" from the logits.
torch_loss.py measures the torch rows. "matmuls" are only the three multiplications that every dense row makes, a lower
bound for them. Rows take turns, each in a fresh process, for several rounds; the report has medians and ratios to the
baselines of the same run.

    python scripts/benchmarks/bench_loss.py                                            # without torch
    python scripts/benchmarks/bench_loss.py --torch-python ~/torch/bin/python --out docs/bench_loss.md
    python scripts/benchmarks/bench_loss.py --shape 1024 32768 512 64 --shape 1024 32768 128 64   # a table each
    python scripts/benchmarks/bench_loss.py --gpu --shape 8192 128256 4096 64 --rounds 5

On a GPU, the rows on logits also report the bytes per second of their three passes over [N, V] (a read forward; a read
and the write of the gradient backward), and the share of the card's bandwidth that this is.
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
from typing import Any, NamedTuple

import host

HERE = Path(__file__).resolve().parent
Result = dict[str, Any]


COLUMNS = (
    *("from", "terms", "dtype", "computed by", "time", "/ naive", "/ torch"),
    *("temporaries", "added peak", "/ torch", "matmuls"),
)


class Row(NamedTuple):
    """One line of the table."""

    level: str  # linear | logits
    sft: float
    side: str  # an implementation of kdjax.losses, "naive" (its specification, differentiated by JAX), torch or matmuls
    dtype: str = "float32"


def rows(gpu: bool) -> list[Row]:
    kernels = ("pallas", "triton") if gpu else ()
    return [
        *(Row("linear", 0.4, side) for side in ("torch", "matmuls", "naive", "xla", *kernels)),
        *(Row("linear", 0.0, side) for side in ("torch", "naive", "xla", "gathered")),
        *(Row("logits", 0.4, side) for side in ("torch", "naive", "xla", *kernels)),
        *(Row("logits", 0.0, side) for side in ("torch", "naive", "xla")),
        *(Row("logits", 0.4, side, "bfloat16") for side in ("naive", "xla", *kernels)),
    ]


def measure(row: Row, shape: Sequence[int], repeats: int) -> Result:
    """Returns the seconds of each repeat, XLA's temporaries, the added peak memory and the matmul operations."""
    # Imported here: the process that starts the others must stay small (host.peak_rss_bytes).
    import jax
    import jax.numpy as jnp

    from kdjax.losses import linear_topk_kd_loss, topk_kd_loss
    from kdjax.plan.flops import matmul_flops
    from kdjax.plan.gpus import TARGETS

    n, v, d, k = shape
    keys = jax.random.split(jax.random.key(0), 4)
    ids = (jax.random.randint(keys[0], (1, n, 1), 0, v) + jnp.arange(k) * (v // k)) % v
    topk_logits = jax.random.normal(keys[1], (1, n, k))
    hidden = jax.random.normal(keys[2], (1, n, d), row.dtype)
    unembed = (0.05 * jax.random.normal(keys[3], (v, d))).astype(row.dtype)
    settings: dict[str, Any] = {
        "sft_loss_weight": row.sft,
        "implementation": "reference" if row.side == "naive" else row.side,
    }

    def linear(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        teaching = topk_logits, ids, ids[..., 0], jnp.ones((1, n))
        return linear_topk_kd_loss(hidden, unembed, *teaching, **settings).loss

    def on_logits(logits: jax.Array) -> jax.Array:
        return topk_kd_loss(logits, topk_logits, ids, ids[..., 0], **settings)[0].sum()

    def three_matmuls(hidden: jax.Array, unembed: jax.Array, logits_ct: jax.Array) -> tuple[jax.Array, ...]:
        return jnp.sum(hidden[0] @ unembed.T), logits_ct @ unembed, logits_ct.T @ hidden[0]

    arguments: tuple[jax.Array, ...] = (hidden, unembed)
    if row.side == "matmuls":
        gradient: Any = three_matmuls
        arguments = (*arguments, jax.random.normal(keys[1], (n, v)))
    elif row.level == "linear":
        gradient = jax.value_and_grad(linear, argnums=(0, 1))
    else:
        arguments = (jax.block_until_ready(hidden @ unembed.T),)
        gradient = jax.value_and_grad(on_logits)
    compiled = jax.jit(gradient).lower(*arguments).compile()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu:
        host.forget_peak()
    before = host.rss_bytes()
    seconds, peaks = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
        peaks.append(host.recorded_peak_bytes() if on_cpu else 0)
    memory: Any = compiled.memory_analysis()
    return {
        "seconds": seconds[1:],
        "added_bytes": peaks[0] - before if on_cpu else memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": matmul_flops(gradient, *arguments),
        "version": f"jax {jax.__version__} on {device.device_kind}",
        "bandwidth": {t.description: t.memory_bandwidth for t in TARGETS.values()}.get(device.device_kind),
    }


def run(row: Row, shape: Sequence[int], arguments: argparse.Namespace) -> Result:
    """Returns the row's result, measured in a process of its own."""
    sizes = [str(size) for size in shape]
    if row.side == "torch":
        command = [arguments.torch_python, str(HERE / "torch_loss.py"), "--level", row.level, "--sft", str(row.sft)]
        command += ["--shape", *sizes, "--repeats", str(arguments.repeats)]
    else:
        command = [sys.executable, str(HERE / "bench_loss.py"), "--one", json.dumps(row), "--shape", *sizes]
        command += ["--repeats", str(arguments.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{row} failed ({' '.join(command)}):\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


Measured = Mapping[Row, Sequence[Result]]


def compare(arguments: argparse.Namespace) -> str:
    """Runs all rounds of every shape and returns the report in Markdown."""
    wanted = [row for row in rows(arguments.gpu) if row.side != "torch" or arguments.torch_python]
    shapes = [tuple(shape) for shape in arguments.shape or [[1024, 32768, 512, 64]]]
    measured: dict[tuple[int, ...], dict[Row, list[Result]]] = {shape: {row: [] for row in wanted} for shape in shapes}
    turns = list(itertools.product(shapes, range(arguments.rounds), wanted))
    began = time.monotonic()
    for number, (shape, round_, row) in enumerate(turns, 1):
        result = run(row, shape, arguments)
        measured[shape][row].append(result)
        left = (time.monotonic() - began) / number * (len(turns) - number)
        told = f"{statistics.median(result['seconds']) * 1e3:.0f} ms"
        line = f"{shape} round {round_ + 1}/{arguments.rounds}  {' '.join(map(str, row))}  {told}  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
    lines = ["# The losses compared with naive autodiff and NeMo-Aligner's algorithm"]
    for shape in shapes:
        lines += table(shape, measured[shape], arguments)
    versions = {results[0]["version"] for found in measured.values() for results in found.values()}
    return "\n".join([*lines, *notes(arguments, sorted(versions))]) + "\n"


def table(shape: tuple[int, ...], measured: Measured, arguments: argparse.Namespace) -> list[str]:
    """Returns the lines of one shape's table."""
    n, v, d, k = shape
    times = {row: statistics.median(t for r in results for t in r["seconds"]) for row, results in measured.items()}
    added = {row: statistics.median(r["added_bytes"] for r in results) for row, results in measured.items()}
    lines = [
        "",
        f"Loss and gradients, N = {n} tokens, V = {v}, D = {d}, K = {k}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row, results in measured.items():

        def ratio(values: Mapping[Row, float], side: str, row: Row = row) -> str:
            base = row._replace(side=side)
            return f"{values[row] / values[base]:.2f}" if base in values and side != row.side else ""

        temp, flops = results[0].get("temp_bytes"), results[0].get("flops", 0)
        torch = row.side == "torch"
        matmuls = f"{flops / (2 * n * v * d):.2f}" if row.level == "linear" and not torch else ""
        lines.append(
            f"| {row.level} | {'KD + SFT' if row.sft else 'KD'} | {row.dtype} "
            f"| {'torch, NeMo-Aligner restated' if torch else row.side} | {times[row] * 1e3:.1f} ms "
            f"| {'' if torch else ratio(times, 'naive')} | {ratio(times, 'torch')} "
            f"| {'' if temp is None else f'{temp / host.MIB:.1f} MiB'} | {added[row] / host.MIB:.0f} MiB "
            f"| {ratio(added, 'torch')} | {matmuls} |"
        )
    return [*lines, *(bandwidth(shape, measured, times, arguments) if arguments.gpu else [])]


def bandwidth(
    shape: tuple[int, ...], measured: Measured, times: Mapping[Row, float], arguments: argparse.Namespace
) -> list[str]:
    """Returns a table of the speed of the three passes over [N, V] on a GPU, and its share of the card's bandwidth."""
    n, v, *_ = shape
    lines = [
        "",
        "| computed by | dtype | bytes/s of three passes | share of the card's bandwidth |",
        "|---|---|---|---|",
    ]
    for row in times:
        if row.level != "logits" or not row.sft or row.side == "torch":
            continue
        rate = 3 * n * v * (2 if row.dtype == "bfloat16" else 4) / times[row]
        card = arguments.bandwidth or measured[row][0]["bandwidth"]
        share = f"{rate / card:.0%}" if card else "give --bandwidth"
        lines.append(f"| {row.side} | {row.dtype} | {rate / 1e12:.2f} TB/s | {share} |")
    return lines


def notes(arguments: argparse.Namespace, versions: Sequence[str]) -> list[str]:
    return [
        "",
        f"Medians of {arguments.rounds} rounds of {arguments.repeats} repeats per row; rows take turns, each in a",
        "process of its own. Temporaries: what XLA allocates beside arguments and results. Added peak: resident memory",
        "(on a GPU: allocated memory) above the inputs at the first repeat, including results. Matmuls: counted in the",
        "program, in units of one multiplication by the whole unembedding, 2 N V D operations. Other work on the",
        "machine can only add time.",
        "",
        f"- machine: {host.describe()}; load average at the end: {os.getloadavg()[0]:.1f}",
        *(f"- {version}" for version in versions),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--torch-python", metavar="PYTHON", help="a Python that has torch; default: no torch rows")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("N", "V", "D", "K"),
        help="may be repeated; one table each",
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes per row; default: 3")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats per process; default: 5")
    parser.add_argument("--gpu", action="store_true", help="add the GPU kernels and the bytes per second")
    parser.add_argument("--bandwidth", type=float, help="the card's bytes per second, if kdjax does not know it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument(
        "--one", metavar="ROW", help="measure this row in this process and print JSON (used internally)"
    )
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(Row(*json.loads(arguments.one)), arguments.shape[0], arguments.repeats)))
        return
    text = compare(arguments)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
