"""GPUs that programs can be compiled for on a machine without one: the memory, collectives and kernels are real.

`topology("h100", 16)` has devices for a `jax.sharding.Mesh`. Lower a program from `jax.ShapeDtypeStruct`s with
shardings on that mesh; `.compile()` then has `memory_analysis()` and the optimised HLO. XLA tunes no GEMM without a
device, so kernels that it would choose by timing may differ from those of a run. JAX's persistent compilation cache
cannot return such programs: it warns and compiles them again.
"""

import dataclasses

import jax
from jax.experimental import topologies

from kdjax.types import UserError

DEVICES_PER_HOST = 8  # of the HGX and DGX boards these GPUs are sold on


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler knows it. The figures are from XLA's own `target_config` specifications; the last three,
    which XLA does not use, are from NVIDIA's data sheets for the GPUs and for DGX A100, H100, H200 and B200.
    """

    description: str
    compute_capability: int  # the major version; the minor one is 0
    accelerated_features: bool  # whether code for this architecture only (sm_90a) is allowed
    cores: int  # streaming multiprocessors
    fpus_per_core: int
    clock_rate_ghz: float
    memory_bandwidth: int  # bytes/s
    memory: int  # bytes
    l2_cache: int  # bytes
    shared_memory_per_core: int  # bytes
    shared_memory_per_block_optin: int  # bytes
    peak: float  # operations/s, dense bfloat16
    nvlink: float  # bytes/s in one direction, to the GPUs of the same host
    port: float  # bytes/s in one direction, to other hosts: one InfiniBand port per GPU

    def config(self) -> str:
        """Returns XLA's GpuTargetConfigProto, as text."""
        extension = "ACCELERATED_FEATURES" if self.accelerated_features else "NONE"
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{
                major: {self.compute_capability} minor: 0 feature_extension: {extension}
              }}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_rate_ghz}
              memory_bandwidth: {self.memory_bandwidth}
              device_memory_size: {self.memory}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory_per_block_optin}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            device_description_str: "{self.description}"
        """


_HOPPER = Target(
    description="NVIDIA H100 80GB HBM3",
    compute_capability=9,
    accelerated_features=True,
    cores=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    memory_bandwidth=3352320000000,
    memory=84942979072,
    l2_cache=52428800,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    peak=989e12,
    nvlink=450e9,
    port=50e9,
)
TARGETS = {
    "a100": Target(
        description="NVIDIA A100-SXM4-80GB",
        compute_capability=8,
        accelerated_features=False,
        cores=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        memory_bandwidth=2039040000000,
        memory=85100068864,
        l2_cache=41943040,
        shared_memory_per_core=167936,
        shared_memory_per_block_optin=166912,
        peak=312e12,
        nvlink=300e9,
        port=25e9,
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER, description="NVIDIA H200", memory_bandwidth=4800000000000, memory=151397597184
    ),
    "b200": dataclasses.replace(
        _HOPPER,
        description="NVIDIA B200",
        compute_capability=10,
        cores=148,
        clock_rate_ghz=1.965,
        memory_bandwidth=7672320000000,
        memory=191514411008,
        l2_cache=132644864,
        peak=2250e12,
        nvlink=900e9,
    ),
}


def topology(name: str, devices: int) -> topologies.TopologyDescription:
    """Returns `devices` GPUs of the kind `name` (a key of `TARGETS`), eight per host, to compile for.

    Raises UserError for an unknown kind, for a number of devices that is neither part of a host nor several whole
    hosts, or when the compiler is not installed.
    """
    if name not in TARGETS:
        raise UserError(f"{name!r} is not a GPU that kdjax knows; choose one of {', '.join(map(repr, TARGETS))}")
    per_host = min(devices, DEVICES_PER_HOST)
    if devices < 1 or devices % per_host:
        nearest = max(1, round(devices / DEVICES_PER_HOST)) * DEVICES_PER_HOST
        raise UserError(
            f"{devices} devices are neither part of a host of {DEVICES_PER_HOST} nor several whole hosts;"
            f" give 1 to {DEVICES_PER_HOST}, or {nearest}"
        )
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=TARGETS[name].config(), topology=f"1x{devices // per_host}x{per_host}"
        )
    except NotImplementedError as error:
        raise UserError(
            f"JAX {jax.__version__} found no CUDA compiler: pip install 'kdjax[aot]' (jax-cuda12-plugin and"
            f" jax-cuda12-pjrt {jax.__version__}), and set JAX_PLATFORMS=cpu where there is no GPU"
        ) from error
