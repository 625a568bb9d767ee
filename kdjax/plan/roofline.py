"""How long a step that was compiled for a GPU would take there: a roofline, not a measurement.

  compute   each kernel of XLA's program takes the larger of its matmuls' operations / 0.75 of the card's dense bfloat16
            peak (XLA's GEMMs reach 0.76 to 0.87 of it on an H100) and its bytes / the card's memory bandwidth, each
            operand and result moved once. Attention's scores move no bytes: a fused attention keeps them on chip
  wire      what each device sends by rings / NVLink's bandwidth; across hosts, the ports' (400 Gb/s each, A100: 200) of
            those devices of a host that take part: NCCL uses them all
  hidden    of a collective, as much as the kernels that XLA scheduled between its start and its end take; exposed: the
            rest
  step      as scheduled, compute + exposed; at best, the larger of the matmuls alone and the wire
  MFU       model operations / (devices x peak x step): 6 x the parameters in matmuls x tokens, and 6 x layers x T x
            heads x head width x tokens for causal attention (half of 12). No recomputation, no idle stage counts; the
            head counts in full, also where the loss reads K of its rows

Left out, so that real steps are longer: launching kernels, communication that slows the compute it hides behind or
other communication at the same time, the time until the first byte arrives, waiting for the slowest device, reading
data. A pipeline's idle stages compute on zeros, so that its bubble is in the operations counted.
"""

import dataclasses
import functools
import math

import jax

from kdjax.config import Config
from kdjax.model import param_shapes
from kdjax.parallel import mesh as meshes
from kdjax.parallel.pipeline import Schedule
from kdjax.plan.gpus import DEVICES_PER_HOST, TARGETS, Target
from kdjax.plan.hlo import Collective, Work

FITS = 0.9  # of the card's memory: the CUDA context, NCCL's buffers and fragmentation take the rest
GEMM_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run's step on its target; bytes, operations and seconds are those of one device."""

    config: Config
    target: str  # a key of TARGETS
    shape: dict[str, int]  # the mesh's
    memory: dict[str, int]  # by what it is for; the sum is what a device needs
    kernels: list[tuple[float, Work]]  # how often each runs, and what it does
    collectives: list[Collective]
    flags: str  # the set of XLA's flags that it was compiled with
    compile_s: float

    @property
    def card(self) -> Target:
        return TARGETS[self.target]

    @property
    def devices(self) -> int:
        return math.prod(self.shape.values())

    @property
    def nbytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.nbytes <= FITS * self.card.memory

    @property
    def schedule(self) -> Schedule:
        return schedule(self.config, self.shape)

    @property
    def tokens(self) -> int:
        """Of a step, on all devices."""
        return self.config.batch.global_size * self.config.data.sequence_length

    @property
    def flops(self) -> float:
        """Of matmuls, all that XLA left in the program: recomputation and idle stages count."""
        return sum(times * work.flops for times, work in self.kernels)

    @property
    def matmul_s(self) -> float:
        return self.flops / (GEMM_SHARE * self.card.peak)

    @functools.cached_property
    def compute_s(self) -> float:
        return sum(times * self._kernel_s(work) for times, work in self.kernels)

    @property
    def wire_s(self) -> float:
        return sum(self.sent_s(c) for c in self.collectives)

    @property
    def hidden_s(self) -> float:
        return sum(self.hidden_part_s(c) for c in self.collectives)

    @property
    def exposed_s(self) -> float:
        return self.wire_s - self.hidden_s

    @property
    def step_s(self) -> float:
        """As scheduled."""
        return self.compute_s + self.exposed_s

    @property
    def best_s(self) -> float:
        """Were all but the matmuls free, and all communication hidden."""
        return max(self.matmul_s, self.wire_s)

    @property
    def mfu(self) -> float:
        return model_flops(self.config) / (self.devices * self.card.peak * self.step_s)

    def sent_s(self, c: Collective) -> float:
        """Of a collective, all its runs together."""
        ports = self.card.port * c.fewest(DEVICES_PER_HOST)
        return c.wire_bytes / (min(ports, self.card.nvlink) if c.spans(DEVICES_PER_HOST) else self.card.nvlink)

    def hidden_part_s(self, c: Collective) -> float:
        """Of that, what passes while something is computed."""
        return min(self.sent_s(c), c.times * self._kernel_s(c.beside))

    def _kernel_s(self, work: Work) -> float:
        return max(work.flops / (GEMM_SHARE * self.card.peak), work.nbytes / self.card.memory_bandwidth)


def schedule(config: Config, shape: dict[str, int]) -> Schedule:
    """The pipeline's, on a mesh of that shape; with one stage, the microbatches one after the other."""
    replicas = math.prod(shape[axis] for axis in meshes.BATCH_AXES)
    microbatches = config.batch.global_size // (replicas * config.batch.microbatch_size)
    return Schedule(shape["pipe"], config.mesh.interleave, microbatches)


def due(schedule: Schedule) -> float:
    """The share of the ticks in which the step's conditionals, embedding and head, have a microbatch to work on."""
    return schedule.microbatches / len(schedule.phases[1]) if schedule.chunks > 1 else 1.0


def scores(config: Config, shape: dict[str, int]) -> int:
    """Elements of attention's scores, of one layer and microbatch on a device."""
    heads = config.model.n_heads // shape["tensor"]
    return config.batch.microbatch_size * heads * config.data.sequence_length**2


def matmul_parameters(config: Config) -> int:
    """Those that multiply: all kernels and the head, tied or not; no embedding, norm or bias."""
    shapes = param_shapes(config.model)
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    return sum(kernels) + config.model.vocab_size * config.model.d_model


def model_flops(config: Config) -> float:
    """Of a step on all devices: the algorithm's own, forward and backward, nothing computed twice."""
    model, T = config.model, config.data.sequence_length
    attention = 6 * model.layers * T * model.n_heads * model.head_width
    return (6 * matmul_parameters(config) + attention) * config.batch.global_size * T
