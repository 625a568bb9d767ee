"""Sets of XLA's flags for NVIDIA GPUs, by name. XLA reads them from XLA_FLAGS when JAX first looks for devices.

An unknown flag ends a program at its start, so every set is tried on the installed jaxlib by tests/test_xla_flags.py,
which also compiles for GPUs with them and looks what they change. Sources:

  JAX     docs.jax.dev/en/latest/gpu_performance_tips.html
  NVIDIA  docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
  XLA     openxla.org/xla/determinism, and pull request 12520 of openxla/xla

Left out: while-loop double buffering, which NVIDIA recommends too, added 0.55 GiB to the compiled step of
configs/gpt2b_nemotron8b.py (four of its layers, mesh.fsdp 8, H100) and hid nothing more; xla_gpu_enable_pipelined_p2p
does not compile where the permutes of a scan form a ring. All this is known from programs that JAX 0.10.2 compiled, not
from timing them.
"""

import argparse
import logging
import os
from collections.abc import Mapping, MutableMapping

import jax
from jax._src import hardware_utils, xla_bridge  # whether there is a GPU must be known before JAX looks for one

from kdjax.types import UserError

log = logging.getLogger("kdjax")

Options = dict[str, bool | int | str]

_OVERLAP: Options = {
    # Collectives start as early and end as late as their data allow, with compute in between (JAX, NVIDIA). For an H100
    # XLA's default schedule is the same, for an A100 it is not.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # What a loop gathers or scatters for one layer is moved beside the compute of the layer before or after (NVIDIA).
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    # Small ones are merged up to about this size, in bytes: "at least a Transformer layer's weights" (JAX), which are
    # 436 MB in bfloat16 for Llama-2-7B (NVIDIA). XLA's default is 30 MiB.
    "xla_gpu_all_gather_combine_threshold_bytes": 2**29,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**29,
}
SETS: dict[str, Options] = {
    "none": {},
    "overlap": _OVERLAP,
    "pipeline": {
        **_OVERLAP,
        # The three that JAX's page gives for pipelines besides the scheduler: permutes from stage to stage become sends
        # and receives, in flight while the stage computes. XLA does so for an open chain of stages, not for a ring.
        "xla_gpu_enable_command_buffer": "",
        "xla_disable_hlo_passes": "collective-permute-motion",
        "xla_gpu_experimental_pipeline_parallelism_opt_level": "PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE",
    },
    # The same bits from the same program on the same GPUs: scatters, reductions and attention in a fixed order, slower,
    # and no kernel chosen by timing, which autotuning does (XLA).
    "deterministic": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}


def suited(pipe: int) -> str:
    """The set for GPUs where none is asked for."""
    return "overlap" if pipe == 1 else "pipeline"


def compiler_options(name: str) -> Options:
    """A set as `jax.stages.Lowered.compile` takes it.

    JAX 0.12 gave some options new names, under which XLA_FLAGS' old ones go on.
    """
    if jax.__version_info__ < (0, 12):
        return dict(SETS[name])
    return dict(_renamed(option, value) for option, value in SETS[name].items())


def _renamed(option: str, value: bool | int | str) -> tuple[str, bool | int | str]:
    kind = option.removeprefix("xla_gpu_enable_pipelined_")
    return (option, value) if kind == option else (f"xla_gpu_pipeline_{kind}", "COLLECTIVE_PIPELINING_MODE_ON")


def add_flag(parser: argparse.ArgumentParser) -> None:
    """`--xla NAME`."""
    parser.add_argument(
        "--xla",
        choices=list(SETS),
        help="flags added to XLA_FLAGS, where those you set yourself stay: overlap hides communication behind compute, "
        "pipeline that between stages too, deterministic gives the same bits each time (default: on NVIDIA GPUs "
        "pipeline where mesh.pipe > 1, else overlap; elsewhere none)",
    )


def choose(asked: str | None, pipe: int, environment: MutableMapping[str, str] = os.environ) -> str:
    """Puts the set that was asked for, else one that suits, into XLA_FLAGS. To be called before JAX looks for devices.

    Raises UserError when XLA_FLAGS names a file, which XLA would read.
    """
    name = asked or (suited(pipe) if _has_gpu() else "none")
    before = environment.get("XLA_FLAGS", "").strip()
    missing = _missing(SETS[name], before)
    if not missing:
        return name
    if before and not before.startswith("--"):
        raise UserError(f"--xla {name}: XLA_FLAGS = {before} is a file; add {' '.join(missing)} there, and --xla none")
    assert not xla_bridge.backends_are_initialized(), "XLA has read its flags"
    environment["XLA_FLAGS"] = " ".join([before, *missing]).strip()
    log.info("XLA flags of %s%s: %s", name, "" if asked else " (--xla is not set)", " ".join(missing))
    return name


def _missing(options: Mapping[str, bool | int | str], flags: str) -> list[str]:
    """Those that `flags` does not set already, as words of XLA_FLAGS."""
    given = {word.removeprefix("--").partition("=")[0] for word in flags.split()}
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
        if name not in given
    ]


def _has_gpu() -> bool:
    """Whether JAX is going to find an NVIDIA GPU, as it looks for one itself."""
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX makes its options at run time
    may = not asked or bool({"cuda", "gpu"} & set(asked.split(",")))
    return may and hardware_utils.has_visible_nvidia_gpu()
