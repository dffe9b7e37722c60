"""The machine's own matrix rate, against which every training step is held."""

import time

import torch

from benchmarks.timing import wait_for

SIDES = {"cpu": 1024, "cuda": 8192}
TRIES = 9


def matrix_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of products of large square matrices, the best of several: `bf16`, `fp32` and, on a GPU, `tf32`."""
    rates = {"bf16": matrix_rate(torch.bfloat16, device)}
    matmul = torch.backends.cuda.matmul
    for name in ("fp32", "tf32"):
        if name == "fp32" or device.type == "cuda":
            before, matmul.allow_tf32 = matmul.allow_tf32, name == "tf32"
            rates[name] = matrix_rate(torch.float32, device)
            matmul.allow_tf32 = before
    return rates


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s, two a multiply-add, the best of TRIES groups of products."""
    side = SIDES.get(device.type, SIDES["cpu"])
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count = 20 if device.type == "cuda" else 1
    best = float("inf")
    for _ in range(TRIES):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            left @ right
        wait_for(device)
        best = min(best, (time.perf_counter() - start) / count)
    return 2 * side**3 / best
