"""Compiles the kernels for an H100 on a machine without one; run as a script, it prints the table of docs/kernels.md.

Compiling takes a process of its own, because the environment says, once, where XLA dumps its PTX. The program is the
value and gradient of `topk_kd_loss` with the logits donated: nothing needs them later, as in a training step.

What is counted, and how:

- passes: `traffic` lists the instructions of the optimised HLO that read or write an array of N * V elements. Each of
  them is a pass, unless it only renames memory (`RENAMES`).
- accesses of a kernel to such an array are counted in its PTX: `tiles` finds the loop over the row, its number of
  iterations, and the loads and stores inside and outside. A row is read once if the widest loads, those in the loop
  times its iterations plus those of the rest of the row, move as many bytes as the row has, up to the end of the last,
  masked tile. The narrower loads are those of single columns and of the K entries.
- registers and spills are reported by `ptxas -v` for that PTX.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

B, T = 4, 2048
N = B * T
VOCABULARIES, DTYPES, TOPK = (32000, 128256, 151936), ("bfloat16", "float32"), (4, 64, 100)
RENAMES = ("parameter", "bitcast", "get-tuple-element", "tuple")


@dataclasses.dataclass(frozen=True)
class Case:
    v: int
    dtype: str
    k: int
    implementation: str = "pallas"
    settings: tuple[tuple[str, Any], ...] = (("sft_loss_weight", 0.4),)
    donate: bool = True  # the logits

    @property
    def name(self) -> str:
        settings = [word for pair in self.settings for word in pair]
        words = (self.implementation, self.v, self.dtype, self.k, *settings, "donated" if self.donate else "kept")
        return re.sub(r"\W", "_", "_".join(map(str, words)))


GRID = [Case(v, dtype, k) for v in VOCABULARIES for dtype in DTYPES for k in TOPK]
KD_ONLY = Case(128256, "bfloat16", 64, settings=())
GHOST = Case(128256, "float16", 100, settings=(("kd_loss", "jsd"), ("tail", "ghost"), ("sft_loss_weight", 0.4)))
UNALIGNED = Case(50257, "bfloat16", 64)  # GPT-2's, not padded
KEPT = Case(128256, "bfloat16", 64, donate=False)
XLA = Case(128256, "bfloat16", 64, "xla")
CASES = [*GRID, KD_ONLY, GHOST, UNALIGNED, KEPT, XLA]


def missing() -> str | None:
    """Returns what must be installed before anything here works, or None."""
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        return "no CUDA compiler for JAX: pip install 'kdjax[aot]'"
    return None if ptxas() else "no ptxas: pip install nvidia-cuda-nvcc-cu12"


def ptxas() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        if (path := Path(root, "cuda_nvcc", "bin", "ptxas")).exists():
            return str(path)
    return shutil.which("ptxas")


def ptxas_version() -> str:
    report = subprocess.run([str(ptxas()), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r", V([\d.]+)", report)[0]


def run(*arguments: str) -> str:
    """Returns the output of this file, run in a fresh process."""
    with tempfile.TemporaryDirectory() as dump:
        environment = {
            name: value for name, value in os.environ.items() if "CACHE" not in name
        }  # a cached program is not dumped
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_emitter_re=ptx --xla_dump_hlo_module_re=jit_aot_.*",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, __file__, "--dump", dump, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_case(case: Case, dump: Path) -> dict[str, Any]:
    """Returns everything that is counted in one case."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kdjax.losses import topk_kd_loss
    from kdjax.plan.gpus import topology

    mesh = jax.sharding.Mesh(np.array(topology("h100", 1).devices), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, T, *shape), dtype, sharding=whole)

    def total(logits: jax.Array, *teaching: jax.Array) -> jax.Array:
        *teaching, weight, lse = teaching
        loss, _, _ = topk_kd_loss(
            logits, *teaching, log_sum_exp_logits=lse, implementation=case.implementation, **dict(case.settings)
        )
        return jnp.where(weight == 0, 0, weight * loss).sum()

    def aot(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(total)(*arguments)

    aot.__name__ = f"aot_{case.name}"
    number = array((), jnp.float32)
    teaching = array((case.k,), jnp.float32), array((case.k,), jnp.int32), array((), jnp.int32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(aot, donate_argnums=0 if case.donate else ()).lower(
            array((case.v,), case.dtype), *teaching, number, number
        )
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        **dataclasses.asdict(case),
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "traffic": traffic(compiled.as_text(), N * case.v),
        "kernels": {
            name: {**resources(ptx), **tiles(ptx), "barriers": barriers(ptx)}
            for path in dump.glob(f"*jit_{aot.__name__}.*.ptx")
            for ptx in [path.read_text()]
            for name in re.findall(r"\.entry (kdjax_\w+)", ptx)
        },
    }


def traffic(hlo: str, elements: int) -> list[tuple[str, int, int]]:
    """Returns (opcode or target, arrays read, arrays written) of each instruction that touches an array of that size.

    Inside fusions nothing is counted: only their operands and results are in memory.
    """
    fused = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", hlo))
    large: dict[str, int] = {}
    found = []
    for computation, body in re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", hlo, re.DOTALL | re.MULTILINE):
        if computation in fused:
            continue
        for name, kinds, opcode, rest in re.findall(r"%([\w.-]+) = (.*?) ([\w-]+)\((.*)", body):
            shapes = re.findall(r"\[([\d,]+)\]", kinds)
            large[name] = sum(math.prod(map(int, shape.split(","))) == elements for shape in shapes)
            reads = sum(large.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", rest.split(")")[0]))
            if (reads or large[name]) and opcode not in RENAMES:
                target = re.search(r'custom_call_target="([^"]+)"', rest)
                kernel = re.search(r'[/"](kdjax_\w+)', rest)
                found.append(((kernel or target)[1] if kernel or target else opcode, reads, large[name]))
    return found


def resources(ptx: str) -> dict[str, int]:
    """Returns the registers per thread and the bytes spilled to memory on an H100."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas()), "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    return {name: int(re.findall(pattern, report)[0]) for name, pattern in numbers.items()}


def tiles(ptx: str) -> dict[str, Any]:
    """Returns, for loads (ld) and stores (st), the bytes of the widest access in the loop over a row (of all if there
    is no loop), the number of these inside and outside the loop, and the bytes that they move, before masks.
    """
    threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE)}
    loops = [
        (labels[m[2]], m.end(), m[1])
        for m in re.finditer(r"@(%p\d+) bra\s+(\$L\w+);", ptx)
        if m[2] in labels and labels[m[2]] < m.start()
    ]
    # The loop that moves most bytes; a short one may be unrolled, and loops over parts of the K entries move little.
    start, end, predicate = max(loops, key=lambda loop: sum(accesses(ptx[loop[0] : loop[1]])), default=(0, 0, ""))
    body, outside = ptx[start:end], ptx[:start] + ptx[end:]
    runs = trips(ptx[:start], body, predicate) if accesses(body) else 0
    counted: dict[str, Any] = {"threads": threads, "trips": runs}
    for kind in ("ld", "st"):
        width = max(accesses(body, kind) or accesses(ptx, kind), default=0)
        inside, rest = (accesses(part, kind).count(width) for part in (body, outside))
        total = threads * width * (runs * inside + rest)
        counted[kind] = {"bytes_per_access": width, "in_loop": inside, "outside": rest, "bytes": total}
    return counted


def accesses(ptx: str, kind: str = "ld|st") -> list[int]:
    """Returns the bytes of each access of a thread to global memory."""
    found = re.findall(rf"\b(?:{kind})\.global(?:\.v(\d))?\.[a-z](\d+)", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def trips(before: str, body: str, predicate: str) -> int:
    """Returns the iterations of the loop, whose counter goes from a constant to a constant by a constant."""
    [(counter, stop)] = re.findall(rf"setp\.ne\.[bsu]\d+ \s*{predicate}, (%\w+), (-?\d+);", body)
    counter = next(
        iter(re.findall(rf"cvt\.u32\.u64 \s*{counter}, (%\w+);", body)), counter
    )  # the counter may have 64 bits
    [step] = re.findall(rf"add\.[su]\d+ \s*{counter}, {counter}, (-?\d+);", body)
    first = re.findall(rf"mov\.[bsu]\d+ \s*{counter}, (-?\d+);", before)[-1]
    return (int(stop) - int(first)) // int(step)


def barriers(ptx: str) -> int:
    """Returns the number of barriers between a program's 16-byte stores and the narrower stores after them."""
    *_, after = re.split(r"st\.global\.v4\.b32", ptx)
    return re.split(r"st\.global\.b", after)[0].count("bar.sync")


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table, one line per kernel."""
    lines = [
        "| V | logits | K | kernel | registers | spilled bytes | bytes a load | bytes a store"
        " | loop: runs x (loads + stores) | [N, V] read | [N, V] written |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name in ("kdjax_sweep", "kdjax_spread"):
            kernel = result["kernels"][name]
            ld, st = kernel["ld"], kernel["st"]
            reads, writes = (sum(row[at] for row in result["traffic"] if row[0] == name) for at in (1, 2))
            cells = [result["v"], result["dtype"], result["k"], name.removeprefix("kdjax_"), kernel["registers"]]
            cells += [kernel["spill_stores"] + kernel["spill_loads"], ld["bytes_per_access"]]
            cells += [
                st["bytes_per_access"] if writes else "",
                f"{kernel['trips']} x ({ld['in_loop']} + {st['in_loop']})",
            ]
            lines.append("| " + " | ".join(map(str, [*cells, reads, writes])) + " |")
    return "\n".join(lines)


def main() -> None:
    if "--dump" not in sys.argv:
        print(table(json.loads(run(*(case.name for case in GRID)))))
        return
    dump, names = Path(sys.argv[2]), sys.argv[3:]
    print(json.dumps([compile_case(case, dump) for case in CASES if not names or case.name in names]))


if __name__ == "__main__":
    main()
