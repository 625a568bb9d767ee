"""A process's cluster: from the command line, or from a launcher's variables."""

import argparse
import re

import pytest

from kdjax.distributed import cluster
from kdjax.distributed.cluster import Cluster
from kdjax.types import UserError

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "a"}
OMPI_4 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}
OMPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "1"}


def detect(environment: dict[str, str], *flags: str) -> Cluster | None:
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    return cluster.detect_cluster(parser.parse_args(flags), environment)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, [], None),
        ({}, ["--coordinator=a:1", "--processes=4", "--process=3"], Cluster("a:1", 4, 3)),
        ({}, ["--coordinator=a:65535", "--processes=4", "--process=0"], Cluster("a:65535", 4, 0)),
        ({}, ["--coordinator=a:1", "--processes=1", "--process=0"], None),
        (SLURM, [], Cluster(None, 4, 3)),
        (SLURM, ["--coordinator=a:1", "--processes=2", "--process=0"], Cluster("a:1", 2, 0)),  # flags win
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, [], None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, [], None),  # in the batch script itself
        (OMPI_4, [], Cluster(None, 4, 2)),
        (SLURM | {"SLURM_PROCID": "0"} | OMPI_4, [], Cluster(None, 4, 2)),  # mpirun in a Slurm job
        (OMPI_5, ["--coordinator=a:1"], Cluster("a:1", 4, 2)),
        (KUBERNETES, [], None),  # an indexed job may as well be a sweep
        (KUBERNETES, ["--coordinator=a:1", "--processes=2"], Cluster("a:1", 2, 1)),
    ],
)
def test_the_cluster_of_a_process(environment: dict[str, str], flags: list[str], expected: Cluster | None) -> None:
    assert detect(environment, *flags) == expected


@pytest.mark.parametrize(
    ("environment", "flags", "error"),
    [
        ({}, ["--processes=2"], "--processes 2 also needs --coordinator HOST:PORT"),
        ({}, ["--process=0"], "--process 0 also needs --coordinator HOST:PORT"),
        ({}, ["--coordinator=a:1"], "--coordinator a:1 also needs --processes N"),
        ({}, ["--coordinator=a:1", "--processes=2"], "--coordinator a:1 also needs --process I"),
        ({}, ["--coordinator=a", "--processes=2", "--process=0"], "--coordinator a: give HOST:PORT"),
        ({}, ["--coordinator=:1", "--processes=2", "--process=0"], "--coordinator :1: give HOST:PORT"),
        ({}, ["--coordinator=a:0", "--processes=2", "--process=0"], "a:0: give HOST:PORT"),
        ({}, ["--coordinator=a:65536", "--processes=2", "--process=0"], "a:65536: give HOST:PORT"),
        (
            {},
            ["--coordinator=a:1", "--processes=2", "--process=2"],
            "--process 2: with --processes 2 it must be",
        ),
        ({}, ["--coordinator=a:1", "--processes=2", "--process=-1"], "must be from 0 to 1"),
        (OMPI_5, [], "Open MPI started 4 processes but does not say where process 0 is"),
    ],
)
def test_incomplete_or_contradicting_flags(environment: dict[str, str], flags: list[str], error: str) -> None:
    with pytest.raises(UserError, match=re.escape(error)):
        detect(environment, *flags)


def test_defaults() -> None:
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    defaults = parser.parse_args([])
    assert (defaults.heartbeat, defaults.join_timeout, defaults.step_timeout) == (100, 300, None)
