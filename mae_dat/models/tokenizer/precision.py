"""Which layers of a tokenizer compute in 16 bits, and what that does to its words.

A DAT step at 224 px is 0.07 grey levels: rounding decides which words it changes. So 16 bits are a choice, and `auto`
makes it only after a look at the words.
"""

import copy
import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae_dat.models.tokenizer.base import VisualTokenizer, share_changed
from mae_dat.runtime.collectives import on_main_rank

logger = logging.getLogger(__name__)

# The layers that `VisualTokenizer.reducible` names, of the encoder and of the decoder; all else is float32.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16_decoder": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
# The gate of `auto`: share of words that may differ from float32's, and mean difference of pixels in [0, 1].
MOST_FLIPS, MOST_PIXELS = 0.01, 0.5 / 255


class Agreement(NamedTuple):
    """A tokenizer in 16 bits beside the same one in float32, all as shares in [0, 1] but the last."""

    flips: float
    """Words of the pictures that differ."""
    changed: float
    """Words that a step changes, in float32."""
    fast_changed: float
    """Words that it changes in 16 bits."""
    overlap: float
    """Places that it changes in both, of those in either; each attacks its own reconstruction."""
    overlap_same_picture: float
    """The same where both attack float32's reconstruction: what the encoder alone does."""
    pixels: float
    """Mean absolute difference of the pictures drawn from the same words, in [0, 1]."""


@torch.no_grad()
def agreement(exact: VisualTokenizer, fast: VisualTokenizer, image: Tensor, delta: Tensor) -> Agreement:
    """Compares two forms of one tokenizer on pictures (B, C, H, W) in [0, 1] and steps `delta` of the same shape."""

    def moved(tokenizer: VisualTokenizer, view: Tensor) -> Tensor:
        return tokenizer.encode((view + delta).clamp(0, 1)) != tokenizer.encode(view)

    words, fast_words = exact.encode(image), fast.encode(image)
    drawn, fast_drawn = exact.decode(words), fast.decode(words)
    changed, own, same = moved(exact, drawn), moved(fast, fast.decode(fast_words)), moved(fast, drawn)
    return Agreement(
        share_changed(words, fast_words).item(),
        changed.float().mean().item(),
        own.float().mean().item(),
        _overlap(changed, own),
        _overlap(changed, same),
        (drawn - fast_drawn).abs().mean().item(),
    )


def _overlap(one: Tensor, other: Tensor) -> float:
    return ((one & other).sum() / (one | other).sum().clamp(min=1)).item()


def in_precision(
    tokenizer: VisualTokenizer, device: torch.device, precision: str = "auto", compiled: bool = False
) -> VisualTokenizer:
    """The frozen tokenizer on its device, in the precision of this name (`PRECISIONS`).

    `auto` is float32 on a CPU; on a GPU fp16, if on a few drawn pictures its words and pixels are within the gate on
    rank 0. Collective.
    """
    if precision == "auto":
        candidates = ("fp16",) if device.type == "cuda" else ()
        precision = on_main_rank(lambda: quickest_exact(tokenizer, device, candidates))
    encoder, decoder = PRECISIONS[precision]
    return tokenizer.prepare(device, encoder, decoder, compiled)


@torch.no_grad()
def quickest_exact(tokenizer: VisualTokenizer, device: torch.device, candidates: tuple[str, ...]) -> str:
    """The first of `candidates` that is within the gate on drawn pictures, or `fp32`."""
    image, exact = drawn_pictures(tokenizer), copy.deepcopy(tokenizer).prepare(device)
    for name in candidates:
        fast = copy.deepcopy(tokenizer).prepare(device, *PRECISIONS[name])
        found = agreement(exact, fast, image.to(device), torch.zeros_like(image, device=device))
        if found.flips <= MOST_FLIPS and found.pixels <= MOST_PIXELS:  # not true of NaN either
            logger.info("tokenizer in %s: %.2f %% of the words differ from float32's", name, 100 * found.flips)
            return name
        logger.warning("tokenizer in float32: in %s %.1f %% of the words would differ", name, 100 * found.flips)
    return "fp32"


def drawn_pictures(tokenizer: VisualTokenizer, count: int = 4) -> Tensor:
    """Generated pictures (count, C, H, H) in [0, 1] of 32 words a side."""
    from mae_dat.data.generated.draw import draw_image  # with Pillow, which nothing else here needs

    images = np.stack([draw_image(0, "val", index, size=32 * tokenizer.factor).image for index in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()[:, : tokenizer.in_chans] / 255
