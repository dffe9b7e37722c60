"""The ranks of a run: the rank of this process, and the process group of all ranks."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from mae_dat.runtime.failures import report_failure_to_ranks
from mae_dat.runtime.rendezvous import candidate_ports, job_token, join_ranks


class World(NamedTuple):
    """The rank of this process and the number of ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process among those of the same machine."""

    @property
    def main(self) -> bool:
        """True on rank 0, the only one that writes files and shows progress."""
        return self.rank == 0


def world_from_environment() -> World:
    """Read torchrun's variables, or SLURM's when started by a bare `srun`; a single process otherwise."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # An interactive allocation also sets SLURM_NTASKS; only srun sets the variables of a step.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return World()


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the other ranks for the duration of the block; does nothing for a single process.

    If a rank fails, the others exit with its error (see `mae_dat.runtime.failures`). Raises ConfigError if the ranks
    cannot connect to each other.
    """
    if world.size == 1:
        yield
        return
    gpu = device if device.type == "cuda" else None
    # gloo transfers data in host memory: pickled objects, and a sharded state that rank 0 gathers.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, init_method="env://", device_id=gpu)
    else:
        store = _join_store(world)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, device_id=gpu)
    with report_failure_to_ranks():
        yield


def _join_store(world: World) -> dist.Store:
    """Return the common store of the ranks if torchrun created none: at MASTER_ADDR and MASTER_PORT, or at the address
    derived from SLURM's variables."""
    env = os.environ
    host = env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    first_port = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 9500)) % 12000)
    return join_ranks(world.rank, world.size, host=host, ports=candidate_ports(first_port), token=job_token(world.size))


def _first_host(nodelist: str) -> str:
    """Return the first name of a SLURM node list: `n[03-05,9]-ib` -> `n03-ib`, `a1,b2` -> `a1`."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + suffix.split(",")[0]
