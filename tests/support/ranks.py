"""Several ranks on this machine, each a process of its own, forked from one that has imported torch already."""

import atexit
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "timm", "mae_dat.training.finetune", "mae_dat.training.pretrain"])


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_ranks(size: int, act: Callable[..., None], *arguments: Any, log: Path | None = None) -> list[BaseProcess]:
    """Start `act(rank, *arguments)` in `size` processes that find each other; stderr goes to `log`-RANK."""
    port = free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(rank, size, port, log, act, arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
        atexit.register(rank.kill)  # no daemons, which may have no loader workers
    return ranks


def _rank(
    rank: int, size: int, port: int, log: Path | None, act: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # for its loader's workers, as in a process started by hand
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    if log is not None:
        os.dup2(os.open(f"{log}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
    try:
        act(rank, *arguments)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing skips them


def exit_codes(ranks: list[BaseProcess], seconds: float) -> list[int | None]:
    """Return the exit codes; None for processes that still run after `seconds` (they are then killed)."""
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(end - time.monotonic(), 0))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes
