"""The symbolic adversary: visual words chosen one by one, to first order (HotFlip, Ebrahimi et al. 2018).

The words are what is attacked, so the gradient passes through the tokenizer's *decoder* to the codes, and never through
its encoder or the quantizer. Changing the word c of a place into k raises the loss by about (e_k - e_c) . g, where g is
the gradient at that place's code: of all words the best for each place, of all places those that gain most.

Shapes: words (B, h, w); N is the places of all pictures, K the vocabulary, D the dimension of a code.
"""

import torch
from torch import Tensor

from mae_dat.attacks.gradient import LossFn
from mae_dat.models.tokenizer.base import VisualTokenizer, exact_float32
from mae_dat.models.tokenizer.quantize import look_up, nearness, rows_at_once, straight_through


def symbolic_words(
    words: Tensor,
    loss_of: LossFn,
    tokenizer: VisualTokenizer,
    count: int,
    steps: int = 1,
    nearest: int | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Words of which at most `count` a picture differ, chosen in so many gradient steps to raise `loss_of`.

    `free`, bool (B, h, w), are the places where a word may change (None: all).
    """
    start = words
    free = torch.ones_like(words, dtype=torch.bool) if free is None else free
    for step in range(steps):
        more = count * (step + 1) // steps - count * step // steps
        words = change_words(words, free & (words == start), loss_of, tokenizer, more, nearest)
    return words


def change_words(
    words: Tensor, free: Tensor, loss_of: LossFn, tokenizer: VisualTokenizer, count: int, nearest: int | None = None
) -> Tensor:
    """One step: the `count` best places among those that are `free`, bool (B, h, w), each with its best word.

    Fewer where fewer gain anything: without a gradient no word changes. With `nearest` a word becomes one of the codes
    nearest to its own. `loss_of` maps images (B, C, H, W) to a scalar in which every picture has the same weight.
    """
    gradient = code_gradient(words, loss_of, tokenizer)
    gain, best = best_words(words.flatten(), gradient.flatten(0, 2), tokenizer.codebook, nearest)
    gain = gain.view(len(words), -1).masked_fill(~free.flatten(1), 0)
    most, places = gain.topk(min(count, gain.shape[1]), dim=1)
    flat = words.flatten(1)
    chosen = torch.where(most > 0, best.view_as(flat).gather(1, places), flat.gather(1, places))
    return flat.scatter(1, places, chosen).view_as(words)


def code_gradient(words: Tensor, loss_of: LossFn, tokenizer: VisualTokenizer) -> Tensor:
    """dL/de at the code of every place, (B, h, w, D), through the decoder; it runs in float32."""
    with torch.enable_grad(), exact_float32():
        codes = look_up(words, tokenizer.codebook).detach().requires_grad_()
        with torch.autocast(words.device.type, enabled=False):
            pixels = tokenizer.pixels(codes)
        # A word that darkens a white pixel would not be seen through the clamp.
        (gradient,) = torch.autograd.grad(loss_of(straight_through(pixels, pixels.clamp(0, 1))), codes)
    return gradient.permute(0, 2, 3, 1).float()


@torch.no_grad()
def best_words(
    words_N: Tensor, gradient_ND: Tensor, codebook_KD: Tensor, nearest: int | None = None
) -> tuple[Tensor, Tensor]:
    """For every place the largest (e_k - e_c) . g, 0 where nothing is gained, and its word k: (N,) and (N,)."""
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
    """The `count` other words whose codes are nearest in L2 to those of the given ones, nearest first: (N, count)."""
    found = []
    for word in words_N.split(rows_at_once(codebook_KD)):
        score = nearness(codebook_KD[word], codebook_KD)
        score.scatter_(1, word[:, None], -torch.inf)
        found.append(score.topk(min(count, len(codebook_KD) - 1), dim=1).indices)
    return torch.cat(found)
