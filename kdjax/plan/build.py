"""Plans the building of a cache: whether the teacher fits GPUs that need not be present, and how long it takes.

The exact program of `kdjax cache build` is compiled for the target; `kdjax plan --help` explains the estimates. The
teacher may be a model directory, of which only model_config.json is read, or a shipped recipe, whose model is taken.

  kdjax plan build --teacher llama70b_512xh100 --mesh tensor=8 --devices 8 --tokens 1e9
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kdjax import config as configs
from kdjax.cache.build import build_layout, teacher_model
from kdjax.cache.teacher import TeacherRows, Wanted, make_targets_step
from kdjax.checkpoint.model_directory import read_model_config
from kdjax.config import ModelConfig, command_line
from kdjax.parallel.axes import TENSOR
from kdjax.parallel.mesh import ROWS
from kdjax.plan.compile import compile_only
from kdjax.plan.gpus import TARGETS, topology
from kdjax.plan.hlo import collectives, kernels
from kdjax.plan.roofline import Plan, branch_share, score_elements
from kdjax.plan.table import memory_lines
from kdjax.training.layout import Layout, pipeline_schedule
from kdjax.training.memory import device_bytes


def main(argv: Sequence[str]) -> int:
    """Runs the command line. Returns 0 if the teacher fits, else 1."""
    parser = argparse.ArgumentParser(
        prog="kdjax plan build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="model directory, run or recipe")
    parser.add_argument("--target", default="h100", help=f"kind of GPU: {', '.join(TARGETS)} (default: h100)")
    parser.add_argument("--devices", type=int, default=8, help="number of GPUs, eight per host (default: 8)")
    parser.add_argument("--tokens", type=float, default=1e9, help="of the text (default: 1e9)")
    parser.add_argument("--mesh", metavar="AXIS=N,...", default="", help="as of kdjax cache build")
    parser.add_argument("--sequence-length", type=int, default=1024, help="positions of a row (default: 1024)")
    parser.add_argument("--microbatch-size", type=int, default=8, help="rows that a device reads at once (default: 8)")
    parser.add_argument("--top-k", type=int, default=64, help="exact entries a position (default: 64)")
    parser.add_argument("--draws", type=int, default=0, help="draws a position (default: 0)")
    arguments = parser.parse_args(argv)
    compile_only()
    model = dataclasses.replace(teacher_model(_architecture(arguments.teacher), "bfloat16"), attention="xla")
    kind = arguments.target.removesuffix("_sxm")
    devices = topology(kind, arguments.devices).devices
    layout = build_layout(model, arguments.sequence_length, arguments.mesh, arguments.microbatch_size, None, devices)
    plan = make_build_plan(layout, Wanted(arguments.top_k, arguments.draws), kind)
    print(render(plan, arguments.tokens))
    return 0 if plan.fits else 1


def _architecture(teacher: str) -> ModelConfig:
    """Returns the architecture of a model directory or run, or the model of a shipped recipe."""
    if teacher in command_line.recipes() and not Path(teacher).exists():
        return configs.build(command_line.load(Path(teacher))).model
    return read_model_config(teacher, "--teacher")


def make_build_plan(layout: Layout, wanted: Wanted, target: str) -> Plan:
    """Compiles a build's step for a layout on a target's devices, and returns what is known about it."""
    config, mesh = layout.config, layout.mesh
    shapes = layout.abstract_params()
    size = config.batch.global_size, config.data.sequence_length
    rows = jax.ShapeDtypeStruct(size, jnp.int32, sharding=NamedSharding(mesh, ROWS))
    uniforms = jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, ROWS))
    began = time.monotonic()
    step: Any = make_targets_step(layout, wanted)
    program = step.lower(shapes, TeacherRows(rows, rows, rows, rows, uniforms)).compile()
    text, on_chip = program.as_text(), score_elements(config, mesh.shape[TENSOR])
    share = branch_share(pipeline_schedule(config, mesh.shape))
    analysis, parameters = program.memory_analysis(), device_bytes(shapes)
    return Plan(
        config=config,
        target=target,
        mesh_shape=dict(mesh.shape),
        memory={
            "parameters": parameters,
            "rows": analysis.argument_size_in_bytes - parameters,
            "activations, temporaries": analysis.temp_size_in_bytes,
            "targets": analysis.output_size_in_bytes,
        },
        kernels=kernels(text, share, on_chip),
        collectives=collectives(text, mesh.size, share, on_chip),
        flags="default",
        compile_s=time.monotonic() - began,
    )


def render(plan: Plan, tokens: float) -> str:
    """Returns the plan as lines of text; `tokens` are those of the text."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh_shape.items())
    rate = plan.tokens / plan.step_s
    hours = tokens / rate / 3600
    return "\n".join(
        [
            f"{plan.devices} x {plan.gpu.description}; mesh {sizes}; batch {plan.config.batch.global_size} x "
            f"{plan.config.data.sequence_length} tokens; compiled in {plan.compile_s:.0f} s",
            "",
            "memory per device",
            *memory_lines(plan.memory, plan.gpu.memory),
            "",
            "time, estimated from a roofline (see kdjax plan --help), not measured",
            f"  compute        {plan.compute_s:9.3f} s  a batch",
            f"  communication  {plan.communication_s:9.3f} s  of which {plan.exposed_s:.3f} s exposed",
            f"  tokens/s       {rate:9,.0f}    {rate / plan.devices:,.0f} a GPU",
            f"  {tokens:,.0f} tokens take {hours:,.1f} hours, {hours * plan.devices:,.0f} GPU hours",
        ]
    )
