"""Where this process runs: device and precision, rank and world, reductions, and the random state of a step."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from mae_dat.runtime.failures import report_failure_to_ranks
from mae_dat.runtime.rendezvous import candidate_ports, job_token, join_ranks

logger = logging.getLogger(__name__)
T = TypeVar("T")


class World(NamedTuple):
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True on the one rank that writes and shows."""
        return self.rank == 0


def world_from_environment() -> World:
    """Reads torchrun's variables, or SLURM's when started by a bare `srun`; a single process otherwise."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # An interactive allocation sets SLURM_NTASKS too; only srun sets the step's variables.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return World()


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Joins the peers for the duration of the block; nothing for a single process.

    Ranks whose peers fail leave with the error of the one that failed (`mae_dat.runtime.failures`). Raises ConfigError
    when they do not find each other.
    """
    if world.size == 1:
        yield
        return
    own = device if device.type == "cuda" else None
    # gloo carries what lies in host memory: pickled words, and a sharded state on its way to rank 0.
    backend = "cpu:gloo,cuda:nccl" if own else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, init_method="env://", device_id=own)
    else:
        store = _store(world)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, device_id=own)
    with report_failure_to_ranks():
        yield


def _store(world: World) -> dist.Store:
    """The ranks' common store where no torchrun made one: at MASTER_ADDR and MASTER_PORT, or at what SLURM's step
    tells."""
    env = os.environ
    host = env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    base = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 9500)) % 12000)
    return join_ranks(world.rank, world.size, host, candidate_ports(base), job_token(world.size))


def _first_host(nodelist: str) -> str:
    """First name of a SLURM node list: `n[03-05,9]-ib` -> `n03-ib`, `a1,b2` -> `a1`."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + suffix.split(",")[0]
