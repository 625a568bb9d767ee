"""Compares what kdjax and a torch run learn with the same student, records, updates and steps, for each objective.

Trains configs/quickstart.py's student with five objectives, for 100 and 300 steps, with several seeds each, and writes
docs/peer.md (final losses beside recorded figures of a transformers Llama in torch) and docs/peer.png (the curves).
With --peer, scripts/benchmarks/torch_peer.py trains too, and is drawn and listed beside kdjax.

    python scripts/benchmarks/compare_peer.py                     # 21 runs, about an hour and a half on two cores
    python scripts/benchmarks/compare_peer.py --peer --torch-python ~/torch/bin/python
    python scripts/benchmarks/compare_peer.py --only nemo:100 ghost:300     # part of it
    python scripts/benchmarks/compare_peer.py --rehearse 3        # all of it for three steps: does everything work?

Every finished run leaves its curve in --work. Run the same command again to continue from there.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import host
import jax
from peer_entries import ENTRIES, OBJECTIVES, RECORDED, TERMS, VAL_EVERY, Groups, Point
from peer_picture import draw

from kdjax.checkpoint import load_params
from kdjax.cli import run
from kdjax.config import Config, build, replace
from kdjax.config.command_line import load
from kdjax.config.validate import resolve
from kdjax.data.dataset import open_dataset
from kdjax.data.loader import eval_batches
from kdjax.model import Params
from kdjax.parallel import mesh as meshes
from kdjax.train import run as train
from kdjax.training import metrics
from kdjax.training.layout import Layout
from kdjax.training.step import make_eval_step
from kdjax.types import UserError

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "quickstart.py"
TOLERANCE = 0.02  # of the recorded figure: closer than this counts as the same


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of one side, and the file that its finished curve is kept in."""

    side: str  # "kdjax" | "torch"
    objective: str
    column: int  # steps of the full comparison; a rehearsal makes fewer
    steps: int
    val_every: int
    seed: int
    work: Path

    @property
    def name(self) -> str:
        return f"{self.side}-{self.objective}-{self.column}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.work / f"{self.name}.jsonl"

    def curve(self) -> list[Point]:
        return [Point(**json.loads(line)) for line in self.result.read_text().splitlines()]

    def finish(self, curve: Sequence[Point]) -> None:
        """Writes the result whole or not at all."""
        fresh = self.result.with_suffix(".new")
        fresh.write_text("".join(json.dumps(dataclasses.asdict(point)) + "\n" for point in curve))
        fresh.replace(self.result)


def learn_kdjax(job: Job, changes: dict[str, str]) -> list[Point]:
    """Trains in WORK/NAME, which is dropped once its curve is known; what it says goes to WORK/NAME.log."""
    objective, workdir = OBJECTIVES[job.objective], job.work / job.name
    is_ghost = objective.tail == "ghost"
    settings = {
        "loss.kd_loss_weight": objective.kd_weight,
        "loss.sft_loss_weight": objective.sft_weight,
        "loss.tail": objective.tail,
        "train.steps": job.steps,
        "train.val_every": job.val_every,
        # A ghost run logs its own kd_loss. Its renormalised one is measured afterwards, at every checkpoint.
        "train.save_every": job.val_every if is_ghost else job.steps,
        "checkpoint.keep_last": job.steps // job.val_every + 1 if is_ghost else 1,
        "checkpoint.keep_best": 0,
        "train.seed": job.seed,
        "data.seed": job.seed,
        "optim.warmup_steps": min(10, job.steps // 2),
    }
    config = resolve(build(load(CONFIG), {key: str(value) for key, value in settings.items()} | changes))
    with job.result.with_suffix(".log").open("a", buffering=1) as said, contextlib.redirect_stdout(said):
        outcome = train(config, workdir)
    if outcome.ended != "complete":
        raise UserError(f"{workdir}: the run ended {outcome.ended}")
    lines = metrics.read(workdir, "val")
    kd = renormalised_kd(config, workdir) if is_ghost else {line["step"]: line["kd_loss"] for line in lines}
    shutil.rmtree(workdir)
    return [Point(line["step"], kd[line["step"]], line["sft_loss"]) for line in lines]


def renormalised_kd(config: Config, workdir: Path) -> dict[int, float]:
    """Returns {step: validation kd_loss under loss.tail = "renormalize"}, before training and at every checkpoint."""
    config = replace(config, loss__tail="renormalize")
    mesh, size = meshes.make_mesh(config.mesh.sizes), config.batch.global_size
    records = open_dataset(config.data.val, config.data, vocab_size=config.model.vocab_size)
    evaluate = make_eval_step(Layout(config, mesh))

    def measure(params: Params) -> float:
        batches = eval_batches(records, config.data, global_size=size, max_batches=None, rows=slice(0, size))
        found = [evaluate(params, meshes.put_rows(mesh, batch))["kd_loss"] for batch in batches]
        return float(sum(pair.sum for pair in found) / sum(pair.count for pair in found))

    kd = {0: measure(Layout(config, mesh).init_state().params)}
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit():
            kd[int(path.name)] = measure(load_params(path, config.model, meshes.replicated(mesh)))
    return kd


def learn_torch(job: Job, python: str) -> list[Point]:
    """Trains the same student with torch_peer.py, in a separate process."""
    command = [python, str(HERE / "torch_peer.py"), "--mode", "train", "--objective", job.objective]
    command += ["--steps", str(job.steps), "--val-every", str(job.val_every), "--seed", str(job.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = "" if python != sys.executable else "; --torch-python names an interpreter that has torch"
        raise UserError(f"{' '.join(command)} failed{hint}:\n{done.stderr[-3000:]}")
    return [Point(**json.loads(line)) for line in done.stdout.splitlines()]


def learn_all(jobs: Sequence[Job], arguments: argparse.Namespace, changes: dict[str, str]) -> None:
    """Runs what has no result yet, and tells how long the rest will take."""
    learn: dict[str, Callable[[Job], list[Point]]] = {
        "kdjax": lambda job: learn_kdjax(job, changes),
        "torch": lambda job: learn_torch(job, arguments.torch_python),
    }
    todo = [job for job in jobs if not job.result.exists()]
    total, made, began = sum(job.steps for job in todo), 0, time.monotonic()
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them done before; {total:,} steps to make", flush=True)
    for number, job in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {job.name}", flush=True)
        job.finish(learn[job.side](job))
        made += job.steps
        left = (time.monotonic() - began) / made * (total - made)
        last = job.curve()[-1]
        print(f"    kd_loss {last.kd_loss:.3f}  sft_loss {last.sft_loss:.3f}  {left / 60:.0f} min left", flush=True)


def claim(work: Path, changes: dict[str, str]) -> None:
    """Makes WORK, or checks that the results in it belong to the same changes of the configuration."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "changes.json"
    before = json.loads(path.read_text()) if path.exists() else changes
    if before != changes:
        raise UserError(f"{work} holds runs with the changes {before}, not {changes}; give another --work")
    path.write_text(json.dumps(changes) + "\n")


def group(jobs: Sequence[Job]) -> Groups:
    groups: Groups = {}
    for job in jobs:
        groups.setdefault((job.side, job.objective, job.column), []).append(job.curve())
    return groups


def table(groups: Groups, seeds: int) -> str:
    """Returns the text of docs/peer.md."""
    has_torch = any(side == "torch" for side, _, _ in groups)
    titles = ["objective", "steps", "term", "recorded", *(["torch_peer.py"] if has_torch else [])]
    titles += [f"kdjax, mean of {seeds} ± spread", "kdjax / recorded", "verdict"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (side, name, steps), curves in groups.items():
        if side != "kdjax":
            continue
        for term, recorded in zip(TERMS, RECORDED[name, steps], strict=True):
            mean, spread = ends(curves, term)
            ratio = mean / recorded
            off = f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'}"
            verdict = f"within {TOLERANCE:.0%}" if abs(ratio - 1) <= TOLERANCE else off
            peer = ["{:.3f} ± {:.3f}".format(*ends(groups["torch", name, steps], term))] if has_torch else []
            cells = [OBJECTIVES[name].title, str(steps), term, f"{recorded:.3f}", *peer]
            cells += [f"{mean:.3f} ± {spread:.3f}", f"{ratio:.3f}", verdict]
            lines.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + tail(has_torch)


HEAD = """# kdjax beside a torch run

The student of configs/quickstart.py on the bundled records, 8 x 128 tokens a step, with five objectives. Validation
losses at the last step, in nats per token; kd_loss is the forward KL on the renormalised top-16 for every objective,
whatever was minimised. Lower is better only for what the objective minimises: SFT alone raises kd_loss, and KD alone on
a renormalised top-k leaves sft_loss where it was, because it says nothing of the tail.

"recorded" is one run in torch (transformers' LlamaForCausalLM, AdamW, one seed). The student, the records, the updates
and the schedule are the same; the random numbers behind the weights and the order of the data are not, and kdjax starts
the maps that write to the residual stream smaller (`model.scaled_init`, as GPT-2 and Megatron do), which transformers'
Llama does not. Spread is half the distance between the lowest and the highest seed.

"""


def tail(has_torch: bool) -> str:
    peer = " scripts/benchmarks/torch_peer.py is the same student written afresh in plain torch." if has_torch else ""
    made = f"Made by scripts/benchmarks/compare_peer.py with jax {jax.__version__} on {host.describe()}."
    return f"\n![validation losses against steps](peer.png)\n\n{made}{peer}\n"


def ends(curves: Sequence[Sequence[Point]], term: str) -> tuple[float, float]:
    """Returns the mean over seeds at the last step, and half the distance between the extremes."""
    values = [getattr(curve[-1], term) for curve in curves]
    return statistics.mean(values), (max(values) - min(values)) / 2


def plan(arguments: argparse.Namespace) -> list[Job]:
    """Trains all runs that were asked for, short ones first."""
    work = arguments.work / f"rehearsal-{arguments.rehearse}" if arguments.rehearse else arguments.work
    seeds = {"kdjax": range(arguments.seeds), "torch": range(arguments.peer_seeds if arguments.peer else 0)}
    jobs = []
    for entry in arguments.only or ENTRIES:
        if entry not in ENTRIES:
            raise UserError(f"--only {entry}: there is no such entry; choose among {', '.join(ENTRIES)}")
        name, column = ENTRIES[entry]
        steps = arguments.rehearse or column
        val_every = 1 if arguments.rehearse else VAL_EVERY[column]
        for side, numbers in seeds.items():
            jobs += [Job(side, name, column, steps, val_every, seed, work) for seed in numbers]
    return sorted(jobs, key=lambda job: job.column)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.GROUP.KEY=VALUE changes the kdjax runs; give such runs a --work of their own",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/compare_peer"), help="default: runs/compare_peer")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs", help="directory of peer.md and peer.png")
    parser.add_argument("--seeds", type=int, default=3, help="kdjax runs an entry, seeds from 0; default: 3")
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help=f"some of: {', '.join(ENTRIES)}")
    parser.add_argument("--peer", action="store_true", help="let torch_peer.py learn too")
    parser.add_argument("--peer-seeds", type=int, default=1, help="its runs an entry; default: 1")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="interpreter that has torch")
    parser.add_argument("--rehearse", type=int, metavar="STEPS", help="few steps a run, written below WORK only")
    arguments, rest = parser.parse_known_args()
    jobs = plan(arguments)
    work = jobs[0].work
    out = work if arguments.rehearse else arguments.out
    changes = dict(word.removeprefix("--config.").split("=", 1) for word in rest)
    claim(work, changes)
    out.mkdir(parents=True, exist_ok=True)
    learn_all(jobs, arguments, changes)
    groups = group(jobs)
    (out / "peer.md").write_text(text := table(groups, arguments.seeds))
    draw(groups, out / "peer.png")
    print(f"\n{text}\nwritten: {out / 'peer.md'}, {out / 'peer.png'}")
    return 0


if __name__ == "__main__":
    run(main)
