"""How long a step that was compiled for a GPU would take there: a roofline, not a measurement.

  compute        each kernel of XLA's program takes the larger of its matmuls' operations / 0.75 of the GPU's dense
                 bfloat16 peak (XLA's GEMMs reach 0.76 to 0.87 of it on an H100) and its bytes / the memory bandwidth,
                 with each operand and result moved once. Attention's scores move no bytes, since a fused attention
                 keeps them on chip
  communication  what each device sends by rings / NVLink's bandwidth; across hosts, / the bandwidth of the ports (400
                 Gb/s each, A100: 200) of those devices of a host that take part, since NCCL uses them all
  hidden         the part of a collective that passes while the kernels scheduled between its start and its end run;
                 the rest is exposed
  step           compute + exposed communication, as scheduled; its lower bound is the larger of the matmuls alone and
                 the communication alone
  MFU            model operations / (devices x peak x step): 6 x the parameters in matmuls x tokens, and 6 x layers x
                 T x heads x head width x tokens for causal attention (half of 12). Recomputation and idle stages do
                 not count; the head counts in full, even where the loss reads K of its rows. A teacher on the mesh
                 counts a third of this, its forward pass

Real steps are longer, because these are left out: kernel launches, communication that slows the compute it hides
behind or other communication at the same time, the latency of a message, waiting for the slowest device, reading data.
A pipeline's idle stages compute on zeros, so its bubble is contained in the operations counted.
"""

import dataclasses
import functools
import math

import jax

from kdjax.config import Config
from kdjax.model import param_shapes
from kdjax.parallel.pipeline import Schedule
from kdjax.plan.gpus import DEVICES_PER_HOST, TARGETS, Target
from kdjax.plan.hlo import Collective, Work
from kdjax.training.layout import pipeline_schedule

USABLE_MEMORY = 0.9  # of a GPU's: the CUDA context, NCCL's buffers and fragmentation take the rest
GEMM_EFFICIENCY = 0.75  # of the peak


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a run's step on its target. Bytes, operations and seconds are those of one device."""

    config: Config
    target: str  # a key of TARGETS
    mesh_shape: dict[str, int]
    memory: dict[str, int]  # bytes by what they are for
    kernels: list[tuple[float, Work]]  # how often each runs per step, and its work
    collectives: list[Collective]
    flags: str  # the set of XLA flags that it was compiled with
    compile_s: float
    teacher: Config | None = None  # of a teacher on the mesh

    @property
    def gpu(self) -> Target:
        return TARGETS[self.target]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh_shape.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= USABLE_MEMORY * self.gpu.memory

    @property
    def schedule(self) -> Schedule:
        return pipeline_schedule(self.config, self.mesh_shape)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all devices."""
        return self.config.batch.global_size * self.config.data.sequence_length

    @property
    def flops(self) -> float:
        """Operations of all matmuls in XLA's program, including recomputation and idle stages."""
        return sum(times * work.flops for times, work in self.kernels)

    @property
    def matmul_s(self) -> float:
        return self.flops / (GEMM_EFFICIENCY * self.gpu.peak)

    @functools.cached_property
    def compute_s(self) -> float:
        return sum(times * self._kernel_s(work) for times, work in self.kernels)

    @property
    def communication_s(self) -> float:
        return sum(self.collective_s(c) for c in self.collectives)

    @property
    def hidden_s(self) -> float:
        """The part of the communication that passes during compute."""
        return sum(self.collective_hidden_s(c) for c in self.collectives)

    @property
    def exposed_s(self) -> float:
        """The part of the communication that compute waits for."""
        return self.communication_s - self.hidden_s

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def lower_bound_s(self) -> float:
        """A step of matmuls only, with all communication hidden."""
        return max(self.matmul_s, self.communication_s)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization."""
        useful = model_flops(self.config) + (model_flops(self.teacher) / 3 if self.teacher is not None else 0)
        return useful / (self.devices * self.gpu.peak * self.step_s)

    def collective_s(self, c: Collective) -> float:
        """Returns the seconds per step of all runs of a collective."""
        if not c.spans_hosts(DEVICES_PER_HOST):
            return c.sent_bytes / self.gpu.nvlink
        return c.sent_bytes / min(self.gpu.port * c.min_devices_per_host(DEVICES_PER_HOST), self.gpu.nvlink)

    def collective_hidden_s(self, c: Collective) -> float:
        """Returns the part of `collective_s` that passes during compute."""
        return min(self.collective_s(c), c.times * self._kernel_s(c.hiding_work))

    def _kernel_s(self, work: Work) -> float:
        return max(work.flops / (GEMM_EFFICIENCY * self.gpu.peak), work.nbytes / self.gpu.memory_bandwidth)


def branch_share(schedule: Schedule) -> float:
    """Returns the share of ticks in which the step's conditionals, for embedding and head, run their branch."""
    return schedule.microbatches / len(schedule.phases[1]) if schedule.chunks > 1 else 1.0


def score_elements(config: Config, tensor: int) -> int:
    """Returns the number of attention scores of one layer and microbatch on one of `tensor` shards."""
    heads = config.model.n_heads // tensor
    return config.batch.microbatch_size * heads * config.data.sequence_length**2


def matmul_parameters(config: Config) -> int:
    """Returns the number of parameters in matmuls: all kernels, and the head whether tied or not."""
    shapes = param_shapes(config.model)
    kernels = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    return sum(kernels) + config.model.vocab_size * config.model.d_model


def model_flops(config: Config) -> float:
    """Returns the operations of a step's forward and backward pass on all devices, without recomputation."""
    model, T = config.model, config.data.sequence_length
    attention = 6 * model.layers * T * model.n_heads * model.head_width
    return (6 * matmul_parameters(config) + attention) * config.batch.global_size * T
