"""Processes that meet, and those that do not: who is missing is said, by whoever can know it."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdjax.distributed import rendezvous
from kdjax.types import UserError

ROOT = Path(__file__).parent.parent.parent
HOST = re.escape(socket.gethostname())


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def outcomes(*calls: Callable[[], None]) -> list[BaseException | None]:
    """How each ends, all of them at once."""
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


def meet(address: str, processes: int, process: int, patience_s: float = 20, after_s: float = 0) -> Callable[[], None]:
    def call() -> None:
        time.sleep(after_s)
        rendezvous.meet(address, processes, process, patience_s)

    return call


def test_all_meet_whoever_comes_first_and_leave_the_port_free(address: str) -> None:
    for delays in ((0.5, 0, 0), (0, 0.5, 0.3)):
        calls = [meet(address, 3, number, after_s=delay) for number, delay in enumerate(delays)]
        assert outcomes(*calls) == [None] * 3
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_an_address_may_be_of_the_sixth_version(address: str) -> None:
    address = f"[::1]:{address.rpartition(':')[2]}"
    assert outcomes(meet(address, 2, 0), meet(address, 2, 1)) == [None] * 2


def test_those_who_do_not_come_are_named_with_those_who_did(address: str) -> None:
    first, third = outcomes(meet(address, 5, 0, patience_s=1), meet(address, 5, 2))
    assert isinstance(first, UserError)
    said = rf"processes 1, 3, 4 of 5 did not come to {address} within 1 s \(there: 0 on {HOST}, 2 on {HOST}\); look"
    assert re.match(said, str(first))
    assert isinstance(third, SystemExit)
    assert third.code == 2


def test_who_left_again_has_not_come(address: str) -> None:
    """One that was killed while it waited; started again it is welcome."""
    host, port = address.split(":")

    def leave_again() -> None:
        time.sleep(0.5)
        with socket.create_connection((host, int(port))) as line:
            rendezvous._say(line, {"process": 1, "processes": 3, "host": "elsewhere"})
            time.sleep(0.1)

    first, _ = outcomes(meet(address, 3, 0, patience_s=1.5), leave_again)
    assert str(first).startswith(f"processes 1, 2 of 3 did not come to {address}")
    assert (
        outcomes(meet(address, 3, 0), leave_again, meet(address, 3, 1, after_s=1), meet(address, 3, 2, after_s=1.5))
        == [None] * 4
    )


def test_a_first_process_that_is_not_there_is_named(address: str) -> None:
    (second,) = outcomes(meet(address, 2, 1, patience_s=0.5))
    assert isinstance(second, UserError)
    assert re.match(
        rf"process 1 of 2, on {HOST}, did not reach process 0 at {address} within 0.5 s \(at last: .*refused\)",
        str(second),
    )
    (second,) = outcomes(meet("no-such-host.invalid:1", 2, 1, patience_s=0.1))
    assert re.search(r"at last: .*(not known|resolution)", str(second))


def test_wrong_numbers_are_named(address: str) -> None:
    first, *others = outcomes(meet(address, 3, 0), meet(address, 3, 1), meet(address, 3, 1))
    assert re.match(rf"two processes have the number 1, on {HOST} and {HOST}; give each its own --process", str(first))
    assert [type(other) for other in others] == [SystemExit] * 2
    first, _ = outcomes(meet(address, 2, 0), meet(address, 4, 3))
    assert re.match(rf"process 3 on {HOST} was started as one of 4, process 0 as one of 2; give all", str(first))


def test_strangers_are_let_by(address: str) -> None:
    """What looks whether a port is open, and what speaks another language."""
    host, port = address.split(":")

    def look() -> None:
        time.sleep(0.3)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n"):
            with socket.create_connection((host, int(port))) as line:
                line.sendall(words)

    assert outcomes(meet(address, 2, 0), look, meet(address, 2, 1, after_s=0.6)) == [None] * 3


def test_a_taken_port_is_named() -> None:
    """Before JAX's service is started there, which would crash."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--coordinator here:{port}: .*in use; give another port"):
            rendezvous.meet(f"here:{port}", 2, 0, 1)


@pytest.mark.parametrize("process", [0, 1])
def test_a_run_says_who_never_came(process: int, address: str, tmp_path: Path) -> None:
    """Through the command line, where JAX would abort without a word of who."""
    began = time.monotonic()
    place = f"--coordinator {address} --processes 2 --process {process} --join-timeout 2".split()
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.train", "--config=absent.py", "--workdir", str(tmp_path / "run"), *place],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = "error: process 1 of 2 did not come to" if process == 0 else "error: process 1 of 2, on .*, did not reach"
    assert done.returncode == 2
    assert re.search(rf"^{said} .*{address} within 2 s", done.stderr, flags=re.MULTILINE), done.stderr
    assert time.monotonic() - began < 20
