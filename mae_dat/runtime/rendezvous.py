"""How ranks find each other where no torchrun does it: a port that may be taken, and neighbours that are not ours.

Rank 0 opens torch's store on any free port and answers on the first free one of a list which every rank can compute.
The others ask along that list until someone answers in the name of this job. They ask before torch connects: its client
waits for ever on a port where something listens and says nothing.
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
PATIENCE = 1800.0  # seconds: on a large machine, nodes of one job start minutes apart
ANSWER = 2.0  # seconds that a stranger on our port may keep us waiting
TOLD = 30.0  # seconds between two messages while waiting
LONGEST = 4096


def candidate_ports(base: int) -> list[int]:
    """The ports to try: `base`, then seven in 20000..31999, below those that the system gives to clients."""
    return [base, *[20000 + (base + step * STRIDE) % 12000 for step in range(1, PORTS)]]


def job_token(size: int) -> str:
    """What tells this job's ranks from another's: the same on all of them, another after a requeue."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_PORT")
    return "/".join(["mae_dat", *[os.environ.get(name, "") for name in names], str(os.getuid()), str(size)])


def join_ranks(
    rank: int, size: int, host: str, ports: Sequence[int], token: str, patience: float = PATIENCE
) -> TCPStore:
    """The store that all `size` ranks share, once they are all there. Raises ConfigError after `patience` seconds."""
    deadline = time.monotonic() + patience
    if rank:
        store = _find(rank, host, ports, token, deadline)
        store.set(f"here/{rank}", "")
        return store
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    with _answering(ports, token, store.port, size) as port:
        _wait_for_all(store, size, f"{host}:{port}", deadline)
    return store


def _wait_for_all(store: TCPStore, size: int, address: str, deadline: float) -> None:
    missing, told = list(range(1, size)), time.monotonic()
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        if now > deadline:
            raise ConfigError(
                f"rank 0 waited at {address}, and rank {_listed(missing)} of {size} never came: did every task start, "
                f"and may the nodes connect to {address}? MASTER_ADDR must be rank 0's host, as the others see it."
            )
        if now - told > TOLD:
            logger.warning("waiting at %s for rank %s of %d", address, _listed(missing), size)
            told = now
        time.sleep(0.05)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


# ---- rank 0 ----


@contextlib.contextmanager
def _answering(ports: Sequence[int], token: str, store_port: int, size: int) -> Iterator[int]:
    """Tells those who ask in the name of this job where the store is; yields the port that it answers on."""
    server = open_server(ports, size)
    claims: dict[int, str] = {}

    def serve() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:  # closed: all are there
                return
            with caller, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                caller.settimeout(ANSWER)
                asked = receive_message(caller)
                if asked["token"] != token:
                    continue
                # Two jobs started by hand on the same port look alike, but each rank is there only once.
                ours = claims.setdefault(int(asked["rank"]), asked["who"]) == asked["who"]
                send_message(caller, {"token": token, "port": store_port if ours else None})

    threading.Thread(target=serve, daemon=True, name="rendezvous").start()
    try:
        yield server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a close alone would leave in accept
        server.close()


def open_server(ports: Sequence[int], callers: int) -> socket.socket:
    """A server on the first free one of `ports` (0: any), for so many callers at once. Raises ConfigError."""
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


# ---- the others ----


def _find(rank: int, host: str, ports: Sequence[int], token: str, deadline: float) -> TCPStore:
    who, told, last = secrets.token_hex(8), time.monotonic(), ""
    while True:
        for port in ports:
            try:
                found = _ask(host, port, {"token": token, "rank": rank, "who": who})
                if found.get("token") == token and found["port"] is not None:
                    return _connect(host, found["port"])
                last = f"port {port} belongs to another job"
            except (OSError, ValueError, AttributeError, DistError) as error:
                last = f"port {port}: {error}"
        now = time.monotonic()
        where = f"{host}, port {', '.join(map(str, ports))}"
        if now > deadline:
            raise ConfigError(
                f"rank {rank} found no rank 0 of this job at {where} ({last}): did rank 0 start, is MASTER_ADDR its "
                "host, and may the nodes connect to each other?"
            )
        if now - told > TOLD:
            logger.warning("rank %d is looking for rank 0 at %s (%s)", rank, where, last)
            told = now
        time.sleep(0.2)


def _connect(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))


def _ask(host: str, port: int, question: dict[str, Any]) -> dict[str, Any]:
    with socket.create_connection((host, port), timeout=ANSWER) as connection:
        send_message(connection, question)
        return receive_message(connection)


def send_message(connection: socket.socket, value: dict[str, Any]) -> None:
    """A value as one line of JSON. Raises OSError."""
    connection.sendall(json.dumps(value).encode() + b"\n")


def receive_message(connection: socket.socket) -> Any:
    """The first line of JSON, within ANSWER seconds. Raises OSError, ValueError for anything else."""
    deadline, line = time.monotonic() + ANSWER, b""
    while b"\n" not in line:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = connection.recv(LONGEST)
        if not piece or len(line) > LONGEST:
            raise ValueError("what answers there is no rank of ours")
        line += piece
    return json.loads(line.split(b"\n")[0])
