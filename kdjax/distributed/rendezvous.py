"""Brings processes together at one address before JAX connects them, so that a missing process is named.

`jax.distributed.initialize` aborts the interpreter when a process is missing, and does not say which. Here process 0
listens at the address that JAX's coordination service will use; the others connect, send their index and host, and
receive the outcome.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from kdjax.types import UserError

POLL_S = 0.2
MESSAGE_TIMEOUT_S = 5.0  # for one line; whoever connects and sends nothing, such as a port scan, is not one of ours
SLACK_S = 30.0  # process 0 may have begun to wait this much later than the processes that wait for its reply


def wait_for_all(address: str, processes: int, process: int, timeout_s: float) -> None:
    """Returns on every process once all have connected to `address` (HOST:PORT of process 0), which is then free again.

    Raises UserError on the processes that know what is wrong: processes are missing, two share an index, or process 0
    cannot be reached. Raises SystemExit on those that process 0 sends away, since it prints the reason.
    """
    host, _, port = address.rpartition(":")
    if process == 0:
        _wait_for_others(address, int(port), processes, timeout_s)
    else:
        _connect(address, host.strip("[]"), int(port), processes, process, timeout_s)


def _wait_for_others(address: str, port: int, processes: int, timeout_s: float) -> None:
    dual = socket.has_dualstack_ipv6()  # IPv4 and IPv6, as JAX's service listens
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, backlog=processes, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"--coordinator {address}: {os.strerror(error.errno or 0)}; choose another port, under Slurm with the "
            "variable JAX_COORDINATOR_PORT"
        ) from error
    joined: dict[int, tuple[socket.socket, str]] = {}  # connection and host of each process
    problem, end = None, time.monotonic() + timeout_s
    with listener:
        listener.settimeout(POLL_S)
        while len(joined) < processes - 1 and problem is None:
            if time.monotonic() > end:
                problem = _describe_missing(address, processes, joined, timeout_s)
                break
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                problem = _register(connection, processes, joined)
            for index in [index for index, (connection, _) in joined.items() if _is_closed(connection)]:
                joined.pop(index)[0].close()
    for connection, _ in joined.values():
        with connection:
            _send(connection, {"problem": problem})
    if problem is not None:
        raise UserError(problem)


def _register(connection: socket.socket, processes: int, joined: dict[int, tuple[socket.socket, str]]) -> str | None:
    """Registers one process. Returns a problem that ends the run if its count or index conflicts with the others'."""
    connection.settimeout(MESSAGE_TIMEOUT_S)
    try:
        message = _receive(connection)
        index, host = int(message["process"]), str(message["host"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None
    earlier, joined[index] = joined.get(index), (connection, host)
    if message["processes"] != processes:
        return (
            f"process {index} on {host} was started with --processes {message['processes']}, process 0 with "
            f"--processes {processes}; give all processes the same number"
        )
    if earlier is None:
        return None
    with earlier[0]:
        if _is_closed(earlier[0]):  # it was ended and started again
            return None
        problem = f"two processes have index {index}, on {earlier[1]} and {host}; give each its own --process"
        _send(earlier[0], {"problem": problem})
        return problem


def _describe_missing(
    address: str, processes: int, joined: Mapping[int, tuple[socket.socket, str]], timeout_s: float
) -> str:
    missing = [index for index in range(1, processes) if index not in joined]
    hosts = {0: socket.gethostname()} | {index: host for index, (_, host) in sorted(joined.items())}
    present = ", ".join(f"{index} on {host}" for index, host in list(hosts.items())[:9])
    return (
        f"{describe_processes(missing, processes)} did not connect to {address} within {timeout_s:g} s (connected: "
        f"{present}{', ...' if len(hosts) > 9 else ''}); check that "
        f"{'it was' if len(missing) == 1 else 'they were'} started, what the logs there say, and that no firewall "
        "blocks the port; --join-timeout waits longer"
    )


def _connect(address: str, host: str, port: int, processes: int, process: int, timeout_s: float) -> None:
    here = socket.gethostname()
    message = {"process": process, "processes": processes, "host": here}
    reason, end = "", time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            with socket.create_connection((host, port), timeout=MESSAGE_TIMEOUT_S) as connection:
                _send(connection, message)
                connection.settimeout(timeout_s + SLACK_S)
                problem = _receive(connection)["problem"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            time.sleep(POLL_S)
            continue
        if problem is not None:
            raise SystemExit(2)
        return
    raise UserError(
        f"process {process} of {processes}, on {here}, could not reach process 0 at {address} within {timeout_s:g} s "
        f"(last error: {reason}); check that process 0 runs there, what its log says, and that no firewall blocks the "
        "port; --join-timeout waits longer"
    )


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # JAX will notice a process that has gone by now
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Returns one message. Raises ValueError for what is not one of ours, OSError when the other end has closed."""
    with connection.makefile("rb") as source:
        line = source.readline(4096)
    if not line:
        raise ConnectionResetError("connection closed")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("another program answers there")
    return message


def _is_closed(connection: socket.socket) -> bool:
    """Returns whether the other end has closed the connection, or died."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def describe_processes(indices: list[int], count: int) -> str:
    """Returns, for example, `processes 1, 3 of 4`; at most eight indices are listed."""
    few = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {few} of {count}"
