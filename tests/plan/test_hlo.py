"""What is read from XLA's text of a program: devices, loops, and the work that overlaps a collective."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from kdjax.plan.hlo import Collective, Work, collectives, kernels

LINES, COLUMNS = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
# A schedule as XLA writes it for GPUs, shortened. M = [512, 256] in bfloat16 has 2^18 bytes.
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%matmul (p.0: bf16[512,256], p.1: bf16[256,512]) -> f32[512,512] {
  %p.0 = bf16[512,256]{1,0} parameter(0)
  %p.1 = bf16[256,512]{1,0} parameter(1)
  ROOT %dot.1 = f32[512,512]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%row (p.2: bf16[9,512,256], p.3: s32[]) -> bf16[1,512,256] {
  %p.2 = bf16[9,512,256]{2,1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  ROOT %slice.1 = bf16[1,512,256]{2,1,0} dynamic-slice(%p.2, %p.3), dynamic_slice_sizes={1,512,256}
}

%hidden (p.4: bf16[512,256]) -> bf16[512,256] {
  %p.4 = bf16[512,256]{1,0} parameter(0)
  ROOT %all-reduce.9 = bf16[512,256]{1,0} all-reduce(%p.4), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}

%due (p.5: bf16[512,256]) -> bf16[512,256] {
  %p.5 = bf16[512,256]{1,0} parameter(0)
  ROOT %all-reduce.8 = bf16[512,256]{1,0} all-reduce(%p.5), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%idle (p.6: bf16[512,256]) -> bf16[512,256] {
  %p.6 = bf16[512,256]{1,0} parameter(0)
  ROOT %copy.8 = bf16[512,256]{1,0} copy(%p.6)
}

%tick (state: (s32[], bf16[512,256], bf16[9,512,256], bf16[256,512])) -> (s32[], bf16[512,256], /*index=2*/bf16[9]) {
  %state = (s32[], bf16[512,256]{1,0}, bf16[9,512,256]{2,1,0}, bf16[256,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[512,256]{1,0} get-tuple-element(%state), index=1
  %xs = bf16[9,512,256]{2,1,0} get-tuple-element(%state), index=2
  %w = bf16[256,512]{1,0} get-tuple-element(%state), index=3
  %permute-start = (bf16[512,256]{1,0}, bf16[512,256]{1,0}) collective-permute-start(%x), \
source_target_pairs={{0,4},{4,0}}
  %scores = f32[512,512]{1,0} fusion(%x, %w), kind=kCustom, calls=%matmul
  %next = s32[] fusion(%i), kind=kLoop, calls=%add
  %permute-done = bf16[512,256]{1,0} collective-permute-done(%permute-start)
  %all-reduce-start.1 = bf16[512,256]{1,0} all-reduce-start(%permute-done), \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %next.2 = s32[] fusion(%i), kind=kLoop, calls=%add
  %all-reduce-done.1 = bf16[512,256]{1,0} all-reduce-done(%all-reduce-start.1)
  %picked = bf16[1,512,256]{2,1,0} fusion(%xs, %i), kind=kLoop, calls=%row
  %conditional.1 = bf16[512,256]{1,0} conditional(%p, %x, %x), true_computation=%due, false_computation=%idle
  ROOT %out = (s32[], bf16[512,256]{1,0}) tuple(%next, %conditional.1)
}

%while (state.2: (s32[], bf16[512,256])) -> pred[] {
  %state.2 = (s32[], bf16[512,256]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%state.2, %state.2), direction=LT
}

ENTRY %main (x.1: bf16[512,256], w.1: bf16[256,512]) -> bf16[512,256] {
  %x.1 = bf16[512,256]{1,0} parameter(0)
  %w.1 = bf16[256,512]{1,0} parameter(1)
  %async-start = ((bf16[512,256]), bf16[512,256]{1,0}) async-start(%x.1), calls=%hidden
  %gemm = (f32[512,512]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %async-done = bf16[512,256]{1,0} async-done(%async-start)
  %tuple.1 = (s32[], bf16[512,256]{1,0}) tuple(%x.1, %async-done)
  %while.1 = (s32[], bf16[512,256]{1,0}) while(%tuple.1), condition=%while, body=%tick, \
backend_config={"known_trip_count":{"n":"6"}}
  %gather = bf16[4096,256]{1,0} all-gather(%x.1), replica_groups=GROUPS, dimensions={0}
  ROOT %alone = bf16[512,256]{1,0} all-reduce(%x.1), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""
MATRIX, MATMUL = 2**18, 2 * 512 * 512 * 256


def program(groups: str = "{}") -> str:
    return PROGRAM.replace("GROUPS", groups)


def test_loops_conditionals_and_work_between_start_and_done() -> None:
    """A permute beside a matmul, a sum beside a loop counter, one in a branch, one in an async wrapper."""
    during_permute = Work(MATMUL, 2 * MATRIX + 4 * 512 * 512)
    expected = {
        Collective("all-reduce", MATRIX, 1, COLUMNS, False, Work(MATMUL, 2 * MATRIX + 4 * 512 * 512 + 4194304)),
        Collective("collective-permute", MATRIX, 6, ((0, 4), (4, 0)), True, during_permute),
        Collective("all-reduce", MATRIX, 6, LINES, True, Work(0, 0)),
        Collective("all-reduce", MATRIX, 3, LINES, True, Work(0, 0)),  # a branch that half the runs take
        Collective("all-gather", 8 * MATRIX, 1, (tuple(range(8)),), False, Work(0, 0)),
    }
    found = collectives(program(), 8, branch_share=0.5)
    assert len(found) == len(expected)
    assert set(found) == expected
    assert {c.kind for c in found if c.is_overlapped} == {"collective-permute", "all-reduce"}
    assert sum(c.is_overlapped for c in found) == 2


def test_kernels_and_their_bytes() -> None:
    """A GEMM of cuBLAS, and six times: a matmul, a row sliced out of nine, half of a copy. Counters take no time."""
    found = kernels(program(), branch_share=0.5)
    assert sorted(found) == [
        (1, Work(MATMUL, 2 * MATRIX + 4 * 512 * 512 + 4194304)),
        (3, Work(0, 2 * MATRIX)),
        (6, Work(0, MATRIX + 4)),  # the one row
        (6, Work(MATMUL, 2 * MATRIX + 4 * 512 * 512)),
    ]
    on_chip = kernels(program(), branch_share=0.5, on_chip=512 * 512)
    assert (6, Work(MATMUL, 2 * MATRIX)) in on_chip, "scores [512, 512] are not counted"
    assert kernels(program(), branch_share=0.5, on_chip=11) == found


def test_branches_in_a_list() -> None:
    """As XLA prints a conditional on an integer."""
    listed = program().replace("true_computation=%due, false_computation=%idle", "branch_computations={%due, %idle}")
    assert listed != program()
    assert collectives(listed, 8, branch_share=0.5) == collectives(program(), 8, branch_share=0.5)
    assert kernels(listed, branch_share=0.5) == kernels(program(), branch_share=0.5)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{}", (tuple(range(8)),)),
        ("{{0,1,2,3},{4,5,6,7}}", LINES),
        ("[2,4]<=[8]", LINES),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4] {'axis_2'}", LINES),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}", COLUMNS),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", (tuple(range(8)),)),
        ("mesh['axis_0'=8,'axis_1'=1], device_ids=([4,2]T(1,0)) {'axis_0'}", ((0, 2, 4, 6, 1, 3, 5, 7),)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", COLUMNS),
    ],
)
def test_device_groups_in_each_form_that_xla_prints(written: str, groups: tuple[tuple[int, ...], ...]) -> None:
    [gather] = [c for c in collectives(program(written), 8) if c.kind == "all-gather"]
    assert gather.groups == groups


@pytest.mark.parametrize("written", ["mesh['axis_0'=8] {'axis_0':(2)4}", "torus(8)"])
def test_device_groups_in_an_unknown_form_are_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"does not know this form of a collective's devices: %gather"):
        collectives(program(written), 8)


ASYNC = """HloModule jit_g, is_scheduled=true

ENTRY %main (x: f8e4m3fn[64,64], y: f99[64,64]) -> f32[16,64] {
  %x = f8e4m3fn[64,64]{1,0} parameter(0)
  %y = f99[64,64]{1,0} parameter(1)
  %start = ((f32[64,64]{1,0}), f32[16,64]{1,0}) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %before = f32[64,64]{1,0} fusion(%y), kind=kLoop, calls=%absent
  %update = ((f32[64,64]{1,0}), f32[16,64]{1,0}) reduce-scatter-update(%start)
  %between = f8e4m3fn[64,64]{1,0} fusion(%x), kind=kLoop, calls=%absent
  %done = f32[16,64]{1,0} reduce-scatter-done(%update)
  %after = f32[64,64]{1,0} fusion(%x), kind=kLoop, calls=%absent
  %scattered = f32[16,64]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3}}, dimensions={0}
  %pair = ((f32[4], f32[6]), (f32[8], f32[12])) all-gather-start(%x, %y), replica_groups={{0,1}}, dimensions={0}
  ROOT %small = f32[255]{0} fusion(%x), kind=kLoop, calls=%absent
}
"""


def test_updates_tuples_and_scattered_arrays() -> None:
    """A start awaited through an update; both arrays of a pair; a scattered array in full; a dtype not known here."""
    started, scattered, pair = collectives(ASYNC, 4)
    whole = 64 * 64 * 4
    meanwhile = Work(0, 2 * whole + 2 * 64 * 64)
    assert started == Collective("reduce-scatter", whole, 1, ((0, 1, 2, 3),), hiding_work=meanwhile)
    assert scattered == Collective("reduce-scatter", whole, 1, ((0, 1, 2, 3),))
    assert pair == Collective("all-gather", 4 * (8 + 12), 1, ((0, 1),))
    sizes = [work.nbytes for _, work in kernels(ASYNC)]
    assert sizes == [2 * whole, 2 * 64 * 64, whole + 64 * 64], "the last result is below 1 KiB"


@pytest.mark.parametrize(
    "name", ["bool_", "int8", "bfloat16", "float16", "uint16", "float32", "int32", "uint64", "float64"]
)
def test_bytes_of_each_dtype(name: str) -> None:
    """XLA's names are pred, s8, bf16 and so on."""
    kind, bits = re.fullmatch(r"([a-z]+)(\d*)_?", name).groups()
    xla_name = {"bool": "pred", "int": "s", "uint": "u", "float": "f", "bfloat": "bf"}[kind] + bits
    text = ASYNC.replace("f32[16,64]{1,0} reduce-scatter(%y)", f"{xla_name}[16,64]{{1,0}} reduce-scatter(%y)")
    _, scattered, _ = collectives(text, 4)
    assert scattered.nbytes == 4 * 16 * 64 * jnp.dtype(name).itemsize


def test_a_collective_in_a_rare_branch_runs_at_least_once() -> None:
    found = [c for c in collectives(program(), 8, branch_share=0.01) if c.times == 1 and c.in_loop]
    assert found == [Collective("all-reduce", MATRIX, 1, LINES, True)]


def test_bytes_sent_by_rings() -> None:
    def sent(kind: str) -> float:
        return Collective(kind, 100, 3, ((0, 1, 2, 3), (4, 5, 6, 7))).sent_bytes

    assert sent("all-gather") == sent("reduce-scatter") == sent("all-to-all") == 3 * 75
    assert sent("all-reduce") == 3 * 150
    assert sent("collective-permute") == 3 * 100


def test_axes_of_a_mesh() -> None:
    def axes(*groups: tuple[int, ...]) -> tuple[str, ...]:
        return Collective("all-reduce", 1, 1, groups).axes({"pipe": 2, "data": 2, "fsdp": 1, "tensor": 3})

    assert axes((0, 1, 2), (3, 4, 5)) == ("tensor",)
    assert axes((0, 6), (1, 7)) == ("pipe",)
    assert axes((0, 1, 2, 6, 7, 8)) == ("pipe", "tensor")
    assert axes(tuple(range(12))) == ("pipe", "data", "tensor")
    assert axes((2, 5), (5, 2)) == ("data",)


def test_hosts() -> None:
    within, across, two_each = (
        Collective("all-reduce", 1, 1, groups) for groups in (((0, 1), (8, 9)), ((0, 8),), ((0, 1, 8, 9),))
    )
    assert [c.spans_hosts(8) for c in (within, across, two_each)] == [False, True, True]
    assert [c.min_devices_per_host(8) for c in (within, across, two_each)] == [2, 1, 2]


def test_collectives_of_a_compiled_program() -> None:
    """An all-reduce in a loop of five runs five times; groups and bytes are those of the arrays."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def f(x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda y, _: (jnp.sin(jax.lax.psum(y, "tensor")), None), x, None, length=5)
        return jax.lax.all_gather(y, "data", axis=0, tiled=True)

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P(None), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((6, 7), jnp.float32)).compile().as_text()
    reduced = Collective("all-reduce", 3 * 7 * 4, 5, LINES, in_loop=True)
    gathered = Collective("all-gather", 6 * 7 * 4, 1, COLUMNS)
    assert sorted(collectives(text, 8), key=lambda c: c.kind) == [gathered, reduced]
    assert reduced.sent_bytes == 5 * 84 * 2 * 3 / 4
    assert gathered.sent_bytes == 168 / 2


@pytest.mark.usefixtures("compiler", "uncached")
def test_overlap_is_what_the_compiler_for_an_h100_scheduled() -> None:
    """A sum beside a matmul that does not need it hides; one whose result the matmul multiplies does not."""
    from kdjax.plan.gpus import topology

    mesh = Mesh(np.array(topology("h100", 8).devices), ("data",), axis_types=(AxisType.Auto,))

    def found(needed: bool) -> Collective:
        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            total = jax.lax.psum(x, "data")
            return (total if needed else x) @ w + total

        mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        sharding = jax.sharding.NamedSharding(mesh, P())
        shape = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding)
        [sent] = collectives(jax.jit(mapped).lower(shape, shape).compile().as_text(), 8)
        return sent

    assert found(needed=False).hiding_work.flops == 2 * 1024**3
    assert not found(needed=True).is_overlapped
