"""The symbolic adversary: visual words chosen one by one by a first-order estimate (HotFlip, Ebrahimi et al. 2018).

The attack changes words, so its gradient passes through the tokenizer's *decoder* to the codes, never through its
encoder or the quantizer. Changing the word c at a place to k raises the loss by about (e_k - e_c) . g, where g is the
gradient at the code of that place. The best word is found for each place; the places with the largest gain are changed.
The estimate is good enough to find promising changes, not to rank them: `rescore` computes the loss of the best ones.

Shapes: words (B, h, w), int64; N is the number of places of all images, K the vocabulary, D the dimension of a code.
"""

import torch
from torch import Tensor

from mae_dat.attacks.gradient import LossFn, LossPerImage
from mae_dat.config.errors import ConfigError
from mae_dat.models.tokenizer.base import VisualTokenizer, exact_float32
from mae_dat.models.tokenizer.quantize import look_up, nearness, rows_at_once, straight_through

WORDS_PER_PLACE = 8
"""Words of a place that `rescore` considers at most, so that its candidates are spread over several places."""


def symbolic_words(
    words: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    count: int,
    steps: int = 1,
    nearest: int | None = None,
    free: Tensor | None = None,
    rescore: int = 0,
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
            words,
            free & (words == start),
            loss_fn,
            tokenizer=tokenizer,
            count=step_count,
            nearest=nearest,
            rescore=rescore,
        )
    return words


def change_words(
    words: Tensor,
    free: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    count: int,
    nearest: int | None = None,
    rescore: int = 0,
) -> Tensor:
    """Take one step: change the `count` best of the `free` places, bool (B, h, w), to their best words; (B, h, w).

    Only places with a positive gain are changed, so without a gradient no word changes. With `nearest`, a word changes
    only to one of the `nearest` codes closest to its own. `loss_fn` maps images (B, C, H, W) to a scalar in which every
    image has the same weight.

    With `rescore` above 0, `loss_fn` must be a `LossPerImage`: the `rescore` single changes of each image with the
    largest estimates are made one by one, and ranked by the loss that they reach. Raises ConfigError for another
    `loss_fn`.
    """
    if not count:
        return words
    if rescore and not isinstance(loss_fn, LossPerImage):
        raise ConfigError("rescoring needs the loss of each image: give a LossPerImage, or rescore=0.")
    gradient = code_gradient(words, loss_fn, tokenizer)
    per_place = min(WORDS_PER_PLACE, rescore) or 1
    gains, candidates = top_words(words.flatten(), gradient.flatten(0, 2), tokenizer.codebook, nearest, per_place)
    gains = gains.view(len(words), -1, gains.shape[1]).masked_fill(~free.flatten(1)[..., None], 0)
    candidates = candidates.view(gains.shape)
    if isinstance(loss_fn, LossPerImage) and rescore:
        gain, best = _rescored(words, loss_fn, tokenizer, gains, candidates, rescore)
    else:
        gain, best = gains[..., 0], candidates[..., 0]
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
def _rescored(
    words: Tensor, loss_fn: LossPerImage, tokenizer: VisualTokenizer, gains: Tensor, candidates: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return for each place the gain by which it is ranked, and its word: both (B, P) for P = h * w places.

    `gains` and `candidates`, (B, P, m), are the estimates of m words of each place. The `count` largest of an image are
    replaced by the exact rise of its loss. Places with such a rise come before places with an estimate only; places
    where the loss does not rise gain 0.
    """
    _, places, per_place = gains.shape
    estimates, chosen = gains.flatten(1).topk(min(count, places * per_place), dim=1)
    flat, place, word = words.flatten(1), chosen // per_place, candidates.flatten(1).gather(1, chosen)
    start = loss_fn.each(tokenizer.decode(words))
    rises = torch.zeros_like(estimates)
    for number in range(chosen.shape[1]):
        at = place[:, number : number + 1]
        changed = flat.scatter(1, at, word[:, number : number + 1]).view_as(words)
        rises[:, number] = loss_fn.each(tokenizer.decode(changed)) - start
    rises = rises.where(estimates > 0, 0)  # a place that is not free, or gains nothing, has no candidate
    # In rising order, so that the best candidate of a place is written last.
    order = rises.argsort(1)
    place, word, rises = (values.gather(1, order) for values in (place, word, rises))
    gain, best = gains[..., 0] / gains.amax((1, 2), keepdim=True)[..., 0].clamp(min=1e-30), candidates[..., 0].clone()
    for number in range(place.shape[1]):
        at = place[:, number : number + 1]
        rise = rises[:, number : number + 1]
        gain.scatter_(1, at, torch.where(rise > 0, 2.0 + number, 0.0))
        best.scatter_(1, at, word[:, number : number + 1])
    return gain, best


@torch.no_grad()
def top_words(
    words_N: Tensor, gradient_ND: Tensor, codebook_KD: Tensor, nearest: int | None = None, count: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `count` largest (e_k - e_c) . g of every place, not below 0, and their words k: both (N, count)."""
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
        gain, index = score.topk(min(count, score.shape[1]), dim=1)
        gains.append(gain)
        best.append(index)
    return torch.cat(gains), torch.cat(best)


@torch.no_grad()
def nearest_codes(words_N: Tensor, codebook_KD: Tensor, count: int) -> Tensor:
    """Return the `count` other words whose codes are nearest (L2) to that of each word, nearest first: (N, count)."""
    neighbors = []
    for word in words_N.split(rows_at_once(codebook_KD)):
        score = nearness(codebook_KD[word], codebook_KD)
        score.scatter_(1, word[:, None], -torch.inf)
        neighbors.append(score.topk(min(count, len(codebook_KD) - 1), dim=1).indices)
    return torch.cat(neighbors)
