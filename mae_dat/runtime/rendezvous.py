"""Rendezvous of the ranks without torchrun, even if a port is taken or another service listens on it.

Rank 0 opens torch's store on any free port, and a small server on the first free port of a list; the server replies
with the store's port. Every rank computes the same list. The other ranks query these ports until a server of their job
replies. They query first because torch's client waits forever on a port with a silent service.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from mae_dat.config.errors import ConfigError

logger = logging.getLogger(__name__)

PORTS, STRIDE = 8, 997
TIMEOUT_S = 1800.0  # on a large machine, nodes of one job start minutes apart
REPLY_S = 2.0  # longest wait for the reply of a service
REMINDER_S = 30.0  # between two log messages while waiting
MAX_MESSAGE_BYTES = 4096


def candidate_ports(first: int) -> list[int]:
    """Return the ports to try: `first`, then seven in 20000..31999, below the range that the system gives clients."""
    return [first, *[20000 + (first + step * STRIDE) % 12000 for step in range(1, PORTS)]]


def job_token(size: int) -> str:
    """Return a text that identifies this job: the same on all ranks, and a new one after a requeue."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_PORT")
    return "/".join(["mae_dat", *[os.environ.get(name, "") for name in names], str(os.getuid()), str(size)])


def join_ranks(
    rank: int, size: int, host: str, ports: Sequence[int], token: str, timeout: float = TIMEOUT_S
) -> TCPStore:
    """Wait until all `size` ranks are connected and return their common store.

    `host` is where rank 0 runs. Raises ConfigError after `timeout` seconds, or when all ports are taken.
    """
    deadline = time.monotonic() + timeout
    if rank:
        store = _find_store(rank, host=host, ports=ports, token=token, deadline=deadline)
        store.set(f"here/{rank}", "")
        return store
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    with _store_announced(ports, token=token, store_port=store.port, size=size) as port:
        _wait_for_ranks(store, size, f"{host}:{port}", deadline)
    return store


# ---- rank 0 ----


@contextlib.contextmanager
def _store_announced(ports: Sequence[int], token: str, store_port: int, size: int) -> Iterator[int]:
    """Reply with the store's port to every query from a rank of this job; yields the port of this server."""
    server = open_server(ports, size)
    callers: dict[int, str] = {}
    """The first process that has asked for each rank."""

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed: all ranks have joined
                return
            with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection.settimeout(REPLY_S)
                request = receive_message(connection)
                if request["token"] != token:
                    continue
                # Two jobs started by hand on the same port have the same token. If the caller's rank is already taken,
                # it belongs to the other job.
                is_ours = callers.setdefault(int(request["rank"]), request["who"]) == request["who"]
                send_message(connection, {"token": token, "port": store_port if is_ours else None})

    threading.Thread(target=serve, daemon=True, name="rendezvous").start()
    try:
        yield server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a close alone would leave in accept
        server.close()


def open_server(ports: Sequence[int], callers: int) -> socket.socket:
    """Listen on the first free one of `ports` (0: any free port), for `callers` connections at once.

    Raises ConfigError when all are taken.
    """
    both = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if both else (socket.AF_INET, "")
    for port in ports:
        try:
            return socket.create_server((address, port), family=family, backlog=callers + 8, dualstack_ipv6=both)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            logger.info("port %d is taken (%s)", port, error.strerror)
    raise ConfigError(f"all of the ports {', '.join(map(str, ports))} are taken: set MASTER_PORT to a free one.")


def _wait_for_ranks(store: TCPStore, size: int, address: str, deadline: float) -> None:
    missing, last_reminder = list(range(1, size)), time.monotonic()
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        if now > deadline:
            raise ConfigError(
                f"rank 0 waited at {address}, but rank {_format_ranks(missing)} of {size} never connected: check that "
                f"every task started, that the nodes can connect to {address}, and that MASTER_ADDR is a name of rank "
                "0's host that the other nodes can resolve."
            )
        if now - last_reminder > REMINDER_S:
            logger.warning("waiting at %s for rank %s of %d", address, _format_ranks(missing), size)
            last_reminder = now
        time.sleep(0.05)


def _format_ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


# ---- the other ranks ----


def _find_store(rank: int, host: str, ports: Sequence[int], token: str, deadline: float) -> TCPStore:
    """Query the ports in turn until rank 0 of this job replies, and connect to its store."""
    who, last_reminder, reason = secrets.token_hex(8), time.monotonic(), ""
    while True:
        for port in ports:
            try:
                reply = _ask(host, port, {"token": token, "rank": rank, "who": who})
                if reply.get("token") == token and reply["port"] is not None:
                    return _connect_store(host, reply["port"])
                reason = f"port {port} belongs to another job"
            except (OSError, ValueError, AttributeError, DistError) as error:
                reason = f"port {port}: {error}"
        now = time.monotonic()
        address = f"{host}, port {', '.join(map(str, ports))}"
        if now > deadline:
            raise ConfigError(
                f"rank {rank} found no rank 0 of this job at {address} ({reason}): check that rank 0 started, that "
                "MASTER_ADDR is its host, and that the nodes can connect to each other."
            )
        if now - last_reminder > REMINDER_S:
            logger.warning("rank %d is looking for rank 0 at %s (%s)", rank, address, reason)
            last_reminder = now
        time.sleep(0.2)


def _connect_store(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))


def _ask(host: str, port: int, request: dict[str, Any]) -> dict[str, Any]:
    with socket.create_connection((host, port), timeout=REPLY_S) as connection:
        send_message(connection, request)
        return receive_message(connection)


# ---- messages ----


def send_message(connection: socket.socket, value: dict[str, Any]) -> None:
    """Send a value as one line of JSON. Raises OSError."""
    connection.sendall(json.dumps(value).encode() + b"\n")


def receive_message(connection: socket.socket) -> Any:
    """Receive one line of JSON within REPLY_S seconds. Raises OSError, or ValueError for anything else."""
    deadline, line = time.monotonic() + REPLY_S, b""
    while b"\n" not in line:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = connection.recv(MAX_MESSAGE_BYTES)
        if not piece or len(line) > MAX_MESSAGE_BYTES:
            raise ValueError("the service that replied is not a rank of this job")
        line += piece
    return json.loads(line.split(b"\n")[0])
