"""Who is there: processes meet at one address before JAX does, so that one that never comes is named.

JAX's own meeting aborts the interpreter when somebody is missing, and does not say who. Here process 0 listens at the
address that JAX's service is going to have; the others call, say their number and host, and are told how it ended.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from kdjax.types import UserError

LOOK_EVERY_S = 0.2
GREETING_S = 5.0  # for a caller's one line: who says nothing is no process of ours, but a port scan, say
SLACK_S = 30.0  # process 0 may have begun to wait so much later than those who wait for its word


def meet(address: str, processes: int, process: int, patience_s: float) -> None:
    """Returns on every process once all have come to `address` (HOST:PORT of process 0), which is free again then.

    Raises UserError where it can be told what is wrong: who is missing, who shares a number, that process 0 cannot be
    reached. Elsewhere, when process 0 tells it, SystemExit.
    """
    host, _, port = address.rpartition(":")
    if process == 0:
        _gather(address, int(port), processes, patience_s)
    else:
        _call(address, host.strip("[]"), int(port), processes, process, patience_s)


def _gather(address: str, port: int, processes: int, patience_s: float) -> None:
    both = socket.has_dualstack_ipv6()  # what JAX's service listens on
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, backlog=processes, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"--coordinator {address}: {os.strerror(error.errno or 0)}; give another port, which in Slurm "
            "JAX_COORDINATOR_PORT does"
        ) from error
    here: dict[int, tuple[socket.socket, str]] = {}
    wrong, end = None, time.monotonic() + patience_s
    with listener:
        listener.settimeout(LOOK_EVERY_S)
        while len(here) < processes - 1 and wrong is None:
            if time.monotonic() > end:
                wrong = _missing(address, processes, here, patience_s)
                break
            with contextlib.suppress(TimeoutError):
                line, _ = listener.accept()
                wrong = _admit(line, processes, here)
            for number in [number for number, (line, _) in here.items() if _has_left(line)]:
                here.pop(number)[0].close()
    for line, _ in here.values():
        with line:
            _say(line, {"wrong": wrong})
    if wrong is not None:
        raise UserError(wrong)


def _admit(line: socket.socket, processes: int, here: dict[int, tuple[socket.socket, str]]) -> str | None:
    """Takes a caller in. What it says may be wrong for all."""
    line.settimeout(GREETING_S)
    try:
        said = _hear(line)
        number, host = int(said["process"]), str(said["host"])
    except (OSError, ValueError, KeyError, TypeError):
        line.close()
        return None
    earlier, here[number] = here.get(number), (line, host)
    if said["processes"] != processes:
        return (
            f"process {number} on {host} was started as one of {said['processes']}, process 0 as one of {processes}; "
            "give all the same --processes"
        )
    if earlier is None:
        return None
    with earlier[0]:
        if _has_left(earlier[0]):  # and was started again
            return None
        wrong = f"two processes have the number {number}, on {earlier[1]} and {host}; give each its own --process"
        _say(earlier[0], {"wrong": wrong})
        return wrong


def _missing(address: str, processes: int, here: Mapping[int, tuple[socket.socket, str]], patience_s: float) -> str:
    absent = [number for number in range(1, processes) if number not in here]
    came = ", ".join(f"{number} on {host}" for number, (_, host) in sorted(here.items())[:8])
    return (
        f"{named(absent, processes)} did not come to {address} within {patience_s:g} s (there: 0 on "
        f"{socket.gethostname()}{', ' + came if came else ''}{', ...' if len(here) > 8 else ''}); look whether "
        f"{'it was' if len(absent) == 1 else 'they were'} started, what the log there says, and whether a firewall "
        "keeps that port shut; --join-timeout waits longer"
    )


def _call(address: str, host: str, port: int, processes: int, process: int, patience_s: float) -> None:
    here = socket.gethostname()
    greeting, why, end = {"process": process, "processes": processes, "host": here}, "", time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), timeout=GREETING_S) as line:
                _say(line, greeting)
                line.settimeout(patience_s + SLACK_S)
                wrong = _hear(line)["wrong"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = getattr(error, "strerror", None) or str(error) or "no answer"
            time.sleep(LOOK_EVERY_S)
            continue
        if wrong is not None:
            raise SystemExit(2)
        return
    raise UserError(
        f"process {process} of {processes}, on {here}, did not reach process 0 at {address} within {patience_s:g} s "
        f"(at last: {why}); look whether process 0 runs there, what its log says, and whether a firewall keeps that "
        "port shut; --join-timeout waits longer"
    )


def _say(line: socket.socket, words: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who has left by now will be missed by JAX
        line.sendall(json.dumps(words).encode() + b"\n")


def _hear(line: socket.socket) -> dict[str, Any]:
    """One line. Raises ValueError for what is none of ours, OSError when the other has left."""
    with line.makefile("rb") as source:
        said = source.readline(4096)
    if not said:
        raise ConnectionResetError("hung up")
    words = json.loads(said)
    if not isinstance(words, dict):
        raise ValueError("something else answers there")
    return words


def _has_left(line: socket.socket) -> bool:
    """Whether the other end has closed, or died."""
    line.setblocking(False)
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def named(numbers: list[int], count: int) -> str:
    """`processes 1, 3 of 4`, the first eight by number."""
    few = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {few} of {count}"
