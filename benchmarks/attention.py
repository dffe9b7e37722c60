"""A layer of attention, forward and backward: softmax(q k^T) v step by step against torch's fused kernel. What is
faster decides `mae_dat.parallel.choose_attention`."""

from functools import partial

import torch
from timm.models.vision_transformer import Attention

from benchmarks.timing import Case, Step
from mae_dat.distributed import amp_dtype

# Batch, tokens, width, heads: MAE ViT-B's encoder and decoder, ViT-B at 224 and at 512 px, the demo's ViT.
SIZES = ((8, 50, 768, 12), (8, 197, 512, 16), (4, 197, 768, 12), (1, 1025, 768, 12), (64, 65, 128, 4))
GPU_BATCH = 16
"""Times as many pictures on a GPU."""


def layer(size: tuple[int, int, int, int], precision: torch.dtype | None, device: torch.device, fused: bool) -> Step:
    """Builds a pass through timm's layer and back."""
    batch, tokens, width, heads = size
    attention = Attention(width, num_heads=heads, qkv_bias=True).to(device)
    attention.fused_attn = fused
    x = torch.randn(batch, tokens, width, device=device, requires_grad=True)

    def step() -> None:
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
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
            title = f"attention step by step, {name}, {tokens} tokens of {width} in {heads} heads"
            found.append(Case(title, *build, against="fused", batch=size[0]))
    return found
