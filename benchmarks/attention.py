"""A layer of attention, forward and backward: softmax(q k^T) v step by step against torch's fused kernel, and on a GPU
each of the fused kernels against the one that torch takes by itself. What is faster decides
`mae_dat.runtime.blocks.choose_attention`."""

import contextlib
from functools import partial

import torch
from timm.models.vision_transformer import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Case, Step
from mae_dat.models.modes import autocast
from mae_dat.runtime.device import amp_dtype

# Batch, tokens, width, heads: MAE ViT-B's encoder and decoder, ViT-B at 224 and at 512 px, the demo's ViT.
SIZES = ((8, 50, 768, 12), (8, 197, 512, 16), (4, 197, 768, 12), (1, 1025, 768, 12), (64, 65, 128, 4))
GPU_BATCH = 16
"""Times as many images on a GPU."""
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def layer(
    size: tuple[int, int, int, int],
    precision: torch.dtype | None,
    device: torch.device,
    fused: bool,
    kernel: SDPBackend | None = None,
) -> Step:
    """Builds a pass through timm's layer and back; by the fused kernel of this name, or torch's choice."""
    batch, tokens, width, heads = size
    attention = Attention(width, num_heads=heads, qkv_bias=True).to(device)
    attention.fused_attn = fused
    x = torch.randn(batch, tokens, width, device=device, requires_grad=True)

    def step() -> None:
        chosen = contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)
        with chosen, autocast(device, precision):
            attention(x).sum().backward()

    return step


def cases(quick: bool, device: torch.device) -> list[Case]:
    """In the precision that `--precision auto` chooses, and in float32; not the latter with `quick`."""
    precisions = {"fp32": None, **({"bf16": torch.bfloat16} if amp_dtype("auto", device) else {})}
    found = []
    for batch, tokens, width, heads in SIZES:
        size = (batch * (GPU_BATCH if device.type == "cuda" else 1), tokens, width, heads)
        for name, precision in list(precisions.items())[-1 if quick else 0 :]:
            build = partial(layer, size, precision, device, False), partial(layer, size, precision, device, True)
            what = f"{name}, {tokens} tokens of {width} in {heads} heads"
            found.append(Case(f"attention step by step, {what}", *build, against="fused", batch=size[0]))
            for title, kernel in KERNELS.items() if device.type == "cuda" and precision else ():
                builds = partial(layer, size, precision, device, True, kernel), build[1]
                found.append(Case(f"attention by {title}, {what}", *builds, against="fused", batch=size[0]))
    return found
