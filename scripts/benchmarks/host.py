"""The machine and this process, as the benchmarks report them. Standard library only."""

import os
import platform
import resource
import sys
from pathlib import Path

MIB = 2**20


def threads() -> int:
    """Returns the number of cores this process may run on; both sides of every comparison use all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rss_bytes() -> int:
    """Returns the resident memory now, or its peak so far where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_rss_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process.

    On Linux a child's peak starts at that of the process that spawned it, so spawn from a small process.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe() -> str:
    """Returns the processor, the cores in use, the memory and the system, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0] if models else platform.machine()}, {threads()} cores, {memory:.0f} GiB, {platform.system()}"


def forget_peak() -> None:
    """Resets the kernel's record of this process's peak resident memory. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def recorded_peak_bytes() -> int:
    """Returns the peak resident memory since `forget_peak`, as recorded by the kernel. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
