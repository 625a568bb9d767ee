"""A plan as text."""

from example_plans import DATA_GROUPS_ACROSS_HOSTS, MESH, TENSOR_GROUPS, config, imagined

from kdjax.plan import table
from kdjax.plan.hlo import Collective, Work

SENT = [
    Collective("all-reduce", 2**30, 3, TENSOR_GROUPS, True, Work(0, 10**9)),
    Collective("all-reduce", 2**30, 2, TENSOR_GROUPS, True, Work(0, 10**9)),
    Collective("all-gather", 2**30, 1, DATA_GROUPS_ACROSS_HOSTS),
    Collective("all-reduce", 4, 7, TENSOR_GROUPS),
]


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_plan_as_text() -> None:
    memory = {"parameters": 2**34, "batch": 2**30}
    plan = imagined(config(), memory=memory, collectives=SENT, mesh_shape=MESH | {"data": 2})
    assert words(table.render(plan)) == [
        "16 x NVIDIA H100 80GB HBM3; mesh pipe 1 x data 2 x fsdp 1 x tensor 8; global batch 16 x 512 tokens, "
        "microbatch 1 x 512; remat layer; XLA flags none; compiled in 1 s",
        "",
        "memory per device",
        "parameters 16.00 GiB 20%",
        "batch 1.00 GiB 1%",
        "total 17.00 GiB 21%",
        "fits; limit: 90% of 79.1 GiB",
        "",
        "collectives per step and device",
        "all-reduce over tensor within a host 5 times in microbatches 8.750 GiB sent 0.0209 s overlapped, 7% hidden",
        "all-gather over data across hosts 1 times per step 0.500 GiB sent 0.0107 s exposed",
        "and 7 that send less than 1 MiB",
        "",
        "step time, estimated from a roofline (see --help), not measured",
        "matmuls 0.000 s 0.0 TFLOP per device, with recomputation",
        "compute 1.000 s all kernels, including matmuls",
        "communication 0.032 s of which 0.001 s hidden, 0.030 s exposed",
        "step 1.030 s compute + exposed communication; lower bound 0.032 s",
        "tokens/s 7,952 upper bound 259,112",
        "MFU 0.2% of the GPU's bfloat16 peak, model operations without recomputation",
    ]


def test_a_pipeline_that_sends_nothing_and_does_not_fit() -> None:
    piped = config(mesh__pipe=2, mesh__data=1, batch__global_size=4)
    text = table.render(imagined(piped, nbytes=2**37))
    assert "DOES NOT FIT; limit: 90% of 79.1 GiB" in text
    assert "  none" in text.splitlines()
    assert "with recomputation and bubble" in text
    assert "bubble             20.0%    of the layers' time: 2 stages x 1 chunks, 4 microbatches" in text
    in_tick = Collective("collective-permute", 2**20, 1, ((0, 1), (1, 0)), in_loop=True)
    (line,) = table._collective_lines(imagined(piped, collectives=[in_tick]))
    assert "over pipe " in line
    assert " 1 times in ticks " in line


def test_slow_but_small_collectives_do_not_end_the_table() -> None:
    small = Collective("all-gather", 2**20, 1, DATA_GROUPS_ACROSS_HOSTS)
    large = Collective("all-reduce", 2**20, 1, TENSOR_GROUPS)
    lines = table._collective_lines(imagined(config(), collectives=[small, large], mesh_shape=MESH | {"data": 2}))
    assert [line.split()[0] for line in lines] == ["all-reduce", "and"]
