"""Find the batch size that fits into the memory, and the flags that give MAE's effective batch with it.

On a GPU the batch is doubled until the memory runs out. On a CPU small batches are measured and the rest is estimated,
so that the machine's memory is not filled.
"""

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.limits import available_memory
from mae_dat.config.memory import is_memory_error
from mae_dat.experiments.checks.row import CheckRow

if TYPE_CHECKING:
    import torch

_SMALLEST = 2
"""Images of the first update; BatchNorm may not take one."""
_LARGEST_ON_CPU = 64
"""Larger batches are hardly faster on a CPU."""
_GPU_SHARE, _CPU_SHARE, _PROBE_SHARE = 0.95, 0.5, 0.25
"""Shares of the memory: what an update may fill on a GPU, on a CPU, and while it is measured on a CPU."""
_CLEAR_PEAK = 64e6
"""Bytes from which a peak is precise."""
_SECONDS = 10.0
"""Time after which no further batch is measured on a CPU."""
_BYTES_PER_WEIGHT = 16
"""Memory of a parameter in training: the weight, its gradient and AdamW's two averages, in float32."""
_FIX = "give --checkpoint_activations, a smaller --input_size or a smaller --model"

Update = Callable[[int], object]
"""Does one update with a number of images."""


def check_batch_size(config: DoctorConfig) -> CheckRow:
    """Measure the largest batch that fits for the model, the image size and the adversary of the configuration."""
    import torch

    from mae_dat.experiments.checks.measured_training import MeasuredTraining, effective_batch, parameters
    from mae_dat.runtime.device import pick_device

    device = pick_device(config.device)
    title = _title(config, device)
    wanted, devices = effective_batch(config.model_on(device.type)), 1
    if device.type == "cuda":
        devices = torch.cuda.device_count() if config.device in ("auto", "cuda") else 1
        fits, memory = _measure_on_gpu(lambda: MeasuredTraining(config, device).update, device, wanted // devices)
    else:
        needed, available = _BYTES_PER_WEIGHT * parameters(config, device), available_memory()
        if available is None:
            return CheckRow("-", "batch size", "not measured: this system does not report how much memory is free")
        if needed > _CPU_SHARE * available:
            text = f"{title}: the weights alone need {needed / 1e9:.1f} of {available / 1e9:.1f} GB in training"
            return CheckRow("warning", "batch size", text, "give a smaller --model")
        fits, memory = estimate_on_cpu(MeasuredTraining(config, device).update)
    if fits < 1:
        return CheckRow("warning", "batch size", f"{title}: no batch fits ({memory})", _FIX)
    batch, accum = batch_plan(fits, wanted, devices)
    ranks = f" on {devices} GPUs" if devices > 1 else ""
    flags = f"MAE's effective batch of {wanted:,} images{ranks}:\n--batch_size {batch} --accum_iter {accum}"
    return CheckRow("ok", "batch size", f"{title}: a batch of {fits:,} images fits ({memory})\n{flags}")


def _title(config: DoctorConfig, device: "torch.device") -> str:
    """Return what is measured, in words."""
    name = config.model_on(device.type)
    sides = dict.fromkeys(config.size_of(name))
    kind = "pretraining" if name.startswith("mae_") else "fine-tuning"
    adversary = "" if config.dat.kind == "none" else f", --dat {config.dat.kind}"
    return f"{kind} {name} at {' x '.join(map(str, sides))} px{adversary}"


def batch_plan(fits: int, wanted: int, devices: int = 1) -> tuple[int, int]:
    """Return `--batch_size` and `--accum_iter` for an effective batch of at least `wanted` images, if at most `fits`
    images fit on each of the devices; the batch is even where it can be."""
    accum = math.ceil(wanted / (fits * devices))
    batch = math.ceil(wanted / (accum * devices))
    return min(batch + batch % 2, fits), accum


# ---- on a GPU ----


def largest_batch(update: Update, limit: int) -> int:
    """Double the batch until an update raises an error for want of memory, or up to `limit` images; returns the largest
    one that succeeded, 0 for none."""
    fits, images = 0, _SMALLEST
    while images <= limit:
        try:
            update(images)
        except RuntimeError as error:
            if not is_memory_error(error):
                raise
            break
        fits, images = images, 2 * images
    return fits


def _measure_on_gpu(build: Callable[[], Update], device: "torch.device", limit: int) -> tuple[int, str]:
    """Return the largest batch that fits, and the memory in words. Frees the memory."""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    peaks: dict[int, int] = {}
    updates: list[Update] = []

    def update(images: int) -> None:
        if not updates:
            updates.append(build())
        torch.cuda.reset_peak_memory_stats(device)
        updates[0](images)
        peaks[images] = torch.cuda.max_memory_allocated(device)
        if peaks[images] > _GPU_SHARE * total:
            raise torch.OutOfMemoryError("out of memory: the update leaves less than 5 %")

    try:
        fits = largest_batch(update, limit)
    finally:
        updates.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return fits, f"{peaks.get(fits, total) / 1e9:.1f} of {total / 1e9:.1f} GB"


# ---- on a CPU ----


def estimate_on_cpu(update: Update) -> tuple[int, str]:
    """Estimate how many images fit into half of the free memory: a power of two up to 64, 0 for none. Returns them, and
    their memory in words.

    Small batches are measured, of twice as many images each time, until the peak divided by the images hardly changes,
    a quarter of the memory would be filled, or some seconds are over. The estimate is too high rather than too low: the
    peak has a part that does not grow with the batch, such as the gradients.
    """
    images, start = _SMALLEST, time.monotonic()
    update(images)  # what is allocated once, such as the optimizer's averages, is not part of the peaks
    gc.collect()
    available = available_memory() or 0
    peak = peak_rise(update, images)
    while images < _LARGEST_ON_CPU and 2 * peak < _PROBE_SHARE * available and time.monotonic() < start + _SECONDS:
        before, images = peak / images, 2 * images
        peak = peak_rise(update, images)
        if peak > _CLEAR_PEAK and peak / images > 0.9 * before:
            break
    per_image = max(peak / images, 1.0)
    allowed = int(_CPU_SHARE * available / per_image)
    fits = min(_LARGEST_ON_CPU, 1 << allowed.bit_length() - 1) if allowed else 0
    return fits, f"about {max(fits, 1) * per_image / 1e9:.1f} of {available / 1e9:.1f} GB that are free"


def peak_rise(update: Update, images: int) -> float:
    """Return by how many bytes this process's memory rises at most during an update."""
    # Returns freed memory to the system (glibc only); otherwise it would be used again, unseen.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    update(images)
    return max(_resident("VmHWM") - before, 0.0)


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
