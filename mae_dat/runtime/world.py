"""Where this process runs: device and precision, rank and world, reductions, and the random state of a step."""

import contextlib
import hashlib
import logging
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mae_dat.config.errors import ConfigError, PeerError, UserError
from mae_dat.runtime.failures import leaving_together
from mae_dat.runtime.rendezvous import join, ports_of, token_of_job

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


def pick_device(name: str, world: World = World()) -> torch.device:  # noqa: B008 - immutable
    """The device to run on: `auto` takes CUDA if there is any. Raises ConfigError when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is no device: use cuda, cpu or auto.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "--device cuda: this machine has no usable CUDA device. Use --device cpu (slow, but it works)."
            )
        device = torch.device("cuda", world.local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 for `bf16`, and for `auto` where the hardware computes in it; None for float32."""
    if precision in ("fp32", "tf32"):
        return None
    if precision == "bf16" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None


def set_float32(precision: str) -> None:
    """How a GPU computes in float32: matrices in TF32 for `tf32`, else exactly; convolutions always exactly, since the
    adversary's step is a fraction of a grey level, which TF32 (cuDNN's default) blurs in a tokenizer."""
    # By torch's older switches: its newer ones, `fp32_precision`, make the older raise, which torch.compile and
    # torch.export read.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = False


def require_compiler(flag: str) -> None:
    """Raises ConfigError about the flag that asks for torch.compile where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(f"{flag} needs a C++ compiler such as g++: install one, or leave it out.") from error


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: of the GPU allocated, or resident in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def cpu_has_amx() -> bool:
    """Whether the processor has matrix units for bfloat16 (Intel's AMX)."""
    return "amx_bf16" in _cpu_flags()


def _cpu_has_bf16() -> bool:
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    return capability.startswith("AVX512") and "avx512_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    # torch names its checks differently from release to release; /proc is the same everywhere it matters.
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return file.read()
    return ""


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
    with leaving_together():
        yield


def _store(world: World) -> dist.Store:
    """The ranks' common store where no torchrun made one: at MASTER_ADDR and MASTER_PORT, or at what SLURM's step
    tells."""
    env = os.environ
    host = env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    base = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 9500)) % 12000)
    return join(world.rank, world.size, host, ports_of(base), token_of_job(world.size))


def _first_host(nodelist: str) -> str:
    """First name of a SLURM node list: `n[03-05,9]-ib` -> `n03-ib`, `a1,b2` -> `a1`."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + suffix.split(",")[0]


def all_sum(value: Tensor) -> Tensor:
    """Sum over ranks, of the value's own type; the value itself in a single process."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_mean(value: Tensor) -> Tensor:
    """Mean over ranks."""
    return all_sum(value) / dist.get_world_size() if dist.is_initialized() else value


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """Every rank's value (anything that can be pickled), in the order of ranks. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(failure: UserError | None) -> None:
    """Raises on every rank if one of them failed: there its own error, elsewhere a PeerError with what the first one
    said. Collective."""
    told = gather((str(failure), failure.exit_code) if failure else None)
    if failure:
        raise failure
    for rank, one in enumerate(told):
        if one:
            raise PeerError(f"rank {rank} stopped: {one[0]}", one[1])


def failure_of(act: Callable[[], object]) -> UserError | None:
    """The UserError that an act raises, if it does."""
    try:
        act()
    except UserError as error:
        return error
    return None


def together(act: Callable[[], T]) -> T:
    """Acts on every rank; a UserError of one of them is raised on all. Collective."""
    results: list[T] = []
    raise_together(failure_of(lambda: results.append(act())))
    return results[0]


def from_main(decide: Callable[[], T]) -> T:
    """What `decide` gives on rank 0, on every rank; its UserError too. Collective."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    return gather(together(lambda: decide() if main else None))[0]  # type: ignore[return-value]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed that is a pure function of its arguments: no random state needs saving for a run to resume
    exactly."""
    digest = hashlib.sha256(f"mae_dat step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """Generator for everything drawn explicitly in one step: mask noise, random words, the attack's start."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, rank))
