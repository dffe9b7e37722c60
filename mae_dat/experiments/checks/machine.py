"""Check the devices, the precision and the threads that the commands will use, and the disks they will write to."""

import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.groups import default_num_workers
from mae_dat.config.limits import available_memory, memory_limit, usable_cores
from mae_dat.experiments.checks.row import CheckRow, CheckState
from mae_dat.storage.files import HOME_VARIABLE, home_folder

if TYPE_CHECKING:
    import torch

SHARED_MEMORY = Path("/dev/shm")
_GB = 1e9
_LEAST_MEMORY, _LEAST_OUTPUT, _LEAST_CACHE, _LEAST_SHARED = 2 * _GB, 10 * _GB, 5 * _GB, 1 * _GB
"""Less than these is a warning: ViT-L with its optimizer has a checkpoint of 3.6 GB, and released weights up to 2.5."""
_FULL = 32e6
"""A disk with less than this is full: not even a checkpoint of the demo, or the batches of one worker, fit."""


# ---- devices ----


def check_cuda() -> list[CheckRow]:
    """Check that every GPU computes, and say why there is none where a driver is installed."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return [_gpu_row(index) for index in range(torch.cuda.device_count())]
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if not driver:
        return [CheckRow("ok", "GPU", "none; everything runs on the CPU")]
    if torch.version.cuda is None:
        fix = "install a build of torch with CUDA: https://pytorch.org/get-started/locally/"
        return [CheckRow("warning", "GPU", f"torch {torch.__version__} is a build for CPUs alone", fix)]
    reason = str(caught[-1].message) if caught else "torch finds none"
    fix = f"update the driver, or install a build of torch for an older CUDA than {torch.version.cuda}"
    return [CheckRow("warning", "GPU", f"there is a driver, but no usable GPU: {reason}", fix)]


def _gpu_row(index: int) -> CheckRow:
    import torch

    name, facts = f"GPU {index}", torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        (ones @ ones).sum().item()
    except RuntimeError as error:
        text = f"{facts.name} does not compute: {str(error).splitlines()[0]}"
        fix = "update the driver, or install a build of torch for this GPU: https://pytorch.org/get-started/locally/"
        return CheckRow("failed", name, text, fix)
    text = f"{facts.name}, {_gb(free)} of {_gb(total)} free, compute capability {facts.major}.{facts.minor}"
    if free < total / 2:
        return CheckRow("warning", name, text, "another process uses it: see nvidia-smi, or set CUDA_VISIBLE_DEVICES")
    return CheckRow("ok", name, text)


def check_processor() -> CheckRow:
    """Report the processor, the cores that this process may use, and how busy they are."""
    from mae_dat.runtime.machine import hardware_facts

    cores = usable_cores()
    text = f"{hardware_facts()['processor'] or platform.machine()}, {_cores(cores)} for this process"
    if (load := os.getloadavg()[0]) > 1.5 * cores:
        text += f"; busy (load {load:.0f}), so times are longer than usual"
    return CheckRow("ok", "processor", text)


def check_memory() -> CheckRow:
    """Check the memory that is free, within the limit of a container or job."""
    limit, available = memory_limit(), available_memory()
    if limit is None or available is None:
        return CheckRow("-", "memory", "this system does not report how much is free")
    text = f"{_gb(available)} of {_gb(limit)} free"
    if available < _LEAST_MEMORY:
        return CheckRow("warning", "memory", text, "end other programs, or ask for more (submit --mem_gb)")
    return CheckRow("ok", "memory", text)


def check_precision(config: DoctorConfig) -> CheckRow:
    """Report the precision that a training with this configuration computes in, and why."""
    from mae_dat.runtime.device import amp_dtype, pick_device

    device = pick_device(config.device)
    precision = amp_dtype(config.precision, device)
    name = "float32" if precision is None else str(precision).removeprefix("torch.")
    return CheckRow("ok", "precision", f"{name} on {device}: {_precision_reason(config.precision, precision, device)}")


def _precision_reason(flag: str, precision: "torch.dtype | None", device: "torch.device") -> str:
    if flag != "auto":
        return f"--precision {flag}"
    if device.type == "cuda":
        return f"the GPU has {'' if precision else 'no '}units for bfloat16"
    return f"the processor has {'' if precision else 'no '}instructions for bfloat16 (avx512_bf16)"


def check_threads() -> CheckRow:
    """Check that torch's threads are not more than the cores that this process may use."""
    import torch

    threads, cores, workers = torch.get_num_threads(), usable_cores(), default_num_workers()
    setting = f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})" if "OMP_NUM_THREADS" in os.environ else ""
    text = f"{threads} for torch{setting}, --num_workers {workers}"
    if threads > cores + 0.5 or workers > cores + 0.5:
        count = max(1, int(cores))
        fix = f"export OMP_NUM_THREADS={count} (or give --threads {count}), and give --num_workers {count}"
        return CheckRow("warning", "threads", f"{text}; more than {_cores(cores)}", fix)
    return CheckRow("ok", "threads", text)


# ---- disks ----


def check_output_folder(folder: Path) -> CheckRow:
    """Check that the output folder can be written and has space for checkpoints."""
    return folder_row("output folder", folder, _LEAST_OUTPUT, "choose another with --output_dir")


def check_cache_folder() -> CheckRow:
    """Check that the folder of downloads and generated images can be written and has space for weights."""
    return folder_row("cache folder", home_folder(), _LEAST_CACHE, f"set {HOME_VARIABLE} to another folder")


def folder_row(name: str, folder: Path, least: float, instead: str) -> CheckRow:
    """Return the row of a folder in which files will be written; one that does not exist is not created.

    Less than `least` bytes of free space is a warning, a full disk a failure. `instead` is the fix.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return CheckRow("failed", name, f"{existing} is no folder", f"remove it, or {instead}")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as probe:
            (Path(probe) / "file").write_bytes(b"mae_dat")
    except OSError as error:
        return CheckRow("failed", name, f"{existing} cannot be written: {error.strerror}", instead)
    free = shutil.disk_usage(existing).free
    text = f"{folder}: {_gb(free)} free" + ("" if existing == folder else ", not there yet")
    return _space_row(name, text, free, least, f"free some space, or {instead}")


def check_shared_memory(folder: Path = SHARED_MEMORY) -> CheckRow:
    """Check the space through which the workers of a loader pass their batches."""
    fix = "enlarge it (docker run --shm-size=8g), or give --num_workers 0"
    if not folder.is_dir():
        return CheckRow("failed", str(folder), "does not exist", fix)
    usage = shutil.disk_usage(folder)
    return _space_row(str(folder), f"{_gb(usage.free)} of {_gb(usage.total)} free", usage.free, _LEAST_SHARED, fix)


def _space_row(name: str, text: str, free: int, least: float, fix: str) -> CheckRow:
    state: CheckState = "failed" if free < _FULL else "warning" if free < least else "ok"
    return CheckRow(state, name, text, "" if state == "ok" else fix)


def _gb(count: float) -> str:
    return f"{count / _GB:.1f} GB"


def _cores(count: float) -> str:
    return f"{count:g} core{'' if count == 1 else 's'}"
