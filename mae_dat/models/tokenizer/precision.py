"""Precision of a tokenizer: which layers compute in 16 bits, and how many words that changes.

A DAT step at 224 px is 0.07 gray levels, so rounding influences which words it changes. Therefore 16 bits are optional,
and `auto` uses them only after comparing the words.
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

# Of the layers in `VisualTokenizer.reducible`, of encoder and decoder; all other layers stay in float32.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16_decoder": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
# Limits of `auto`: share of words that may differ from float32's, and mean difference of pixels in [0, 1].
MAX_FLIPS, MAX_PIXELS = 0.01, 0.5 / 255


class Agreement(NamedTuple):
    """A tokenizer in 16 bits compared with the same one in float32; shares in [0, 1], except the last field."""

    flips: float
    """Share of the images' words that differ."""
    exact_changes: float
    """Share of words that a step changes in float32."""
    fast_changes: float
    """Share of words that it changes in 16 bits."""
    overlap: float
    """Intersection over union of the positions changed in each precision; each attacks its own reconstruction."""
    overlap_same_image: float
    """The same if both attack the reconstruction of float32, which isolates the effect of the encoder."""
    pixels: float
    """Mean absolute difference of the images decoded from the same words, in [0, 1]."""


@torch.no_grad()
def agreement(exact: VisualTokenizer, fast: VisualTokenizer, image: Tensor, delta: Tensor) -> Agreement:
    """Compare two forms of one tokenizer on images (B, C, H, W) in [0, 1] and steps `delta` of the same shape."""

    def changes(tokenizer: VisualTokenizer, view: Tensor) -> Tensor:
        return tokenizer.encode((view + delta).clamp(0, 1)) != tokenizer.encode(view)

    words, fast_words = exact.encode(image), fast.encode(image)
    decoded, fast_decoded = exact.decode(words), fast.decode(words)
    exact_changes, fast_changes = changes(exact, decoded), changes(fast, fast.decode(fast_words))
    return Agreement(
        flips=share_changed(words, fast_words).item(),
        exact_changes=exact_changes.float().mean().item(),
        fast_changes=fast_changes.float().mean().item(),
        overlap=_overlap(exact_changes, fast_changes),
        overlap_same_image=_overlap(exact_changes, changes(fast, decoded)),
        pixels=(decoded - fast_decoded).abs().mean().item(),
    )


def _overlap(first: Tensor, second: Tensor) -> float:
    return ((first & second).sum() / (first | second).sum().clamp(min=1)).item()


def in_precision(
    tokenizer: VisualTokenizer, device: torch.device, precision: str = "auto", compiled: bool = False
) -> VisualTokenizer:
    """Move a frozen tokenizer to its device, in the precision of this name (`PRECISIONS`), and return it.

    `auto` is float32 on a CPU. On a GPU it is fp16 if the words and pixels of a few generated images stay within the
    limits on rank 0. Collective.
    """
    if precision == "auto":
        candidates = ("fp16",) if device.type == "cuda" else ()
        precision = on_main_rank(lambda: first_accurate_precision(tokenizer, device, candidates))
    encoder, decoder = PRECISIONS[precision]
    return tokenizer.prepare(device, encoder, decoder, compiled)


@torch.no_grad()
def first_accurate_precision(tokenizer: VisualTokenizer, device: torch.device, candidates: tuple[str, ...]) -> str:
    """Return the first of `candidates` that is within the limits on generated images, or `fp32`."""
    image, exact = generated_images(tokenizer), copy.deepcopy(tokenizer).prepare(device)
    for name in candidates:
        fast = copy.deepcopy(tokenizer).prepare(device, *PRECISIONS[name])
        comparison = agreement(exact, fast, image.to(device), torch.zeros_like(image, device=device))
        if comparison.flips <= MAX_FLIPS and comparison.pixels <= MAX_PIXELS:  # False for NaN
            logger.info("tokenizer in %s: %.2f %% of the words differ from float32", name, 100 * comparison.flips)
            return name
        logger.warning("tokenizer in float32: in %s %.1f %% of the words would differ", name, 100 * comparison.flips)
    return "fp32"


def generated_images(tokenizer: VisualTokenizer, count: int = 4) -> Tensor:
    """Draw images (count, C, H, H) in [0, 1] with sides of 32 words."""
    from mae_dat.data.generated.draw import draw_image  # imports Pillow, which the tokenizers do not need

    images = np.stack([draw_image(0, "val", index, size=32 * tokenizer.factor).image for index in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()[:, : tokenizer.in_chans] / 255
