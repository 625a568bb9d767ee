"""Named sets of XLA flags for NVIDIA GPUs. XLA reads them from XLA_FLAGS when JAX first looks for devices.

An unknown flag ends a program when it starts, so tests/distributed/test_xla_flags.py tries every set on the installed
jaxlib; it also compiles for GPUs with the sets and checks what they change. Sources:

  JAX     docs.jax.dev/en/latest/gpu_performance_tips.html
  NVIDIA  docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
  XLA     openxla.org/xla/determinism, and pull request 12520 of openxla/xla

Two flags are left out. While-loop double buffering, which NVIDIA recommends too, added 0.55 GiB to the compiled step of
configs/gpt2b_nemotron8b.py (four of its layers, mesh.fsdp 8, H100) and hid no more communication.
xla_gpu_enable_pipelined_p2p does not compile where the permutes of a scan form a ring. All of this was read from
programs that JAX 0.10.2 compiled; nothing was timed.
"""

import argparse
import logging
import os
from collections.abc import MutableMapping

import jax

from kdjax.distributed import jax_private
from kdjax.types import UserError

log = logging.getLogger("kdjax")

Options = dict[str, bool | int | str]

_OVERLAP: Options = {
    # Collectives start as early and end as late as their data allow, with compute in between (JAX, NVIDIA). This is
    # XLA's default schedule for an H100, but not for an A100.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # A loop's gather or scatter for one layer moves beside the compute of the layer before or after (NVIDIA).
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    # Small collectives are merged up to about so many bytes: "at least a Transformer layer's weights" (JAX), which
    # are 436 MB in bfloat16 for Llama-2-7B (NVIDIA). XLA's default is 30 MiB.
    "xla_gpu_all_gather_combine_threshold_bytes": 2**29,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**29,
}
FLAG_SETS: dict[str, Options] = {
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
    # Gives the same bits from the same program on the same GPUs, more slowly: scatters, reductions and attention run in
    # a fixed order, and no kernel is chosen by timing, as autotuning does (XLA).
    "deterministic": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}


def default_set(pipe: int) -> str:
    """Returns the name of the set used on GPUs with `pipe` pipeline stages when none is asked for."""
    return "overlap" if pipe == 1 else "pipeline"


def compiler_options(name: str) -> Options:
    """Returns a set in the form that `jax.stages.Lowered.compile` takes.

    JAX 0.12 renamed some compiler options; XLA_FLAGS still takes the old names.
    """
    if jax.__version_info__ < (0, 12):
        return dict(FLAG_SETS[name])
    return dict(_renamed(option, value) for option, value in FLAG_SETS[name].items())


def _renamed(option: str, value: bool | int | str) -> tuple[str, bool | int | str]:
    kind = option.removeprefix("xla_gpu_enable_pipelined_")
    return (option, value) if kind == option else (f"xla_gpu_pipeline_{kind}", "COLLECTIVE_PIPELINING_MODE_ON")


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--xla NAME`."""
    parser.add_argument(
        "--xla",
        choices=list(FLAG_SETS),
        help="flags to add to XLA_FLAGS; those you set yourself stay. overlap hides communication behind compute, "
        "pipeline also hides it between stages, deterministic gives the same bits each time (default: on NVIDIA GPUs "
        "pipeline where mesh.pipe > 1, else overlap; elsewhere none)",
    )


def apply(name: str | None, pipe: int, environment: MutableMapping[str, str] = os.environ) -> str:
    """Adds the named set, by default one for this machine, to XLA_FLAGS and returns its name.

    Call it before JAX looks for devices. Raises UserError when XLA_FLAGS names a file of flags.
    """
    chosen = name or (default_set(pipe) if _expects_gpu() else "none")
    before = environment.get("XLA_FLAGS", "").strip()
    given = {word.removeprefix("--").partition("=")[0] for word in before.split()}
    missing = {option: value for option, value in FLAG_SETS[chosen].items() if option not in given}
    added = [
        f"--{option}={str(value).lower() if isinstance(value, bool) else value}" for option, value in missing.items()
    ]
    if not added:
        return chosen
    if before and not before.startswith("--"):
        raise UserError(f"--xla {chosen}: XLA_FLAGS = {before} is a file; add {' '.join(added)} to it, and --xla none")
    assert not jax_private.backends_are_initialized(), "XLA has read its flags"
    environment["XLA_FLAGS"] = " ".join([before, *added]).strip()
    log.info("XLA flags of %s%s: %s", chosen, "" if name else " (--xla is not set)", " ".join(added))
    return chosen


def _expects_gpu() -> bool:
    """Returns whether JAX, which has not looked for devices yet, will find an NVIDIA GPU."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX makes its options at run time
    allows_gpu = not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))
    return allows_gpu and jax_private.has_visible_nvidia_gpu()
