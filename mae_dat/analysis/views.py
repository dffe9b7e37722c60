"""One picture, corrupted or with some of its visual words changed, and what a classifier answers before and after.

What `python -m mae_dat explore` shows, without the page. Pictures are (C, H, W) in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.transforms import functional

from mae_dat.analysis.scorers import ClassScorer
from mae_dat.attacks.discrete import AttackConfig, DiscreteAdversary, discrete_adversary
from mae_dat.config.errors import CheckpointError
from mae_dat.data.open import with_channels
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.weights.open import OpenedModel
from mae_dat.robustness.corruptions import as_stored, corrupt, image_seed
from mae_dat.robustness.corruptions.pixels import Image as Pixels
from mae_dat.runtime.seeds import step_generator
from mae_dat.training.galleries import adversary_columns

TOP = 5  # answers of each view
AMPLIFICATIONS = (16, 8, 4, 2, 1)
IMAGENET_CLASSES = 1000

Predictions = list[tuple[str, float]]


@dataclass(frozen=True)
class Change:
    """What is done to a picture: a corruption, or words changed at random or by the symbolic adversary."""

    kind: Literal["corruption", "random", "symbolic"] = "corruption"
    corruption: str = "gaussian_noise"
    severity: int = 3
    """Of the corruption, 1 to 5."""
    share: float = 0.05
    """Of the words, in (0, 1)."""
    seed: int = 0
    """Of the corruption and of random words."""


class ImageView(NamedTuple):
    """A view of the picture, with the classifier's first answers and their probabilities; a map has none."""

    title: str
    picture: Tensor
    caption: str = ""
    answers: Sequence[tuple[str, float]] = ()


class Views(NamedTuple):
    """Titled pictures (1, C, H, W): the picture, the changed one, and what their words decode to; the change in pixels
    and words; and what the difference is to."""

    shown: list[tuple[str, Tensor]]
    found: DiscreteAdversary
    baseline: str


class ImageInspector:
    """A classifier and a tokenizer, asked about one picture after the other."""

    def __init__(self, opened: OpenedModel, tokenizer: VisualTokenizer) -> None:
        """Raises CheckpointError for a pretraining, ConfigError where size or channels do not fit the tokenizer."""
        if opened.kind == "autoencoder":
            raise CheckpointError(
                f"{opened.title} is a pretraining and has no answers: give a classifier. What it reconstructs is drawn "
                "by python -m mae_dat visualize reconstruction."
            )
        self.name, self.model, self.size, self.tokenizer = (
            opened.title,
            opened.classifier(),
            opened.input_size,
            tokenizer,
        )
        tokenizer.check(torch.zeros(1, opened.plan.in_chans, *opened.input_size))
        classes = opened.classes
        if not classes and self.model.net.num_classes == IMAGENET_CLASSES:
            named = ImageNetInfo()
            classes = [named.index_to_description(index) for index in range(IMAGENET_CLASSES)]
        self.judge = ClassScorer(self.model, classes)
        self.crop = EvalTransform(opened.input_size)
        self.to_pixels = with_channels(functional.to_tensor, opened.plan.in_chans)
        self.device = tokenizer.codebook.device

    def panels(self, image: Image.Image, path: Path, change: Change) -> list[ImageView]:
        """The picture, the changed one and their difference; what they look like decoded from their words, and which
        words changed.

        The folder of `path` names the picture's class, if it is one of the classifier's. Raises DataError for a size
        that cannot be corrupted.
        """
        views = self._corrupted(image, change) if change.kind == "corruption" else self._reworded(image, path, change)
        answers = self.answers([picture for _, picture in views.shown])
        panels = [
            ImageView(title, picture[0], answers=own)
            for (title, picture), own in zip(views.shown, answers, strict=True)
        ]
        if path.parent.name in self.judge.classes:
            panels[0] = panels[0]._replace(title=f"picture ({path.parent.name})")
        factor = amplification(views.found.adversarial - views.found.reconstruction)
        *_, (_, difference), (_, marked) = adversary_columns(views.found.reconstruction, views.found, factor)
        scale = f"to {views.baseline}; grey: none, black and white: {127.5 / factor:.0f} grey levels or more"
        panels.insert(2, ImageView(f"difference × {factor}", difference[0].clamp(0, 1), scale))
        flips, total = int((views.found.words != views.found.adversarial_words).sum()), views.found.words.numel()
        return [*panels, ImageView("changed words", marked[0], f"dark: {flips} of {total} words ({flips / total:.1%})")]

    @torch.no_grad()
    def answers(self, pictures: Sequence[Tensor]) -> list[Predictions]:
        """The first answers and their probabilities to each of the pictures (1, C, H, W)."""
        shares = self.model(torch.cat(list(pictures))).float().softmax(1)
        best = shares.topk(min(TOP, shares.shape[1]), dim=1)
        return [
            [(self.judge.name_of(index), share) for share, index in zip(values, indices, strict=True)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _pixels(self, image: Image.Image) -> Pixels:
        """The crop that the network gets, uint8 (H, W, 3)."""
        pixels: Pixels = self.crop(image).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return pixels

    def _given(self, pixels: Pixels) -> Tensor:
        """The same as the network gets it, (1, C, H, W)."""
        return self.to_pixels(Image.fromarray(pixels)).unsqueeze(0).to(self.device)

    @torch.no_grad()
    def _corrupted(self, image: Image.Image, change: Change) -> Views:
        pixels = self._pixels(image)
        clean = self._given(pixels)
        seed = image_seed(change.seed, 0, change.corruption, change.severity)
        # ImageNet-C's pictures are stored as JPEG, which is a part of what they do to a network.
        corrupted = self._given(as_stored(corrupt(pixels, change.corruption, change.severity, seed)))
        words, corrupted_words = self.tokenizer.encode(clean), self.tokenizer.encode(corrupted)
        title = f"{change.corruption.replace('_', ' ')} {change.severity}"
        shown = [
            ("picture", clean),
            (title, corrupted),
            ("picture, decoded from its words", self.tokenizer.decode(words)),
            (f"{title}, decoded from its words", self.tokenizer.decode(corrupted_words)),
        ]
        return Views(shown, DiscreteAdversary(clean, corrupted, words, corrupted_words), "the picture")

    def _reworded(self, image: Image.Image, path: Path, change: Change) -> Views:
        assert change.kind != "corruption"
        clean = self._given(self._pixels(image))
        generator = step_generator(change.seed, 0, 0, self.device)
        target = self.judge.context(clean, [path], generator)
        found = discrete_adversary(
            clean,
            lambda x: self.judge.objective.loss(self.model, x, target),
            self.tokenizer,
            AttackConfig(change.kind, share=change.share),
            generator,
        )
        shown = [
            ("picture", clean),
            (f"{change.share:.0%} of its words changed ({change.kind})", found.adversarial),
            ("picture, decoded from its words", found.reconstruction),
        ]
        return Views(shown, found, "the decoded picture")


def amplification(difference: Tensor) -> int:
    """The largest of 16, 8, 4, 2, 1 by which at most one value in a hundred leaves the range that can be shown."""
    values = difference.abs().flatten().float()
    large = float(values.kthvalue(max(1, math.ceil(0.99 * len(values)))).values)
    return next((factor for factor in AMPLIFICATIONS if factor * large <= 0.5), 1)


def prediction_change(panels: Sequence[ImageView]) -> str:
    """Whether the first answer to the changed picture is another one, in words."""
    (before, share), (after, later) = panels[0].answers[0], panels[1].answers[0]
    if before == after:
        return f"The answer stays: {before} {share:.0%} → {later:.0%}"
    return f"The answer changes: {before} {share:.0%} → {after} {later:.0%}"
