"""Ranks that are killed or fail, alone or during a collective: the others exit soon, with the right exit code."""

import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exit_codes, start_ranks
from tiny_runs import draw_folder
from torch import Tensor, nn

from mae_dat.config.errors import DataError, RankError, RetryError, StorageError
from mae_dat.config.parse import load_config, run_command
from mae_dat.config.runs import PretrainConfig
from mae_dat.models import mae
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.runtime import failures
from mae_dat.runtime.console import Console
from mae_dat.runtime.failures import explain_rank_failure, is_connection_loss
from mae_dat.runtime.watchdog import process_state
from mae_dat.runtime.world import process_group, world_from_environment
from mae_dat.training.pretrain import run_pretraining

GONE = 30.0  # seconds within which the other ranks have to be gone
CPU = torch.device("cpu")


class _FailsBackward(torch.autograd.Function):
    """The identity, with a gradient that fails when `failing` is set."""

    failing = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if _FailsBackward.failing:
            raise ValueError("no memory left for this gradient")
        return gradients[0]


class _Net(nn.Module):
    """Two layers whose gradients are reduced separately; the second one is under way when the first one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(600, 600), nn.Linear(600, 600)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_FailsBackward.apply(self.first(x)))


def train_until(rank: int, victim: int, fault: str) -> None:
    """Train for ever; the rank `victim` fails at step 3."""

    def run() -> None:
        if fault.startswith("kill,"):
            failures.GRACE_S = 1.0
        with process_group(world_from_environment(), CPU):
            net = nn.parallel.DistributedDataParallel(_Net(), bucket_cap_mb=1)
            for step in range(10**6):
                with explain_rank_failure(lambda step=step: f"at step {step}"):  # type: ignore[misc]
                    if rank == victim and step == 3:
                        fail(fault)
                    if fault == "kill, others blocked" and step == 3:
                        time.sleep(60)  # as in a kernel of NCCL's, which does not see that a peer is gone
                    net(torch.ones(1, 600)).sum().backward()

    run_command(run)


def fail(fault: str) -> None:
    if fault == "kill, worker left" and os.fork() == 0:
        sys.stderr.write(f"worker {os.getpid()}\n")
        time.sleep(2 * GONE)  # with all connections of its parent
        os._exit(0)
    if fault.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "data":
        raise DataError("cat.jpg cannot be read")
    if fault == "disk":
        raise StorageError("no space left for checkpoint-00000003.pth")
    if fault == "bug":
        return [][0]
    _FailsBackward.failing = True


@pytest.mark.parametrize(
    ("victim", "fault", "victims_code", "others_code"),
    [
        (0, "kill", -signal.SIGKILL, 75),
        (1, "kill", -signal.SIGKILL, 75),
        (2, "kill", -signal.SIGKILL, 75),
        (0, "kill, others blocked", -signal.SIGKILL, 75),
        (1, "kill, others blocked", -signal.SIGKILL, 75),
        (1, "kill, worker left", -signal.SIGKILL, 75),
        (1, "data", 65, 65),
        (0, "disk", 74, 74),
        (2, "bug", 1, 1),
        (1, "during backward", 1, 1),
    ],
)
def test_a_ranks_fault_ends_the_others_too(
    victim: int, fault: str, victims_code: int, others_code: int, tmp_path: Path
) -> None:
    codes = exit_codes(start_ranks(3, train_until, victim, fault, log=tmp_path / "log"), GONE + 15)  # some to start
    assert codes == [victims_code if rank == victim else others_code for rank in range(3)]
    logs = {rank: (tmp_path / f"log-{rank}").read_text() for rank in range(3)}
    for worker in re.findall(r"worker (\d+)", logs[victim]):
        os.kill(int(worker), signal.SIGKILL)
    messages = {
        "kill": f"error: rank {victim} was lost at step 3; run the same command again to resume",
        "kill, others blocked": f"error: rank {victim} was lost; run the same command again to resume",
        "kill, worker left": f"error: rank {victim} was lost; run the same command again to resume",
        "data": f"error: rank {victim} stopped: cat.jpg cannot be read",
        "disk": f"error: rank {victim} stopped: no space left for",
        "bug": f"error: rank {victim} stopped: IndexError: list index out of range",
        "during backward": f"error: rank {victim} stopped: ValueError: no memory left for this gradient",
    }
    for rank in set(range(3)) - {victim}:
        assert messages[fault] in logs[rank]
        assert "Traceback" not in logs[rank]
    assert ("Traceback" in logs[victim]) == (fault in ("bug", "during backward"))


def test_other_errors_are_not_taken_for_the_loss_of_a_rank() -> None:
    assert is_connection_loss(torch.distributed.DistNetworkError("x"))
    assert is_connection_loss(
        RuntimeError("[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")
    )
    assert not is_connection_loss(RuntimeError("shape '[3]' is invalid for input of size 4"))
    assert not is_connection_loss(ValueError("gloo/transport"))
    assert not is_connection_loss(torch.OutOfMemoryError("NCCL"))
    with pytest.raises(RuntimeError, match="Connection closed by peer"), explain_rank_failure():
        raise RuntimeError("Connection closed by peer")  # without other ranks: somebody else's connection
    assert math.isclose(RankError("x", 65).exit_code, 65)
    assert RetryError.exit_code == 75


# ---- a whole training, with loader workers, watchdogs and checkpoints ----


def train_for_long(rank: int, folder: Path, output: Path) -> None:
    mae.MAE_MODELS["mae_tiny"] = MaeSize(ViTSize(32, 8, 32, 2, 2), 16, 1, 2)
    flags = ["--model", "mae_tiny", "--input_size", "32", "--batch_size", "4", "--epochs", "9999", "--num_workers", "2"]
    flags += ["--device", "cpu", "--images_every", "0", "--data_path", str(folder), "--output_dir", str(output)]
    config = load_config(PretrainConfig, flags)
    run_command(lambda: run_pretraining(config, Console(quiet=True)))


def descendants(pid: int | None) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def alive(pid: int) -> bool:
    return not process_state(pid).startswith(("Z", "state unknown"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_with_a_killed_rank_ends_entirely(victim: int, tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", train=34)
    ranks = start_ranks(2, train_for_long, images, tmp_path / "output", log=tmp_path / "log")
    while not list(tmp_path.glob("output/checkpoint-*.json")) and all(rank.is_alive() for rank in ranks):
        time.sleep(0.1)
    others = [pid for rank in ranks for pid in descendants(rank.pid)]
    assert len(others) >= 6, "a watchdog and two workers each"
    start = time.monotonic()
    ranks[victim].kill()
    codes = exit_codes(ranks, GONE)
    assert codes[1 - victim] == 75, (tmp_path / f"log-{1 - victim}").read_text()
    while any(map(alive, others)) and time.monotonic() - start < GONE:
        time.sleep(0.1)
    assert not [pid for pid in others if alive(pid)]
    log = (tmp_path / f"log-{1 - victim}").read_text()
    assert f"error: rank {victim} was lost at step" in log
    assert "Traceback" not in log
