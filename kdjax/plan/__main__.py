"""Tells whether a run fits GPUs that need not be present, how long a step will take, and what limits it.

The exact training step is compiled for the target with the XLA flags that `kdjax train` would set. That needs the extra
`aot` and no GPU. XLA reports how many bytes each device allocates; operations, collectives and what overlaps them are
read from the schedule that XLA made of the step. Times are estimates:

{roofline}

cuDNN's attention cannot be compiled without a GPU. XLA's attention is compiled instead; it keeps the scores
[heads, T, T] of one layer (of all layers, with model.remat=none), so the memory of long rows is overestimated.

--search considers every mesh (pipe x data x fsdp x tensor), microbatches of 1, 2 and 4 rows, every model.remat, and
mesh.interleave of 1 and 2. It drops what cannot fit, compiles the most promising candidates, and ranks them.

The exit code is 0 if the run fits, 1 if it does not, and 2 for a mistake in the arguments.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdjax import cli
from kdjax import config as configs
from kdjax.checkpoint import adopt_architecture
from kdjax.config import Config, command_line
from kdjax.config.validate import resolve, validate
from kdjax.distributed import xla_flags
from kdjax.plan import plot, roofline, search
from kdjax.plan.compile import compile_only, make_plan
from kdjax.plan.gpus import TARGETS, topology
from kdjax.plan.roofline import Plan
from kdjax.plan.table import render
from kdjax.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0 if the run fits, else 1."""
    arguments, configuration = command_line.parse(_parser(), argv)
    compile_only()
    if arguments.picture is not None:
        cli.check_picture_path(arguments.picture)
    config = configuration()
    attention = config.model.attention or "xla"
    if attention != "xla":
        raise UserError(f"model.attention = {attention!r} cannot be compiled without a GPU; leave it unset here")
    config = resolve(adopt_architecture(configs.replace(config, model__attention="xla")))

    def make(config: Config) -> Plan:
        return make_plan(config, arguments.target, arguments.devices, arguments.top_k, arguments.xla)

    if not arguments.search:
        validate(config)
        plan = make(config)
    else:
        kind = arguments.target.removesuffix("_sxm")
        plans = search.search(config, kind, topology(kind, arguments.devices).devices, arguments.budget, make)
        plan = plans[0]
        print("\n".join(["", "ranked", *(f"  {search.summary_line(ranked)}" for ranked in plans)]))
        print(f"\nbest: {search.config_flags(plan)}\n")
    print(render(plan))
    if arguments.picture is not None:
        plot.draw(plan, Path(arguments.config).stem, arguments.picture)
        print(f"\nwrote {arguments.picture}")
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    estimate = (roofline.__doc__ or "").partition("\n\n")[2].rstrip()
    description = (__doc__ or "").replace("{roofline}", estimate)
    parser = argparse.ArgumentParser(prog="kdjax plan", description=description)
    names = ", ".join(TARGETS)
    parser.add_argument("--target", default="h100", help=f"kind of GPU: {names}; _sxm may be appended (default: h100)")
    parser.add_argument("--devices", type=int, default=8, help="number of GPUs, eight per host (default: 8)")
    parser.add_argument("--top-k", type=int, default=64, help="teacher entries, if data.top_k is not set (default: 64)")
    parser.add_argument("--search", action="store_true", help="try meshes, microbatches and remat, and rank them")
    parser.add_argument("--budget", type=int, default=24, help="programs that --search may compile (default: 24)")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg|png", help="draw the plan; needs the extra plot")
    xla_flags.add_flag(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
