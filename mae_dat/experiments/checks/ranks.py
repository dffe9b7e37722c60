"""Check that several processes on this machine find each other and add up a tensor."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.experiments.checks.row import CheckRow
from mae_dat.runtime.environment import PACKAGE_FOLDER

_CODE = "from mae_dat.experiments.checks.ranks import add_up; add_up()"
_DEVICE_VARIABLE = "MAE_DAT_DOCTOR_DEVICE"
_FIX = (
    "allow processes of this machine to connect to 127.0.0.1: check the firewall, and whether the interface lo is up "
    "(ip addr show lo). Training on one device works without."
)
_FIX_NCCL = "run again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach each other directly."


def check_ranks(device: str = "cpu", ranks: int = 2, timeout: float = 120.0) -> CheckRow:
    """Start `ranks` processes that add up their numbers, on cpu with gloo, or on cuda with NCCL and a GPU for each.

    After `timeout` seconds they are ended.
    """
    name, library, fix = ("two ranks", "gloo", _FIX) if device == "cpu" else (f"{ranks} GPUs", "NCCL", _FIX_NCCL)
    start, port = time.perf_counter(), _free_port()
    processes = [_start_rank(rank, ranks, port, device) for rank in range(ranks)]
    outputs = _wait(processes, timeout)
    expected = f"sum {sum(range(1, ranks + 1))}"
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        # A rank that waited for a failed one was ended; its reason is that of the other.
        if process.returncode > 0 or (process.returncode == 0 and output.splitlines()[-1:] != [expected]):
            lines = output.split("\n") or [f"exit code {process.returncode}"]
            reason = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
            return CheckRow("failed", name, f"{library}, rank {rank}: {reason}", fix)
    if any(process.returncode for process in processes):
        return CheckRow("failed", name, f"{library}: no result after {timeout:g} s", fix)
    seconds = time.perf_counter() - start
    return CheckRow("ok", name, f"{seconds:.1f} s to start and to add up a tensor with {library}")


def check_gpus(config: DoctorConfig) -> list[CheckRow]:
    """Start a process for each GPU of this machine that add up a tensor; no row unless several GPUs would be used."""
    import torch

    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return [check_ranks("cuda", count)] if count > 1 else []


def add_up() -> None:
    """Join the other ranks, add up 1 + rank over all of them, and print the sum: what each process does."""
    import torch

    from mae_dat.runtime.collectives import all_sum
    from mae_dat.runtime.device import pick_device
    from mae_dat.runtime.world import process_group, world_from_environment

    world = world_from_environment()
    device = pick_device(os.environ[_DEVICE_VARIABLE], world)
    with process_group(world, device):
        total = int(all_sum(torch.tensor([1.0 + world.rank], device=device)).item())
    print(f"sum {total}")


def _start_rank(rank: int, ranks: int, port: int, device: str) -> "subprocess.Popen[str]":
    place = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(PACKAGE_FOLDER.parent)]))
    changes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in changes.items()}
    environment |= {"PYTHONPATH": place, _DEVICE_VARIABLE: device, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _CODE],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait(processes: Sequence["subprocess.Popen[str]"], timeout: float) -> list[str]:
    """Return the output of every process when all have ended, one has failed, or `timeout` seconds are over; those
    that still run are killed."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    return [process.communicate()[0] for process in processes]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
