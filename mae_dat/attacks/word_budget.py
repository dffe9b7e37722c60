"""Accuracy when up to k % of the visual words are changed: by the symbolic adversary, or at random as its control.

This is a threat model of its own: the adversary cannot touch pixels. It replaces words of the tokenizer, and the model
sees the image decoded from them. Share 0 is the reconstruction, with no word changed.

Budgets are nested: words changed at one share stay changed at the next, larger one. An image counts as correct at a
share if the model was right there and at every smaller share, because *up to* k % includes fewer. So accuracy never
rises with the share, and images that are already misclassified are not attacked any further.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.attacks.discrete import image_generator, other_words
from mae_dat.attacks.gradient import LossPerImage, require_pixels
from mae_dat.attacks.symbolic import symbolic_words
from mae_dat.config.errors import ConfigError, NumericsError
from mae_dat.models.tokenizer.base import VisualTokenizer

WORD_ATTACK_KINDS = ("symbolic", "random")
WORD_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class WordAttack:
    """Settings of the attack: budgets, steps and vocabulary."""

    shares: tuple[float, ...] = WORD_SHARES
    """Budgets as shares of an image's words, in rising order from 0."""
    steps: int = 2
    """Gradient steps of the symbolic adversary from one share to the next."""
    nearest: int | None = None
    """A word changes only to one of the `nearest` codes closest to its own (None: to any word)."""
    rescore: int = 0
    """Candidates of each step and image whose loss the symbolic adversary computes exactly."""
    seed: int = 0
    """Seed of the random words."""

    def __post_init__(self) -> None:
        if self.shares[:1] != (0.0,) or any(a >= b for a, b in pairwise(self.shares)) or self.shares[-1] > 1:
            raise ConfigError(f"shares of words must start at 0 and rise to at most 1, got {self.shares}.")
        if self.steps < 1 or self.rescore < 0 or (self.nearest is not None and self.nearest < 1):
            raise ConfigError(f"a word attack needs rescore >= 0, steps >= 1 and nearest >= 1, got {self}.")

    def budgets(self, places: int) -> list[int]:
        """Return the number of words that each share allows in an image of `places` words.

        Raises ConfigError if two shares give the same number.
        """
        counts = [round(share * places) for share in self.shares]
        if len(set(counts)) < len(counts):
            raise ConfigError(
                f"the shares {self.shares} of {places} words per image are {counts} words: remove shares that give the "
                "same number of words."
            )
        return counts


@torch.no_grad()
def word_hits(
    model: nn.Module,
    tokenizer: VisualTokenizer,
    image: Tensor,
    label: Tensor,
    index: Tensor,
    kind: str,
    attack: WordAttack,
) -> Tensor:
    """Return whether the model is right about each image up to each share: bool (shares, B).

    `image` (B, C, H, W) in [0, 1], `label` (B,). `index` (B,), on the CPU, seeds the random words together with
    `attack.seed`, so they do not depend on the batch.
    """
    require_pixels(image)
    with torch.autocast(image.device.type, enabled=False):
        start = tokenizer.encode(image.float())
        budgets = attack.budgets(start[0].numel())
        order, other = _random_changes(start, tokenizer, index, attack) if kind == "random" else (start, start)
        words, right = start.clone(), _is_right(model, tokenizer, start, label)
        hits = [right]
        for previous, budget in pairwise(budgets):
            rows = right.nonzero()[:, 0]  # images that still resist
            if kind == "random":
                words[rows] = _with_changes(words[rows], order[rows, previous:budget], other[rows])
            elif len(rows):
                words[rows] = symbolic_words(
                    words[rows],
                    _loss_per_image(model, label[rows]),
                    tokenizer,
                    count=budget - previous,
                    steps=attack.steps,
                    nearest=attack.nearest,
                    free=words[rows] == start[rows],
                    rescore=attack.rescore,
                )
            right = right.clone()
            right[rows] = _is_right(model, tokenizer, words[rows], label[rows])
            hits.append(right)
    return torch.stack(hits)


def _loss_per_image(model: nn.Module, label: Tensor) -> LossPerImage:
    return LossPerImage(lambda view: F.cross_entropy(model(view).float(), label, reduction="none"))


def _is_right(model: nn.Module, tokenizer: VisualTokenizer, words: Tensor, label: Tensor) -> Tensor:
    """Return whether the model predicts `label` (B,) from the decoded words (B, h, w): bool (B,)."""
    if not len(words):
        return torch.zeros_like(label, dtype=torch.bool)
    logits = model(tokenizer.decode(words))
    if not logits.isfinite().all():
        raise NumericsError(
            "the model returned NaN or infinite logits: its weights are damaged, or its arithmetic overflows."
        )
    return logits.argmax(1) == label


def _random_changes(
    words: Tensor, tokenizer: VisualTokenizer, index: Tensor, attack: WordAttack
) -> tuple[Tensor, Tensor]:
    """Return each image's places in random order and another word for each place, both (B, h * w)."""
    order, other = [], []
    codebook = tokenizer.codebook.cpu()
    for image_words, image_index in zip(words.flatten(1).cpu(), index.tolist(), strict=True):
        generator = image_generator(attack.seed, image_index)
        order.append(torch.randperm(len(image_words), generator=generator))
        other.append(other_words(image_words, codebook, generator, attack.nearest))
    return torch.stack(order).to(words.device), torch.stack(other).to(words.device)


def _with_changes(words: Tensor, places: Tensor, other: Tensor) -> Tensor:
    """Replace the words (B, h, w) at `places` (B, n) by those of `other` (B, h * w)."""
    return words.flatten(1).scatter(1, places, other.gather(1, places)).view_as(words)
