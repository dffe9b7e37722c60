"""Failures of a single rank: it reports the reason to the other ranks, which would wait for it, and all ranks stop.

Every rank keeps a connection to rank 0. Rank 0 forwards the first report of a failure, or reports a connection that
broke. An error of one rank (an unreadable image, a full disk, a bug) ends all ranks with its exit code. If a rank was
killed, the others exit with 75: run the same command again.
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from mae_dat.config.errors import ConfigError, RankError, RetryError, UserError
from mae_dat.config.memory import MemoryLimitError, is_memory_error
from mae_dat.runtime.rendezvous import open_server, receive_message, send_message

logger = logging.getLogger(__name__)

GRACE_S = 20.0  # time for a rank to notice by itself that it waits for a lost one, before its process is ended
REPORT_S = 1.0  # the report of a failure may arrive a little later than the end of torch's connections
CLOSE_S = 5.0  # how long to wait for torch's own threads before leaving without them
# A machine that lost power closes no connection: keepalive probes start after 20 s of silence and give up after 60 s.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
# Parts of the messages of gloo and NCCL when the other side is gone; gloo has no error type of its own.
_LOSS_MESSAGES = (
    "gloo/transport",
    "gloo::",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
)

FailureReport = dict[str, Any]
"""A failure: `rank`; `message` and `code` unless that rank was killed; `cause`, torch's own message.

The report {"bye": True} means that a rank has finished without a failure."""


def is_connection_loss(error: BaseException) -> bool:
    """Return whether a collective operation failed because another rank, or the connection to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(message in str(error) for message in _LOSS_MESSAGES)


def error_from_report(report: FailureReport, when: str = "") -> UserError:
    """Return the error to raise for another rank's failure: RankError, or RetryError if that rank was killed."""
    if "code" in report:
        return RankError(f"rank {report['rank']} stopped: {report['message']}", report["code"])
    who = f"rank {report['rank']}" if "rank" in report else "another rank"
    cause = f" ({report['cause']})" if "cause" in report else ""
    when = f" {when}" if when else ""
    return RetryError(f"{who} was lost{when}; run the same command again to resume from the last checkpoint.{cause}")


# ---- the connections between the ranks ----


class _FailureChannel:
    """This rank's connections for reports: rank 0 has one to every other rank, the others have one to rank 0."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.report: FailureReport | None = None
        """The first failure of another rank that this rank knows of."""
        self.report_arrived = threading.Event()
        self.stopping = threading.Event()
        """Set once this rank no longer waits for a collective operation, so that its process need not be ended."""
        self.closed = threading.Event()
        self.connections: dict[int, socket.socket] = {}
        """The open connections, by the rank at the other end."""
        store = dist.distributed_c10d._get_default_store()
        if self.rank:
            self.connections[0] = _connect(json.loads(store.get("mae_dat/hub")), self.rank)
        else:
            server, token = open_server([0], self.size), secrets.token_hex(16)
            address = {"host": os.environ["MASTER_ADDR"], "port": server.getsockname()[1]}
            store.set("mae_dat/hub", json.dumps({**address, "token": token}))
            self.connections.update(_accept_all(server, token, self.size))
        for connection in self.connections.values():
            _enable_keepalive(connection)
        # A data loader's worker can outlive its killed rank. It must not keep the connections open, or the others would
        # not notice the loss.
        os.register_at_fork(after_in_child=self._close_in_child)
        threading.Thread(target=self._listen, daemon=True, name="failure reports").start()

    def _close_in_child(self) -> None:
        for connection in self.connections.values():
            connection.close()

    def send(self, report: FailureReport) -> None:
        """Send a report on every connection that is still open."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                send_message(connection, report)

    def close(self) -> None:
        """Close the connections."""
        self.closed.set()
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _listen(self) -> None:
        """Wait for the first failure, in a separate thread; rank 0 forwards it."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map() and self.report is None:
                for key, _ in selector.select():
                    report = _receive_report(self.connections[key.data], key.data)
                    selector.unregister(key.fileobj)
                    if self.closed.is_set():
                        return
                    if "bye" not in report:
                        self.report = self.report or report
        if self.report is not None:
            self.report_arrived.set()
            if self.rank == 0:
                self.send(self.report)
            self._exit_if_stuck(self.report)

    def _exit_if_stuck(self, report: FailureReport) -> None:
        """End this process if it still waits for the lost rank: an NCCL kernel waits forever."""
        if not self.stopping.wait(GRACE_S):
            error = error_from_report(report)
            sys.stderr.write(f"error: {error}\n")
            _exit_now(error.exit_code)


def _connect(hub: dict[str, Any], rank: int) -> socket.socket:
    address = (hub["host"], hub["port"])
    try:
        connection = socket.create_connection(address, timeout=GRACE_S)
        send_message(connection, {"rank": rank, "token": hub["token"]})
    except OSError as error:
        raise ConfigError(f"rank {rank} cannot connect to rank 0 at {address[0]}:{address[1]}: {error}") from error
    return connection


def _accept_all(server: socket.socket, token: str, size: int) -> dict[int, socket.socket]:
    """Accept a connection from each of the other ranks. Raises ConfigError with the ranks that did not connect."""
    connections: dict[int, socket.socket] = {}
    server.settimeout(GRACE_S)
    with server, contextlib.suppress(TimeoutError):
        while len(connections) < size - 1:
            connection, _ = server.accept()
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                greeting = receive_message(connection)
                if greeting["token"] == token:
                    connections[int(greeting["rank"])] = connection
    if missing := set(range(1, size)) - set(connections):
        ranks = ", ".join(map(str, sorted(missing)))
        raise ConfigError(f"rank {ranks} did not connect to rank 0: check whether a firewall blocks the connection.")
    return connections


def _receive_report(connection: socket.socket, rank: int) -> FailureReport:
    """Return the report that arrived, or one without a message if the connection to `rank` broke."""
    try:
        report: FailureReport = receive_message(connection)
        return report
    except (OSError, ValueError):
        return {"rank": rank}


def _enable_keepalive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ---- wrappers for the work of a rank ----

_channel: _FailureChannel | None = None


@contextlib.contextmanager
def explain_rank_failure(when: Callable[[], str] = str) -> Iterator[None]:
    """Turn the failure of a collective operation into an error that names the rank that failed.

    Raises RankError with the message of the rank that stopped, or RetryError if that rank was killed. `when` returns
    the progress of the run, such as "at step 12"; it is called only for the message. After any error this rank has time
    to finish its work, such as writing a checkpoint.
    """
    try:
        yield
    except BaseException as error:
        if _channel is None:
            raise
        _channel.stopping.set()
        if not is_connection_loss(error):
            raise
        _channel.report_arrived.wait(REPORT_S)
        cause = (str(error).splitlines() or [""])[0][:200]
        raise error_from_report(_channel.report or {"cause": cause}, when()) from error


@contextlib.contextmanager
def report_failure_to_ranks() -> Iterator[None]:
    """Report an error of the block to the other ranks; wraps all that a rank does in the process group.

    Leaves the process group at the end of the block: together with the other ranks, or after an error without waiting
    for them.
    """
    global _channel
    channel = _channel = _FailureChannel()
    try:
        with explain_rank_failure():
            yield
            dist.destroy_process_group()
        channel.send({"bye": True})
    except BaseException as error:
        report, exit_code = _report_of(error, channel.rank)
        channel.send(channel.report or report)
        _leave_without_waiting(exit_code)
        raise
    finally:
        channel.close()
        _channel = None


def _report_of(error: BaseException, rank: int) -> tuple[FailureReport, int]:
    """Return the report of this rank's own error, and the exit code that it ends with."""
    if isinstance(error, RetryError):
        return {}, error.exit_code  # this rank only noticed the loss of another one, whose number it does not know
    if isinstance(error, UserError):
        message, exit_code = str(error), error.exit_code
    else:
        message = f"{type(error).__name__}: {error}"
        exit_code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if is_memory_error(error):
            exit_code = MemoryLimitError.exit_code
    return {"rank": rank, "message": message, "code": exit_code}, exit_code


def _leave_without_waiting(exit_code: int) -> None:
    """Leave the process group. A collective operation may still wait for other ranks, which may wait for this one;
    then the process exits without torch's cleanup."""

    def destroy() -> None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    thread = threading.Thread(target=destroy, daemon=True, name="closing the process group")
    thread.start()
    thread.join(CLOSE_S)
    if thread.is_alive():
        atexit.register(_exit_now, exit_code)


def _exit_now(exit_code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
