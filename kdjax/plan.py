"""`python -m kdjax.plan`: does a run fit GPUs that are not here, and what will bound it?

The exact training step is compiled for the target, which needs the extra `aot` and no GPU. XLA says how many bytes each
device allocates; operations are counted on the program, collectives in what XLA made of it. The step time is an
estimate from a roofline, not a measurement:

  matmuls      counted operations / 0.75 of the card's dense bfloat16 peak (XLA's GEMMs reach 0.76 to 0.87 on an H100)
  collectives  what each device sends by rings / NVLink's bandwidth in a host, 50 GB/s (a 400 Gb/s port) across hosts
  step         between the larger of the two (all overlapped) and their sum (nothing is)

Not in it: attention by cuDNN, which cannot be compiled for here. XLA's attention stands in, which holds the scores
[heads, T, T] of one layer, so that the memory of long rows is overestimated.
"""

import argparse
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import cli
from kdjax import config as configs
from kdjax import mesh as meshes
from kdjax.checkpoint import adopt_architecture
from kdjax.config import Config
from kdjax.flops import matmul_flops
from kdjax.hlo import Collective, collectives
from kdjax.step import abstract_state, make_train_step
from kdjax.targets import DEVICES_PER_HOST, TARGETS, topology
from kdjax.types import Batch, UserError
from kdjax.validate import resolve, validate

GIB = 2**30
FITS = 0.9  # of the card's memory: the CUDA context, NCCL's buffers and fragmentation take the rest
GEMM_SHARE = 0.75
PORT = 50e9  # bytes/s across hosts, one 400 Gb/s port a GPU
# Dense bfloat16 operations/s, and NVLink bytes/s in one direction; NVIDIA's data sheets.
PEAKS = {"a100": (312e12, 300e9), "h100": (989e12, 450e9), "h200": (989e12, 450e9), "b200": (2250e12, 900e9)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run's step on its target; bytes, operations and seconds are those of one device."""

    config: Config
    target: str
    devices: int
    memory: dict[str, int]  # by what it is for; the sum is what a device needs
    flops: int
    collectives: list[Collective]
    compile_s: float

    @property
    def nbytes(self) -> int:
        return sum(self.memory.values())

    @property
    def card(self) -> int:
        return TARGETS[self.target].memory

    @property
    def fits(self) -> bool:
        return self.nbytes <= FITS * self.card

    @property
    def matmul_s(self) -> float:
        return self.flops / (GEMM_SHARE * PEAKS[self.target][0])

    @property
    def wire_s(self) -> float:
        link = PEAKS[self.target][1]
        return sum(c.wire_bytes / (PORT if c.spans(DEVICES_PER_HOST) else link) for c in self.collectives)

    @property
    def step_s(self) -> tuple[float, float]:
        """With all, and with none of the communication overlapped."""
        return max(self.matmul_s, self.wire_s), self.matmul_s + self.wire_s


def make_plan(config: Config, target: str, devices: int, top_k: int = 64) -> Plan:
    """Compiles the training step of `config` (resolved) for the target. Raises UserError where that cannot be."""
    kind = target.removesuffix("_sxm")
    mesh = meshes.make_mesh(config.mesh, topology(kind, devices).devices)
    meshes.check_split(mesh, config.batch)
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh, config.data.top_k or top_k)
    began = time.monotonic()
    step: Any = make_train_step(config, mesh)
    program = step.lower(state, batch).compile()
    memory: Any = program.memory_analysis()
    parts = {"parameters": device_bytes(state.params), "optimiser": device_bytes(state.opt_state)}
    parts["batch"] = memory.argument_size_in_bytes - sum(parts.values())
    parts["gradients, activations"] = memory.temp_size_in_bytes
    parts["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = collectives(program.as_text(), devices)
    return Plan(config, kind, devices, parts, matmul_flops(step, state, batch), found, time.monotonic() - began)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


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
    config, tokens = plan.config, plan.config.batch.global_size * plan.config.data.sequence_length
    sizes = " x ".join(f"{axis} {getattr(config.mesh, axis)}" for axis in ("data", "fsdp", "tensor"))
    lines = [
        f"{plan.devices} x {TARGETS[plan.target].description}; mesh {sizes.replace('-1', 'the rest')}; "
        f"{config.batch.global_size} rows of {config.data.sequence_length} a step, {config.batch.microbatch_size} at "
        f"once; remat {config.model.remat}; compiled in {plan.compile_s:.0f} s",
        "",
        "memory of a device",
    ]
    for name, size in [*plan.memory.items(), ("in all", plan.nbytes)]:
        lines.append(f"  {name:24}{size / GIB:8.2f} GiB{size / plan.card:7.0%}")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [f"  {verdict}: {FITS:.0%} of {plan.card / GIB:.1f} GiB are to be had", "", "collectives of a step"]
    lines += _tell_collectives(plan) or ["  none"]
    low, high = plan.step_s
    bound = "matmuls" if plan.matmul_s > plan.wire_s else "collectives"
    peak = PEAKS[plan.target][0]
    lines += [
        "",
        "estimate (see --help)",
        f"  {plan.flops / 1e12:.1f} TFLOP of matmuls a device, {plan.matmul_s:.3f} s; collectives {plan.wire_s:.3f} s",
        f"  step {low:.3f} to {high:.3f} s, bound by {bound}; {tokens / high:,.0f} to {tokens / low:,.0f} tokens/s",
        f"  {plan.flops / high / peak:.0%} to {plan.flops / low / peak:.0%} of the peak, recomputation counted",
    ]
    return "\n".join(lines)


def _tell_collectives(plan: Plan) -> list[str]:
    totals: Counter[tuple[str, int, bool]] = Counter()
    counts: Counter[tuple[str, int, bool]] = Counter()
    for c in plan.collectives:
        key = (c.kind, len(c.groups[0]), c.spans(DEVICES_PER_HOST))
        totals[key] += round(c.wire_bytes)
        counts[key] += c.times
    return [
        f"  {kind:20}over {size:4} devices {'across hosts' if across else 'of a host':14}{counts[kind, size, across]:6}"
        f" times{total / GIB:9.3f} GiB sent"
        for (kind, size, across), total in totals.most_common()
    ]


def search(config: Config, target: str, devices: int, top_k: int) -> list[Plan]:
    """Every split of the devices over data, fsdp and tensor, the fitting ones first, then by the slower estimate."""
    plans = []
    for tensor in _divisors(min(devices, DEVICES_PER_HOST)):
        for fsdp in _divisors(devices // tensor):
            changed = configs.replace(config, mesh__data=-1, mesh__fsdp=fsdp, mesh__tensor=tensor)
            try:
                validate(changed)
                plans.append(make_plan(changed, target, devices, top_k))
            except UserError as error:
                print(f"fsdp {fsdp:4}  tensor {tensor}  left out: {error}", flush=True)
                continue
            print(_one_line(plans[-1]), flush=True)
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_s[1] if plan.fits else plan.nbytes))


def _one_line(plan: Plan) -> str:
    mesh, (low, high) = plan.config.mesh, plan.step_s
    fits = "fits" if plan.fits else "does not fit"
    told = f"fsdp {mesh.fsdp:4}  tensor {mesh.tensor}  {plan.nbytes / GIB:7.1f} GiB  {fits:12}"
    return f"{told}  step {low:.3f} to {high:.3f} s"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it fits, 1 when it does not."""
    parser = argparse.ArgumentParser(prog="python -m kdjax.plan", description=__doc__)
    parser.add_argument("--target", default="h100", help=f"the GPU: {', '.join(TARGETS)}; default: h100")
    parser.add_argument("--devices", type=int, default=8, help="how many, eight a host; default: 8")
    parser.add_argument("--top-k", type=int, default=64, help="teacher entries, where data.top_k is not set")
    parser.add_argument("--search", action="store_true", help="try every mesh.fsdp and mesh.tensor, and rank them")
    arguments, configuration = cli.parse(parser, argv)
    compile_only()
    config = configuration()
    attention = config.model.attention or "xla"
    if attention != "xla":
        raise UserError(f"model.attention = {attention!r} cannot be compiled for without a GPU; leave it unset here")
    config = resolve(adopt_architecture(configs.replace(config, model__attention="xla")))
    if not arguments.search:
        validate(config)
        plan = make_plan(config, arguments.target, arguments.devices, arguments.top_k)
    else:
        plans = search(config, arguments.target, arguments.devices, arguments.top_k)
        if not plans:
            raise UserError("no split of the devices can work; the reasons are above")
        plan = plans[0]
        print(
            f"\nthe best: --config.mesh.fsdp={plan.config.mesh.fsdp} --config.mesh.tensor={plan.config.mesh.tensor}\n"
        )
    print(tell(plan))
    return 0 if plan.fits else 1


def compile_only() -> None:
    """Keeps JAX from looking for GPUs; before anything else is asked of it."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    cli.stay_on_host()
    # Programs for a target cannot be read back from the cache, and JAX warns of each.
    jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":
    cli.run(main)
