"""Accuracy when up to k % of the visual words are changed: by the symbolic adversary, or, as its control, at random.

A threat model of its own: the adversary may not touch pixels, only replace words of the tokenizer, and what the network
sees is decoded from them. Share 0 is the reconstruction, no word changed.

Budgets are nested: the words changed at one share stay changed at the next, which adds to them. A picture counts as
right at a share if the network was right there and at every smaller one of the curve, for *up to* k % includes fewer.
So no curve rises. Pictures that are lost already are not attacked any further.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.attacks.discrete import image_generator, other_words
from mae_dat.attacks.gradient import require_pixels
from mae_dat.attacks.symbolic import symbolic_words
from mae_dat.config.errors import ConfigError, DataError, NumericsError
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.runtime.collectives import all_sum

WORD_ATTACK_KINDS = ("symbolic", "random")
WORD_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)

WordCurve = dict[str, dict[str, int]]
"""Share as text (JSON keys are text) -> `correct` of `total` pictures."""


@dataclass(frozen=True)
class WordAttack:
    """What is measured, and how hard the adversary tries."""

    shares: tuple[float, ...] = WORD_SHARES
    """Budgets, rising from 0: shares of a picture's words."""
    steps: int = 2
    """Gradients that the symbolic adversary takes from one share to the next."""
    nearest: int | None = None
    """A word becomes one of so many whose codes are nearest to its own (None: any word)."""
    seed: int = 0
    """Of the random words."""

    def __post_init__(self) -> None:
        if self.shares[:1] != (0.0,) or any(a >= b for a, b in pairwise(self.shares)) or self.shares[-1] > 1:
            raise ConfigError(f"shares of words must begin with 0, rise and end at 1 at most, got {self.shares}.")
        if self.steps < 1 or (self.nearest is not None and self.nearest < 1):
            raise ConfigError(f"a word attack needs steps >= 1 and nearest >= 1, got {self}.")

    def budgets(self, places: int) -> list[int]:
        """Words of a picture with so many that each share allows. Raises ConfigError where two shares are one."""
        counts = [round(share * places) for share in self.shares]
        if len(set(counts)) < len(counts):
            raise ConfigError(
                f"the shares {self.shares} of {places} words a picture are {counts} words: leave out those that are "
                "the same."
            )
        return counts


@torch.no_grad()
def word_accuracy(
    model: nn.Module,
    tokenizer: VisualTokenizer,
    batches: Iterable[Batch],
    attack: WordAttack,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = all_sum,
) -> dict[str, WordCurve]:
    """The curve of each kind, from integer counts; `reduce` sums them over ranks, each with its own pictures.

    The model runs in evaluation mode and gets its flags back. Pictures that stand in for unreadable ones (`skipped`)
    are not counted. Raises DataError when none is left, ConfigError (size, shares), NumericsError (NaN or
    infinite logits).
    """
    counts = torch.zeros(len(WORD_ATTACK_KINDS) + 1, len(attack.shares), dtype=torch.int64, device=device)
    with evaluation_mode(model):
        for batch in batches:
            own = batch["skipped"] == 0
            image, label, index = batch["image"][own].to(device), batch["label"][own].to(device), batch["index"][own]
            for row, kind in enumerate(WORD_ATTACK_KINDS if len(image) else ()):
                counts[row] += word_hits(model, tokenizer, image, label, index, kind, attack).sum(1)
            counts[-1] += len(image)
    *correct, total = reduce(counts).tolist()
    if not total[0]:
        raise DataError("no image to attack could be read: check the validation folder.")
    shares = [f"{share:g}" for share in attack.shares]
    return {
        kind: {share: {"correct": hits, "total": total[0]} for share, hits in zip(shares, row, strict=True)}
        for kind, row in zip(WORD_ATTACK_KINDS, correct, strict=True)
    }


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
    """Whether each picture is right up to each share: bool (shares, B). Random words depend on (seed, index) alone."""
    require_pixels(image)
    with torch.autocast(image.device.type, enabled=False):
        start = tokenizer.encode(image.float())
        budgets = attack.budgets(start[0].numel())
        order, other = _random_changes(start, tokenizer, index, attack) if kind == "random" else (start, start)
        words, right = start.clone(), _right(model, tokenizer, start, label)
        hits = [right]
        for before, budget in pairwise(budgets):
            left = right.nonzero()[:, 0]
            if kind == "random":
                places = order[left, before:budget]
                changed = words[left].flatten(1).scatter(1, places, other[left].gather(1, places))
                words[left] = changed.view_as(words[left])
            elif len(left):
                target = label[left]

                def loss_of(view: Tensor, target: Tensor = target) -> Tensor:
                    return F.cross_entropy(model(view).float(), target, reduction="sum")

                free, more = words[left] == start[left], budget - before
                words[left] = symbolic_words(words[left], loss_of, tokenizer, more, attack.steps, attack.nearest, free)
            right = right.clone()
            right[left] = _right(model, tokenizer, words[left], label[left])
            hits.append(right)
    return torch.stack(hits)


def _right(model: nn.Module, tokenizer: VisualTokenizer, words: Tensor, label: Tensor) -> Tensor:
    if not len(words):
        return torch.zeros_like(label, dtype=torch.bool)
    logits = model(tokenizer.decode(words))
    if not logits.isfinite().all():
        raise NumericsError(
            "the model gave NaN or infinite logits: its weights are damaged, or its arithmetic overflows."
        )
    return logits.argmax(1) == label


def _random_changes(
    words: Tensor, tokenizer: VisualTokenizer, index: Tensor, attack: WordAttack
) -> tuple[Tensor, Tensor]:
    """For every picture its places in random order and another word for each of them, (B, h * w) both."""
    order, other = [], []
    codebook = tokenizer.codebook.cpu()
    for word, one in zip(words.flatten(1).cpu(), index.tolist(), strict=True):
        generator = image_generator(attack.seed, one)
        order.append(torch.randperm(len(word), generator=generator))
        other.append(other_words(word, codebook, generator, attack.nearest))
    return torch.stack(order).to(words.device), torch.stack(other).to(words.device)
