"""`python -m kdjax.plan`: does a run fit GPUs that are not here, how long will a step take, and what bounds it?

The exact training step is compiled for the target, which needs the extra `aot` and no GPU, with the XLA flags that
`kdjax.train` would set. XLA says how many bytes each device allocates; operations, collectives and what runs
beside them are read from the schedule that XLA made of the step. The times are estimates:

{roofline}

Memory leaves out attention by cuDNN, which cannot be compiled for here. XLA's attention stands in, which holds the
scores [heads, T, T] of one layer (of all, with model.remat=none), so that the memory of long rows is overestimated.

--search considers every mesh (pipe x data x fsdp x tensor), microbatches of 1, 2 and 4 rows, every model.remat and
mesh.interleave of 1 and 2, drops what cannot fit, compiles the most promising, and ranks them.

The exit code is 0 when it fits, 1 when it does not, 2 on a mistake in what was given.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import cli, estimate, plan_picture, plan_search, xla_flags
from kdjax import config as configs
from kdjax import mesh as meshes
from kdjax.checkpoint import adopt_architecture
from kdjax.config import Config
from kdjax.estimate import FITS, Plan
from kdjax.hlo import collectives, kernels
from kdjax.step import abstract_state, make_train_step
from kdjax.targets import DEVICES_PER_HOST, TARGETS, topology
from kdjax.types import Batch, UserError
from kdjax.validate import resolve, validate

MIB, GIB = 2**20, 2**30


def make_plan(
    config: Config,
    target: str,
    devices: int,
    top_k: int = 64,
    flags: str | None = None,
    options: Mapping[str, bool | int | str] | None = None,
) -> Plan:
    """Compiles the training step of `config` (resolved) for the target. Raises UserError where that cannot be.

    `flags` names a set of `kdjax.xla_flags`; None: the one that training chooses on GPUs. As there, what XLA_FLAGS
    says goes before it. `options` are more of XLA's options, as `jax.stages.Lowered.compile` takes them.
    """
    kind = target.removesuffix("_sxm")
    mesh = meshes.make_mesh(config.mesh, topology(kind, devices).devices)
    meshes.check_split(mesh, config.batch)
    shape = dict(mesh.shape)
    flags = flags or xla_flags.suited(shape["pipe"])
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh, config.data.top_k or top_k)
    began = time.monotonic()
    step: Any = make_train_step(config, mesh)
    given = os.environ.get("XLA_FLAGS", "")
    chosen = {name: value for name, value in xla_flags.compiler_options(flags).items() if f"--{name}=" not in given}
    program = step.lower(state, batch).compile(chosen | dict(options or {}))
    text, on_chip = program.as_text(), estimate.scores(config, shape)
    taken = estimate.due(estimate.schedule(config, shape))
    return Plan(
        config=config,
        target=kind,
        shape=shape,
        memory=_memory(estimate.held(config, mesh), program.memory_analysis()),
        kernels=kernels(text, taken, on_chip),
        collectives=collectives(text, devices, taken, on_chip),
        flags=flags,
        compile_s=time.monotonic() - began,
    )


def _memory(held: dict[str, int], analysis: Any) -> dict[str, int]:
    """Bytes by what they are for; the sum is what XLA allocates."""
    state = held["parameters"] + held["optimiser"]
    parts = {**held, "batch": analysis.argument_size_in_bytes - state}
    parts["activations, temporaries"] = analysis.temp_size_in_bytes - (sum(held.values()) - state)
    parts["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return parts


def abstract_batch(config: Config, mesh: jax.sharding.Mesh, top_k: int) -> Batch:
    """A global batch's shapes."""
    rows = jax.sharding.NamedSharding(mesh, meshes.ROWS)

    def shape(dtype: Any, *rest: int) -> Any:
        size = (config.batch.global_size, config.data.sequence_length, *rest)
        return jax.ShapeDtypeStruct(size, dtype, sharding=rows)

    return Batch(
        tokens=shape(jnp.int32),
        labels=shape(jnp.int32),
        loss_mask=shape(jnp.float32),
        topk_logits=shape(jnp.float32, top_k),
        topk_token_ids=shape(jnp.int32, top_k),
        log_sum_exp_logits=shape(jnp.float32),
        positions=shape(jnp.int32) if config.data.pack else None,
        segment_ids=shape(jnp.int32) if config.data.pack else None,
    )


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


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it fits, 1 when it does not."""
    arguments, configuration = cli.parse(_parser(), argv)
    compile_only()
    if arguments.picture is not None:
        plan_picture.check(arguments.picture)
    config = configuration()
    attention = config.model.attention or "xla"
    if attention != "xla":
        raise UserError(f"model.attention = {attention!r} cannot be compiled for without a GPU; leave it unset here")
    config = resolve(adopt_architecture(configs.replace(config, model__attention="xla")))

    def make(config: Config) -> Plan:
        return make_plan(config, arguments.target, arguments.devices, arguments.top_k, arguments.xla)

    if not arguments.search:
        validate(config)
        plan = make(config)
    else:
        kind = arguments.target.removesuffix("_sxm")
        plans = plan_search.search(config, kind, topology(kind, arguments.devices).devices, arguments.budget, make)
        plan = plans[0]
        print("\n".join(["", "ranked", *(f"  {plan_search.one_line(ranked)}" for ranked in plans)]))
        print(f"\nthe best: {plan_search.flags(plan)}\n")
    print(tell(plan))
    if arguments.picture is not None:
        plan_picture.draw(plan, Path(arguments.config).stem, arguments.picture)
        print(f"\ndrawn: {arguments.picture}")
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    roofline = (estimate.__doc__ or "").partition("\n\n")[2].rstrip()
    description = (__doc__ or "").replace("{roofline}", roofline)
    parser = argparse.ArgumentParser(prog="python -m kdjax.plan", description=description)
    names = ", ".join(TARGETS)
    parser.add_argument("--target", default="h100", help=f"the GPU: {names}, or with _sxm; default: h100")
    parser.add_argument("--devices", type=int, default=8, help="how many, eight a host; default: 8")
    parser.add_argument("--top-k", type=int, default=64, help="teacher entries, where data.top_k is not set")
    parser.add_argument("--search", action="store_true", help="try meshes, microbatches and remat, and rank them")
    parser.add_argument("--budget", type=int, default=24, help="programs that --search may compile; default: 24")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg|png", help="draw it; needs the extra plot")
    xla_flags.add_flag(parser)
    return parser


def compile_only() -> None:
    """Keeps JAX from looking for GPUs; before anything else is asked of it."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's compiler otherwise says, often, that it found no GPU
    cli.stay_on_host()
    # Programs for a target cannot be read back from the cache, and JAX warns of each.
    jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":
    cli.run(main)
