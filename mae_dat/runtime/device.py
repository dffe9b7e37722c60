"""The device of this process: which one, its precision, its compiler and its memory."""

import contextlib
import resource
from collections.abc import Iterator

import torch

from mae_dat.config.errors import ConfigError
from mae_dat.config.limits import describe_cores, usable_cores
from mae_dat.runtime.inputs import count_of
from mae_dat.runtime.world import World


def pick_device(name: str, world: World = World()) -> torch.device:  # noqa: B008 - immutable
    """Return the device to run on: `auto` is CUDA if available, with one GPU for each local rank.

    Raises ConfigError for an unknown device, and for CUDA on a machine without it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is not a device: use cuda, cpu or auto.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: this machine has no usable CUDA device. Use --device cpu (slower).")
        device = torch.device("cuda", world.local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: bfloat16 for `bf16`, and for `auto` if the hardware supports it; None for float32."""
    if precision in ("fp32", "tf32"):
        return None
    if precision == "bf16" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)):
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None


def set_float32_precision(precision: str) -> None:
    """Set how a GPU computes in float32: matrix products in TF32 for `tf32`, else in full precision.

    Convolutions always use full precision: the adversary's step is a fraction of a gray level, which TF32 (cuDNN's
    default) would round away in a tokenizer.
    """
    # torch's older switches: after setting the newer ones (`fp32_precision`), reading the older ones raises an error,
    # and torch.compile and torch.export read them.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = False


def describe_device(
    device: torch.device,
    precision: torch.dtype | None = None,
    num_workers: int | None = None,
    ranks: int | None = None,
) -> str:
    """Return the device, precision, threads, loader workers and ranks of a command, in words.

    `precision` is the data type of autocast, None for float32. `num_workers` is None for a command that starts none,
    `ranks` for one that runs in one process.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_cores(usable_cores())
    parts = [f"{device} ({name})", _precision_in_words(precision, device)]
    parts.append(count_of(torch.get_num_threads(), "thread"))
    if num_workers is not None:
        parts.append(describe_workers(num_workers))
    if ranks is not None:
        parts.append(count_of(ranks, "rank"))
    return ", ".join(parts)


def describe_workers(num_workers: int) -> str:
    """Return the number of loader workers in words."""
    return count_of(num_workers, "worker") if num_workers else "no workers"


def _precision_in_words(precision: torch.dtype | None, device: torch.device) -> str:
    if precision is not None:
        return f"{str(precision).removeprefix('torch.')} autocast"
    return "float32 with TF32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float32"


@contextlib.contextmanager
def restore_numerics() -> Iterator[None]:
    """Restore torch's threads and its switches for TF32 and determinism after the block, which a run sets for the whole
    process."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
        torch.use_deterministic_algorithms(deterministic)


def require_compiler(flag: str) -> None:
    """Raise ConfigError if there is no C++ compiler; `flag` is the one that requires torch.compile."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(f"{flag} needs a C++ compiler such as g++: install one, or remove {flag}.") from error


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on the GPU, or resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def cpu_has_amx() -> bool:
    """Return whether the processor has matrix units for bfloat16 (Intel's AMX)."""
    return "amx_bf16" in _cpu_flags()


def _cpu_has_bf16() -> bool:
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    return capability.startswith("AVX512") and "avx512_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    # The names of torch's own checks change between releases; /proc/cpuinfo is stable.
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return file.read()
    return ""
