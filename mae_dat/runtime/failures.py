"""Leaving together: a rank that fails alone says why before it goes, and the others, which wait for it, stop too.

Every rank keeps a connection to rank 0, which passes on the first word of a failure, or that a connection broke without
one. What was the fault of one rank (an unreadable image, a full disk, a bug) ends all with its exit code; a peer that
was killed ends them with 75, "start the same command again".
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
from mae_dat.runtime.rendezvous import open_server, receive_message, send_message

logger = logging.getLogger(__name__)

GRACE_S = 20.0  # for a rank that waits for a peer to find out by itself, before it is ended
WORD_S = 1.0  # the word of a failure may come a little later than the end of torch's connections
GOODBYE_S = 5.0  # to wait for torch's own threads before leaving without them
# A machine that lost its power closes no connection: asked after 20 s of silence, given up after 60 s.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
# What gloo and NCCL say when the other side is gone; gloo has no error type of its own.
_SIGNS = ("gloo/transport", "gloo::", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")

Word = dict[str, Any]


def is_connection_loss(error: BaseException) -> bool:
    """Whether a collective failed because a peer, or the way to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(sign in str(error) for sign in _SIGNS)


def error_from_report(word: Word, when: str = "") -> UserError:
    """What a rank raises for the failure of another one: RankError, or RetryError where that one was killed."""
    if "code" in word:
        return RankError(f"rank {word['rank']} stopped: {word['message']}", word["code"])
    who = f"rank {word['rank']}" if "rank" in word else "a peer"
    cause = f" ({word['cause']})" if "cause" in word else ""
    return RetryError(f"{who} was lost{when and f' {when}'}; the same command goes on from the last checkpoint.{cause}")


class _Peers:
    """This rank's end of the connections; `word` is the first failure that was heard of."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.word: Word | None = None
        self.heard, self.leaving, self.left = threading.Event(), threading.Event(), threading.Event()
        self.ends: dict[int, socket.socket] = {}
        """By rank at the other end: rank 0 has all, the others have its."""
        store = dist.distributed_c10d._get_default_store()
        if self.rank:
            self.ends[0] = _connect(json.loads(store.get("mae_dat/hub")), self.rank)
        else:
            server, token = open_server([0], self.size), secrets.token_hex(16)
            address = {"host": os.environ["MASTER_ADDR"], "port": server.getsockname()[1]}
            store.set("mae_dat/hub", json.dumps({**address, "token": token}))
            self.ends.update(_accept(server, token, self.size))
        for end in self.ends.values():
            _keep_alive(end)
        # A worker of a data loader that outlives a killed rank must not keep its connections open.
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, daemon=True, name="listening to peers").start()

    def _forget(self) -> None:
        for end in self.ends.values():
            end.close()

    def say(self, word: Word) -> None:
        """Tells the others of a failure, or with {"bye": True} that this rank leaves as it should."""
        for end in self.ends.values():
            with contextlib.suppress(OSError):
                send_message(end, word)

    def leave(self) -> None:
        """Closes the connections."""
        self.left.set()
        for end in self.ends.values():
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, end in self.ends.items():
                selector.register(end, selectors.EVENT_READ, rank)
            while selector.get_map() and self.word is None:
                for key, _ in selector.select():
                    word = _hear(self.ends[key.data], key.data)
                    selector.unregister(key.fileobj)
                    if self.left.is_set():
                        return
                    if "bye" not in word:
                        self.word = self.word or word
        if self.word is not None:
            self.heard.set()
            if self.rank == 0:
                self.say(self.word)
            self._end_if_stuck(self.word)

    def _end_if_stuck(self, word: Word) -> None:
        """Ends this process if it still waits for the peer that is gone: NCCL's kernels wait for ever."""
        if not self.leaving.wait(GRACE_S):
            error = error_from_report(word)
            sys.stderr.write(f"error: {error}\n")
            _leave_at_once(error.exit_code)


def _connect(hub: dict[str, Any], rank: int) -> socket.socket:
    address = (hub["host"], hub["port"])
    try:
        end = socket.create_connection(address, timeout=GRACE_S)
        send_message(end, {"rank": rank, "token": hub["token"]})
    except OSError as error:
        raise ConfigError(f"rank {rank} cannot connect to rank 0 at {address[0]}:{address[1]}: {error}") from error
    return end


def _accept(server: socket.socket, token: str, size: int) -> dict[int, socket.socket]:
    ends: dict[int, socket.socket] = {}
    server.settimeout(GRACE_S)
    with server, contextlib.suppress(TimeoutError):
        while len(ends) < size - 1:
            end, _ = server.accept()
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                told = receive_message(end)
                if told["token"] == token:
                    ends[int(told["rank"])] = end
    if missing := set(range(1, size)) - set(ends):
        raise ConfigError(
            f"rank {', '.join(map(str, sorted(missing)))} did not connect to rank 0: is a firewall between?"
        )
    return ends


def _hear(end: socket.socket, rank: int) -> Word:
    try:
        word: Word = receive_message(end)
        return word
    except (OSError, ValueError):
        return {"rank": rank}


def _keep_alive(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


_peers: _Peers | None = None


@contextlib.contextmanager
def explain_rank_failure(when: Callable[[], str] = str) -> Iterator[None]:
    """Turns the failure of a collective into a RankError with what the rank that left said, or into a RetryError.

    `when` tells where the run stands, such as "at step 12"; it is called only then. After an error of any kind the rest
    of this rank's work, such as finishing a checkpoint, may take its time.
    """
    try:
        yield
    except BaseException as error:
        if _peers is None:
            raise
        _peers.leaving.set()
        if not is_connection_loss(error):
            raise
        _peers.heard.wait(WORD_S)
        cause = (str(error).splitlines() or [""])[0][:200]
        raise error_from_report(_peers.word or {"cause": cause}, when()) from error


@contextlib.contextmanager
def report_failure_to_ranks() -> Iterator[None]:
    """Around all that a rank does in the process group, which it leaves at the end, after an error without waiting."""
    global _peers
    peers = _peers = _Peers()
    try:
        with explain_rank_failure():
            yield
            dist.destroy_process_group()
        peers.say({"bye": True})
    except BaseException as error:
        code = error.exit_code if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        lost = isinstance(error, RetryError)
        peers.say(peers.word or ({} if lost else {"rank": peers.rank, "message": message, "code": code}))
        _close_without_waiting(code)
        raise
    finally:
        peers.leave()
        _peers = None


def _close_without_waiting(code: int) -> None:
    """Leaves the process group. With a collective still under way that waits for peers, who may wait for us."""

    def close() -> None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    closing = threading.Thread(target=close, daemon=True, name="closing the process group")
    closing.start()
    closing.join(GOODBYE_S)
    if closing.is_alive():
        atexit.register(_leave_at_once, code)


def _leave_at_once(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
