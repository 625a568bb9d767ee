"""What an optimised program sends between devices, read from XLA's text of it."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: how often it runs, the whole array's bytes, and the devices that take part together."""

    kind: str
    nbytes: int  # of what is reduced, or gathered, or scattered, before it is split
    times: int
    groups: tuple[tuple[int, ...], ...]

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


def collectives(program: str, devices: int) -> list[Collective]:
    """Every collective of `compiled.as_text()` over more than one device, with the trips of the loops it stands in."""
    computations = dict(_computations(program))
    found = []
    for name, times in _runs(computations).items():
        for line in computations[name]:
            match = re.search(rf"= (\(?[^=]*?\)?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match:
                kind, nbytes = match[2], _result_bytes(match[1], started=match[3] is not None)
                groups = _groups(line, kind, devices)
                if kind == "reduce-scatter":
                    nbytes *= len(groups[0])
                if len(groups[0]) > 1 or kind == "collective-permute":
                    found.append(Collective(kind, nbytes, times, groups))
    return found


def _computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of the computations; the program's own has the name "ENTRY"."""
    name, lines = "", list[str]()
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            name, lines = "ENTRY" if start[1] else start[2], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _runs(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    runs: dict[str, int] = defaultdict(int)
    queue = [("ENTRY", 1)]
    while queue:
        name, times = queue.pop()
        runs[name] += times
        for line in computations[name]:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for role, called in re.findall(r"(body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)", line):
                if called in computations:
                    queue.append((called, times * (int(trips[1]) if trips and role == "body" else 1)))
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                queue += [(branch.strip(" %"), times) for branch in branches.split(",")]
    return runs


def _result_bytes(result: str, started: bool) -> int:
    """The bytes of a result; an instruction that starts a collective returns its operands as well."""
    sizes = [
        _BYTES.get(dtype, 4) * int(np.prod([int(n) for n in shape.split(",") if n]))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    if started and result.startswith("(("):
        return sum(sizes[len(sizes) // 2 :])
    return max(sizes) if started else sum(sizes)


def _groups(line: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        ids = np.arange(devices).reshape([int(n) for n in counted[3].split(",")])
        if counted[4]:
            ids = ids.transpose([int(n) for n in counted[4].split(",")])
        return tuple(map(tuple, ids.reshape(int(counted[1]), int(counted[2])).tolist()))
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if kind == "collective-permute" and pairs:
        return tuple(tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\d+,\d+", pairs[1]))
    return (tuple(range(devices)),)
