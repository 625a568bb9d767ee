"""What an optimised program sends between devices, and what it computes meanwhile, read from XLA's text of it.

The text is a schedule: instructions of a computation run in the order they stand in. XLA splits a collective into a
`-start` and a `-done`; what stands between them runs while the data are on their way, and nothing else does.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_BOOKKEEPING = 1024  # bytes; what a kernel with a smaller result does (a loop's counter, a mask) takes no time


class Work(NamedTuple):
    """What a device computes: operations of matmuls, and bytes that kernels read and write."""

    flops: int
    nbytes: int


_NONE = Work(0, 0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: how often it runs, the whole array's bytes, and the devices that take part together."""

    kind: str
    nbytes: int  # of what is reduced, or gathered, or scattered, before it is split
    times: int
    groups: tuple[tuple[int, ...], ...]
    in_loop: bool = False  # else it stands in no loop, and runs once a step
    beside: Work = _NONE  # what the device computes while it is under way, each time

    @property
    def overlapped(self) -> bool:
        """Whether anything is computed meanwhile."""
        return self.beside != _NONE

    @property
    def wire_bytes(self) -> float:
        """What each device sends in all: by rings, (n - 1) / n of the array, twice for an all-reduce."""
        if self.kind == "collective-permute":
            return self.times * self.nbytes
        n = len(self.groups[0])
        return self.times * self.nbytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def spans(self, per_host: int) -> bool:
        """Whether a group has devices of several hosts."""
        return any(len({device // per_host for device in group}) > 1 for group in self.groups)

    def fewest(self, per_host: int) -> int:
        """How many of a group's devices are in one host, at least."""
        return min(min(Counter(device // per_host for device in group).values()) for group in self.groups)

    def axes(self, shape: dict[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of that shape (devices numbered in its order) along which a group's devices differ."""
        differ: set[int] = set()
        for group in self.groups:
            places = np.array(np.unravel_index(group, tuple(shape.values())))
            differ |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
        return tuple(name for i, name in enumerate(shape) if i in differ)


def collectives(program: str, devices: int, taken: float = 1.0, on_chip: int = 0) -> list[Collective]:
    """Every collective of `compiled.as_text()` over more than one device, with the trips of the loops it stands in.

    `taken` is the share of its runs in which a conditional takes each of its branches: what stands in one runs so much
    less often. `on_chip`: see `kernels`. Raises ValueError where the text names devices in a way not known here.
    """
    return list(_Program(program, taken, on_chip, devices).collectives("ENTRY", 1))


def kernels(program: str, taken: float = 1.0, on_chip: int = 0) -> list[tuple[float, Work]]:
    """What each kernel of `compiled.as_text()` computes, and how often it runs.

    Bytes are those of operands and results, a lower bound: each read or written once. Arrays of `on_chip` elements, or
    of several times as many, do not count, in whatever shape: attention's scores, of one layer or of several stacked,
    which a fused attention never writes.
    """
    return list(_Program(program, taken, on_chip).kernels("ENTRY", 1))


class _Instruction(NamedTuple):
    name: str
    result: str  # its type
    op: str
    operands: list[str]
    line: str

    @property
    def called(self) -> list[str]:
        """The computations it runs."""
        found = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", self.line)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self.line):
            found += [branch.strip(" %") for branch in branches.split(",")]
        return found

    @property
    def trips(self) -> int:
        """How often it runs its body, if it is a loop."""
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.line)
        return int(trips[1]) if trips else 1


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[^\s(]+) ([a-z][\w\-]*)\((.*)")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_FREE = re.compile(
    r"bitcast|constant|parameter|tuple|get-tuple-element|after-all|partition-id|replica-id|opt-barrier|.*-(start|done)"
    rf"|{'|'.join(KINDS)}"
)


class _Program:
    def __init__(self, text: str, taken: float, on_chip: int, devices: int = 0):
        self.taken, self.devices = taken, devices
        self.on_chip = on_chip
        self.computations = dict(_computations(text))
        self.types = {name: {i.name: i.result for i in inside} for name, inside in self.computations.items()}
        self.flops_of: dict[str, int] = {}

    def collectives(
        self, name: str, times: float, in_loop: bool = False, beside: Work | None = None
    ) -> Iterator[Collective]:
        """Those of this computation and of what it calls; `beside` is given for the inside of an `async-start`."""
        for at, instruction in enumerate(self.computations[name]):
            match = _COLLECTIVE.fullmatch(instruction.op)
            if match:
                groups = _groups(instruction.line, match[1], self.devices)
                nbytes = _result_bytes(instruction.result, started=match[2] is not None)
                nbytes *= len(groups[0]) if match[1] == "reduce-scatter" else 1
                meanwhile = self._meanwhile(name, at) if beside is None else beside
                if len(groups[0]) > 1:
                    yield Collective(match[1], nbytes, max(1, round(times)), groups, in_loop, meanwhile)
                continue
            inner = self._meanwhile(name, at) if instruction.op == "async-start" else beside
            for called in self._called(instruction):
                runs = times * self._runs(instruction)
                yield from self.collectives(called, runs, in_loop or instruction.op == "while", inner)

    def kernels(self, name: str, times: float) -> Iterator[tuple[float, Work]]:
        """Those of this computation and of what it calls."""
        for instruction in self.computations[name]:
            yield from self._kernels(instruction, name, times)

    def _kernels(self, instruction: _Instruction, within: str, times: float) -> Iterator[tuple[float, Work]]:
        if instruction.op in ("while", "call", "conditional"):
            for called in self._called(instruction):
                yield from self.kernels(called, times * self._runs(instruction))
        elif not _FREE.fullmatch(instruction.op):
            work = self._work(instruction, within)
            if work != _NONE:
                yield times, work

    def _called(self, instruction: _Instruction) -> list[str]:
        return [name for name in instruction.called if name in self.computations]

    def _runs(self, instruction: _Instruction) -> float:
        """How often it runs each computation that it calls."""
        return {"while": instruction.trips, "conditional": self.taken}.get(instruction.op, 1)

    def _meanwhile(self, name: str, at: int) -> Work:
        """What stands between the start of a collective and its end."""
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

    def _work(self, instruction: _Instruction, within: str) -> Work:
        """Of one kernel."""
        types, flops = self.types[within], self._flops(instruction, within)
        if _bytes(instruction.result) < _BOOKKEEPING:
            return Work(flops, 0)
        moved = [instruction.result, *(types[name] for name in instruction.operands if name in types)]
        sizes = [_bytes(kind, self.on_chip) for kind in moved]
        callees = {i.op for called in self._called(instruction) for i in self.computations[called]}
        if callees & {"dynamic-slice", "dynamic-update-slice", "gather", "scatter"}:
            sizes = [size for size in sizes if size < max(sizes)]  # of the largest, some rows only
        return Work(flops, sum(sizes))

    def _flops(self, instruction: _Instruction, within: str) -> int:
        """Of the matmuls that it is or holds."""
        if instruction.op in ("dot", "custom-call"):
            return _dot_flops(instruction, self.types[within])
        for name in self._called(instruction):
            if name not in self.flops_of:
                self.flops_of[name] = sum(self._flops(inner, name) for inner in self.computations[name])
        return sum(self.flops_of[name] for name in self._called(instruction))


def _computations(program: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """Names and instructions of the computations; the program's own has the name "ENTRY"."""
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
    """Dtypes and shapes in a type."""
    return [
        (dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _sizes(result: str) -> list[int]:
    return [_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in _shapes(result)]


def _bytes(result: str, on_chip: int = 0) -> int:
    """Of all arrays in a type but those of so many elements, or several times as many."""

    def counts(elements: int) -> bool:
        return not on_chip or elements < on_chip or elements % on_chip != 0

    shapes = zip(_sizes(result), _shapes(result), strict=True)
    return sum(size for size, (_, shape) in shapes if counts(math.prod(shape)))


def _result_bytes(result: str, started: bool) -> int:
    """The bytes of a result; an instruction that starts a collective returns its operands as well."""
    sizes = _sizes(result)
    if started and result.startswith("(("):
        return sum(sizes[len(sizes) // 2 :])
    return max(sizes) if started else sum(sizes)


def _dot_flops(dot: _Instruction, types: dict[str, str]) -> int:
    """Of XLA's own dot, or of a call of cuBLAS; 0 for other calls."""
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', dot.line)
    if not contracted or dot.operands[0] not in types:
        return 0
    (_, left), (_, result) = _shapes(types[dot.operands[0]])[0], _shapes(dot.result)[0]
    return 2 * math.prod(result) * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))


def _groups(line: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part together, in any of the ways in which XLA writes them."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        assert pairs, line
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\d+,\d+", pairs[1]))
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        ids = _numbered(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
        return tuple(map(tuple, ids.tolist()))
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}", line
    )
    if meshed:
        shape = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        ids = _numbered(meshed[2] or str(devices), meshed[3]).reshape(tuple(shape.values()))
        along = [list(shape).index(axis) for axis in re.findall(r"'([^']+)'", meshed[4])]
        ids = np.moveaxis(ids, along, range(-len(along), 0))
        return tuple(map(tuple, ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(along) :])).tolist()))
    if re.search(r"replica_groups=\{\}|replica_groups=(?!\S)", line) or "replica_groups" not in line:
        return (tuple(range(devices)),)
    raise ValueError(
        f"XLA writes a collective's devices in a way that kdjax.plan.hlo does not know: {line.strip()[:400]}"
    )


def _numbered(shape: str, order: str | None) -> "np.ndarray":
    """Device numbers 0, 1, ... in an array of that shape, its axes then in that order."""
    ids = np.arange(math.prod(sizes := [int(n) for n in shape.split(",")])).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids
