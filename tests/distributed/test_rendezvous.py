"""The rendezvous: processes that all join, and which process reports what is wrong when they do not."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT

from kdjax.distributed import rendezvous
from kdjax.distributed.rendezvous import describe_processes
from kdjax.types import UserError

HOST = re.escape(socket.gethostname())


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def address() -> str:
    return free_address()


def outcomes(*calls: Callable[[], None]) -> list[BaseException | None]:
    """Runs all calls at once and returns how each ended."""
    ended: list[BaseException | None] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            calls[i]()
        except BaseException as error:
            ended[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return ended


def join(address: str, processes: int, process: int, timeout_s: float = 20, after_s: float = 0) -> Callable[[], None]:
    def call() -> None:
        time.sleep(after_s)
        rendezvous.wait_for_all(address, processes, process, timeout_s)

    return call


def test_all_join_in_any_order_and_leave_the_port_free(address: str) -> None:
    for delays in ((0.3, 0, 0), (0, 0.3, 0.2)):
        calls = [join(address, 3, process, after_s=delay) for process, delay in enumerate(delays)]
        assert outcomes(*calls) == [None] * 3
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_an_ipv6_address(address: str) -> None:
    address = f"[::1]:{address.rpartition(':')[2]}"
    assert outcomes(join(address, 2, 0), join(address, 2, 1)) == [None] * 2


def test_missing_processes_are_named_with_those_that_joined(address: str) -> None:
    first, third = outcomes(join(address, 5, 0, timeout_s=0.5), join(address, 5, 2))
    assert isinstance(first, UserError)
    connected = rf"\(connected: 0 on {HOST}, 2 on {HOST}\); check that they were started"
    assert re.match(rf"processes 1, 3, 4 of 5 did not connect to {address} within 0.5 s {connected}", str(first))
    assert isinstance(third, SystemExit)
    assert third.code == 2


def test_a_process_that_left_again_has_not_joined(address: str) -> None:
    """Such as one that was killed while it waited; started again it joins."""
    host, port = address.split(":")

    def leave_again() -> None:
        time.sleep(0.2)
        with socket.create_connection((host, int(port))) as connection:
            rendezvous._send(connection, {"process": 1, "processes": 3, "host": "elsewhere"})
            time.sleep(0.1)

    first, _ = outcomes(join(address, 3, 0, timeout_s=0.8), leave_again)
    assert str(first).startswith(f"processes 1, 2 of 3 did not connect to {address}")
    rejoined = join(address, 3, 1, after_s=0.5), join(address, 3, 2, after_s=0.8)
    assert outcomes(join(address, 3, 0), leave_again, *rejoined) == [None] * 4


def test_an_unreachable_process_0_is_named(address: str) -> None:
    (second,) = outcomes(join(address, 2, 1, timeout_s=0.5))
    assert isinstance(second, UserError)
    reached = rf"could not reach process 0 at {address} within 0.5 s \(last error: .*refused\)"
    assert re.match(rf"process 1 of 2, on {HOST}, {reached}", str(second))
    (second,) = outcomes(join("no-such-host.invalid:1", 2, 1, timeout_s=0.1))
    assert re.search(r"last error: .*(not known|resolution)", str(second))


def test_conflicting_indices_and_counts_are_named(address: str) -> None:
    first, *others = outcomes(join(address, 3, 0), join(address, 3, 1), join(address, 3, 1))
    assert re.match(rf"two processes have index 1, on {HOST} and {HOST}; give each its own --process", str(first))
    assert [type(other) for other in others] == [SystemExit] * 2
    first, _ = outcomes(join(address, 2, 0), join(address, 4, 3))
    assert re.match(rf"process 3 on {HOST} was started with --processes 4, process 0 with --processes 2", str(first))


def test_other_programs_that_connect_are_ignored(address: str) -> None:
    """Such as a port scan, or one that speaks another protocol."""
    host, port = address.split(":")

    def connect() -> None:
        time.sleep(0.2)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(words)

    assert outcomes(join(address, 2, 0), connect, join(address, 2, 1, after_s=0.4)) == [None] * 3


def test_a_taken_port_is_named() -> None:
    """Before JAX's service is started there, which would crash."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--coordinator here:{port}: .*in use; choose another port"):
            rendezvous.wait_for_all(f"here:{port}", 2, 0, 1)


def test_at_most_eight_processes_are_listed() -> None:
    assert describe_processes([1], 2) == "process 1 of 2"
    assert describe_processes(list(range(1, 9)), 99) == "processes 1, 2, 3, 4, 5, 6, 7, 8 of 99"
    assert describe_processes(list(range(1, 10)), 99) == "processes 1, 2, 3, 4, 5, 6, 7, 8, ... of 99"


@pytest.mark.slow
def test_a_training_run_names_the_process_that_never_joined(tmp_path: Path) -> None:
    """Each of two processes alone, through the command line, where JAX would abort without naming the other."""
    running, addresses = [], [free_address(), free_address()]
    for process, address in enumerate(addresses):
        flags = f"--coordinator {address} --processes 2 --process {process} --join-timeout 1".split()
        command = [sys.executable, "-m", "kdjax.train", "--config=absent.py", "--workdir", str(tmp_path / "run")]
        running.append(subprocess.Popen([*command, *flags], cwd=ROOT, text=True, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], errors
    missing, unreachable = "process 1 of 2 did not connect to", "process 1 of 2, on .*, could not reach process 0 at"
    assert re.search(rf"^error: {missing} {addresses[0]} within 1 s", errors[0], re.MULTILINE), errors[0]
    assert re.search(rf"^error: {unreachable} {addresses[1]} within 1 s", errors[1], re.MULTILINE), errors[1]
