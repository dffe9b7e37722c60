"""The symbolic adversary: visual words chosen one by one by a first-order estimate (HotFlip, Ebrahimi et al. 2018).

The attack changes words, so its gradient passes through the tokenizer's *decoder* to the codes, never through its
encoder or the quantizer. Changing the word c at a place to k raises the loss by about (e_k - e_c) . g, where g is the
gradient at the code of that place. The best word is found for each place; the places with the largest gain are changed.

Shapes: words (B, h, w), int64; N is the number of places of all images, K the vocabulary, D the dimension of a code.
"""

import torch
from torch import Tensor

from mae_dat.attacks.gradient import LossFn
from mae_dat.models.tokenizer.base import VisualTokenizer, exact_float32
from mae_dat.models.tokenizer.quantize import look_up, nearness, rows_at_once, straight_through


def symbolic_words(
    words: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    count: int,
    steps: int = 1,
    nearest: int | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Change at most `count` words of each image in `steps` gradient steps to raise `loss_fn`; returns (B, h, w).

    `free`, bool (B, h, w), marks the places where a word may change (None: all). No word changes twice. The other
    arguments are those of `change_words`.
    """
    start = words
    free = torch.ones_like(words, dtype=torch.bool) if free is None else free
    for step in range(steps):
        step_count = count * (step + 1) // steps - count * step // steps
        words = change_words(
            words, free & (words == start), loss_fn, tokenizer=tokenizer, count=step_count, nearest=nearest
        )
    return words


def change_words(
    words: Tensor, free: Tensor, loss_fn: LossFn, tokenizer: VisualTokenizer, count: int, nearest: int | None = None
) -> Tensor:
    """Take one step: change the `count` best of the `free` places, bool (B, h, w), to their best words; (B, h, w).

    Only places with a positive gain are changed, so without a gradient no word changes. With `nearest`, a word changes
    only to one of the `nearest` codes closest to its own. `loss_fn` maps images (B, C, H, W) to a scalar in which every
    image has the same weight.
    """
    gradient = code_gradient(words, loss_fn, tokenizer)
    gain, best = best_words(words.flatten(), gradient.flatten(0, 2), tokenizer.codebook, nearest)
    gain = gain.view(len(words), -1).masked_fill(~free.flatten(1), 0)
    largest, places = gain.topk(min(count, gain.shape[1]), dim=1)
    flat = words.flatten(1)
    chosen = torch.where(largest > 0, best.view_as(flat).gather(1, places), flat.gather(1, places))
    return flat.scatter(1, places, chosen).view_as(words)


def code_gradient(words: Tensor, loss_fn: LossFn, tokenizer: VisualTokenizer) -> Tensor:
    """Compute dL/de at the code of every place, float32 (B, h, w, D), through the decoder, which runs in float32."""
    with torch.enable_grad(), exact_float32():
        codes = look_up(words, tokenizer.codebook).detach().requires_grad_()
        with torch.autocast(words.device.type, enabled=False):
            pixels = tokenizer.pixels(codes)
        # The gradient skips the clamp: its own is 0 where a pixel exceeds 1, and would hide words that darken it.
        (gradient,) = torch.autograd.grad(loss_fn(straight_through(pixels, pixels.clamp(0, 1))), codes)
    return gradient.permute(0, 2, 3, 1).float()


@torch.no_grad()
def best_words(
    words_N: Tensor, gradient_ND: Tensor, codebook_KD: Tensor, nearest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the largest (e_k - e_c) . g of every place, 0 where no word gains, and its word k: (N,) and (N,)."""
    codebook_KD = codebook_KD.float()
    rows = rows_at_once(codebook_KD)
    gains, best = [], []
    for word, gradient in zip(words_N.split(rows), gradient_ND.split(rows), strict=True):
        score = gradient @ codebook_KD.T
        score -= score.gather(1, word[:, None])
        if nearest is not None:
            used, row = word.unique(return_inverse=True)
            far = torch.ones(len(used), len(codebook_KD), dtype=torch.bool, device=word.device)
            far.scatter_(1, nearest_codes(used, codebook_KD, nearest), False)
            score.masked_fill_(far[row], 0)
        gain, index = score.max(1)
        gains.append(gain)
        best.append(index)
    return torch.cat(gains), torch.cat(best)


@torch.no_grad()
def nearest_codes(words_N: Tensor, codebook_KD: Tensor, count: int) -> Tensor:
    """Return the `count` other words whose codes are nearest (L2) to that of each word, nearest first: (N, count)."""
    neighbours = []
    for word in words_N.split(rows_at_once(codebook_KD)):
        score = nearness(codebook_KD[word], codebook_KD)
        score.scatter_(1, word[:, None], -torch.inf)
        neighbours.append(score.topk(min(count, len(codebook_KD) - 1), dim=1).indices)
    return torch.cat(neighbours)
