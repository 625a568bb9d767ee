"""What a compiled program sends between devices and what it computes meanwhile, read from XLA's text of the program.

The text is a schedule: the instructions of a computation run in the order in which they are printed. XLA splits a
collective into a `-start` and a `-done`; the instructions between the two run while the data are on their way.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_ITEM_BYTES |= {"f64": 8, "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_NEGLIGIBLE_BYTES = 1024  # a kernel with a smaller result (a loop counter, a mask) takes no time


class Work(NamedTuple):
    """What a device computes: the operations of its matmuls, and the bytes that its kernels read and write."""

    flops: int
    nbytes: int


_NONE = Work(0, 0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str  # one of KINDS
    nbytes: int  # of the whole array that is reduced, gathered or scattered
    times: int  # runs per step
    groups: tuple[tuple[int, ...], ...]  # devices that communicate with each other; for a permute, (source, target)
    in_loop: bool = False  # whether it is in the body of a loop
    hiding_work: Work = _NONE  # what the device computes during one run of it

    @property
    def is_overlapped(self) -> bool:
        """Whether anything is computed meanwhile."""
        return self.hiding_work != _NONE

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends per step. Rings send (n - 1) / n of the array, an all-reduce twice that."""
        if self.kind == "collective-permute":
            return self.times * self.nbytes
        n = len(self.groups[0])
        return self.times * self.nbytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def spans_hosts(self, per_host: int) -> bool:
        """Returns whether a group has devices on several hosts of `per_host` devices."""
        return any(len({device // per_host for device in group}) > 1 for group in self.groups)

    def min_devices_per_host(self, per_host: int) -> int:
        """Returns the smallest number of devices that a group has on one of its hosts."""
        return min(min(Counter(device // per_host for device in group).values()) for group in self.groups)

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the mesh axes along which a group's devices differ; devices are numbered in the mesh's order."""
        differ: set[int] = set()
        for group in self.groups:
            coordinates = np.array(np.unravel_index(group, tuple(mesh_shape.values())))
            differ |= set(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)).tolist())
        return tuple(name for i, name in enumerate(mesh_shape) if i in differ)


def collectives(program: str, devices: int, branch_share: float = 1.0, on_chip: int = 0) -> list[Collective]:
    """Returns every collective of `compiled.as_text()` over more than one device.

    The program runs on `devices`. Each branch of a conditional runs in `branch_share` of the conditional's runs. For
    `on_chip` see `kernels`.

    Raises ValueError where the text gives a collective's devices in a form that is not known here.
    """
    return list(_Program(program, branch_share, on_chip, devices).collectives("ENTRY", 1))


def kernels(program: str, branch_share: float = 1.0, on_chip: int = 0) -> list[tuple[float, Work]]:
    """Returns how often each kernel of `compiled.as_text()` runs per step, and its work.

    Bytes are those of operands and results, each moved once, which is a lower bound. Arrays whose number of elements
    is a multiple of `on_chip` do not count: they are attention's scores, of one layer or of several stacked layers,
    which a fused attention never writes to memory.
    """
    return list(_Program(program, branch_share, on_chip).kernels("ENTRY", 1))


class _Instruction(NamedTuple):
    name: str
    result: str  # its type
    op: str
    operands: list[str]  # names
    line: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        found = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", self.line)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self.line):
            found += [branch.strip(" %") for branch in branches.split(",")]
        return found

    @property
    def trips(self) -> int:
        """Iterations, if it is a loop."""
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.line)
        return int(trips[1]) if trips else 1


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[^\s(]+) ([a-z][\w\-]*)\((.*)")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_NO_KERNEL = re.compile(
    r"bitcast|constant|parameter|tuple|get-tuple-element|after-all|partition-id|replica-id|opt-barrier|.*-(start|update|done)"
    rf"|{'|'.join(KINDS)}"
)


class _Program:
    def __init__(self, text: str, branch_share: float, on_chip: int, devices: int = 0):
        self.branch_share, self.on_chip, self.devices = branch_share, on_chip, devices
        self.computations = dict(_computations(text))
        self.types = {name: {i.name: i.result for i in inside} for name, inside in self.computations.items()}
        self.flops_of: dict[str, int] = {}

    def collectives(
        self, name: str, times: float, in_loop: bool = False, hiding_work: Work | None = None
    ) -> Iterator[Collective]:
        """Yields those of a computation and of what it calls; `hiding_work` is given inside an `async-start`."""
        for at, instruction in enumerate(self.computations[name]):
            match = _COLLECTIVE.fullmatch(instruction.op)
            if match:
                groups = _device_groups(instruction.line, match[1], self.devices)
                nbytes = _result_bytes(instruction.result, started=match[2] is not None)
                nbytes *= len(groups[0]) if match[1] == "reduce-scatter" else 1
                meanwhile = self._work_until_done(name, at) if hiding_work is None else hiding_work
                if len(groups[0]) > 1:
                    yield Collective(match[1], nbytes, max(1, round(times)), groups, in_loop, meanwhile)
                continue
            inner = self._work_until_done(name, at) if instruction.op == "async-start" else hiding_work
            for called in self._called(instruction):
                runs = times * self._runs(instruction)
                yield from self.collectives(called, runs, in_loop or instruction.op == "while", inner)

    def kernels(self, name: str, times: float) -> Iterator[tuple[float, Work]]:
        """Yields those of a computation and of what it calls, with their runs."""
        for instruction in self.computations[name]:
            yield from self._kernels(instruction, name, times)

    def _kernels(self, instruction: _Instruction, within: str, times: float) -> Iterator[tuple[float, Work]]:
        if instruction.op in ("while", "call", "conditional"):
            for called in self._called(instruction):
                yield from self.kernels(called, times * self._runs(instruction))
        elif not _NO_KERNEL.fullmatch(instruction.op):
            work = self._kernel_work(instruction, within)
            if work != _NONE:
                yield times, work

    def _called(self, instruction: _Instruction) -> list[str]:
        return [name for name in instruction.called if name in self.computations]

    def _runs(self, instruction: _Instruction) -> float:
        """Returns how often it runs each computation that it calls."""
        return {"while": instruction.trips, "conditional": self.branch_share}.get(instruction.op, 1)

    def _work_until_done(self, name: str, at: int) -> Work:
        """Returns the work scheduled between the start of a collective, instruction `at`, and its end."""
        instructions = self.computations[name]
        awaited, flops, nbytes = instructions[at].name, 0.0, 0.0
        if not instructions[at].op.endswith("-start"):
            return _NONE
        for later in instructions[at + 1 :]:
            if awaited in later.operands and later.op.endswith("-update"):
                awaited = later.name
            elif awaited in later.operands and later.op.endswith("-done"):
                break
            for times, work in self._kernels(later, name, 1):
                flops, nbytes = flops + times * work.flops, nbytes + times * work.nbytes
        return Work(round(flops), round(nbytes))

    def _kernel_work(self, instruction: _Instruction, within: str) -> Work:
        types, flops = self.types[within], self._flops(instruction, within)
        if _bytes(instruction.result) < _NEGLIGIBLE_BYTES:
            return Work(flops, 0)
        moved = [instruction.result, *(types[name] for name in instruction.operands if name in types)]
        sizes = [_bytes(kind, self.on_chip) for kind in moved]
        callees = {i.op for called in self._called(instruction) for i in self.computations[called]}
        if callees & {"dynamic-slice", "dynamic-update-slice", "gather", "scatter"}:
            sizes = [size for size in sizes if size < max(sizes)]  # it touches a few rows of the largest
        return Work(flops, sum(sizes))

    def _flops(self, instruction: _Instruction, within: str) -> int:
        """Returns the operations of the matmuls that an instruction is or contains."""
        if instruction.op in ("dot", "custom-call"):
            return _dot_flops(instruction, self.types[within])
        for name in self._called(instruction):
            if name not in self.flops_of:
                self.flops_of[name] = sum(self._flops(inner, name) for inner in self.computations[name])
        return sum(self.flops_of[name] for name in self._called(instruction))


def _computations(program: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """Yields the computations: name and instructions. The name of the entry computation is "ENTRY"."""
    name, found = "", list[_Instruction]()
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            name, found = "ENTRY" if start[1] else start[2], []
        elif line.startswith("}") and name:
            yield name, found
            name = ""
        elif name:
            match = _INSTRUCTION.match(line)
            if match:
                operands = re.findall(r"%([\w.\-]+)", match[4].partition("), ")[0])
                found.append(_Instruction(match[1], match[2], match[3], operands, line))


def _shapes(result: str) -> list[tuple[str, list[int]]]:
    """Returns the dtypes and shapes in a type."""
    return [
        (dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _sizes(result: str) -> list[int]:
    return [_ITEM_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in _shapes(result)]


def _bytes(result: str, on_chip: int = 0) -> int:
    """Returns the bytes of all arrays in a type, except those whose number of elements is a multiple of `on_chip`."""
    shapes = zip(_sizes(result), _shapes(result), strict=True)
    return sum(size for size, (_, shape) in shapes if not on_chip or math.prod(shape) % on_chip)


def _result_bytes(result: str, started: bool) -> int:
    """Returns the bytes of a result. An instruction that starts a collective returns its operands as well."""
    sizes = _sizes(result)
    if started and result.startswith("(("):
        return sum(sizes[len(sizes) // 2 :])
    return max(sizes) if started else sum(sizes)


def _dot_flops(dot: _Instruction, types: dict[str, str]) -> int:
    """Returns the operations of XLA's own dot or of a call to cuBLAS; 0 for other calls."""
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', dot.line)
    if not contracted or dot.operands[0] not in types:
        return 0
    (_, left), (_, result) = _shapes(types[dot.operands[0]])[0], _shapes(dot.result)[0]
    return 2 * math.prod(result) * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))


def _device_groups(line: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the devices that communicate with each other, from any of the forms in which XLA prints them."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        assert pairs, line
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\d+,\d+", pairs[1]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        ids = _device_ids(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
        return tuple(map(tuple, ids.tolist()))
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}", line
    )
    if meshed:
        shape = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        ids = _device_ids(meshed[2] or str(devices), meshed[3]).reshape(tuple(shape.values()))
        along = [list(shape).index(axis) for axis in re.findall(r"'([^']+)'", meshed[4])]
        ids = np.moveaxis(ids, along, range(-len(along), 0))
        return tuple(map(tuple, ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(along) :])).tolist()))
    if re.search(r"replica_groups=\{\}|replica_groups=(?!\S)", line) or "replica_groups" not in line:
        return (tuple(range(devices)),)
    raise ValueError(f"kdjax.plan.hlo does not know this form of a collective's devices: {line.strip()[:400]}")


def _device_ids(shape: str, order: str | None) -> np.ndarray:
    """Returns device numbers 0, 1, ... in an array of this shape, with its axes then transposed to this order."""
    ids = np.arange(math.prod(sizes := [int(n) for n in shape.split(",")])).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids
