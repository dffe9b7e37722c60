"""Inspect an image: corrupt it or change some of its visual words, and compare a classifier's predictions.

`mae-dat explore` shows the result on a page. Images are (C, H, W) in [0, 1].
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
from mae_dat.attacks.discrete import DiscreteAdversary, discrete_adversary
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.errors import CheckpointError
from mae_dat.data.open import with_channels
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.weights.open import OpenedModel
from mae_dat.robustness.corruptions import as_stored, corrupt_image, image_seed
from mae_dat.robustness.corruptions.pixels import Image as Pixels
from mae_dat.runtime.seeds import step_generator
from mae_dat.training.galleries import adversary_columns

TOP = 5  # predictions of each view
AMPLIFICATIONS = (16, 8, 4, 2, 1)
IMAGENET_CLASSES = 1000

ClassShares = list[tuple[str, float]]
"""Class names with their probabilities, the most probable first."""


@dataclass(frozen=True)
class Change:
    """A change to an image: a corruption, or words changed at random or by the symbolic adversary."""

    kind: Literal["corruption", "random", "symbolic"] = "corruption"
    corruption: str = "gaussian_noise"
    severity: int = 3
    """Severity of the corruption, 1 to 5."""
    share: float = 0.05
    """Share of the words to change, in (0, 1)."""
    seed: int = 0
    """Seed of the corruption and of random words."""


class ImageView(NamedTuple):
    """A view of an image (C, H, W), with the classifier's first predictions; maps and differences have none."""

    title: str
    image: Tensor
    caption: str = ""
    predictions: Sequence[tuple[str, float]] = ()


class _Comparison(NamedTuple):
    """The image, its changed version and both decoded from their words, each (1, C, H, W) with a title; the change in
    pixels and words; and the baseline of the shown difference."""

    images: list[tuple[str, Tensor]]
    adversary: DiscreteAdversary
    baseline: str


class ImageInspector:
    """A classifier and a tokenizer that inspect one image after another."""

    def __init__(self, opened: OpenedModel, tokenizer: VisualTokenizer) -> None:
        """Raise CheckpointError for a pretraining, ConfigError if size or channels do not fit the tokenizer."""
        if opened.kind == "autoencoder":
            raise CheckpointError(
                f"{opened.title} is a pretraining and has no predictions: use a classifier. To see its "
                "reconstructions, run mae-dat visualize reconstruction."
            )
        self.opened, self.name, self.model = opened, opened.title, opened.classifier()
        self.size = opened.input_size
        self.tokenizer = tokenizer
        tokenizer.check(torch.zeros(1, opened.plan.in_chans, *opened.input_size))
        classes = opened.classes
        if not classes and self.model.net.num_classes == IMAGENET_CLASSES:
            imagenet = ImageNetInfo()
            classes = [imagenet.index_to_description(index) for index in range(IMAGENET_CLASSES)]
        self.scorer = ClassScorer(self.model, classes)
        self.crop = EvalTransform(opened.input_size)
        self.to_input = with_channels(functional.to_tensor, opened.plan.in_chans)
        self.device = tokenizer.codebook.device

    def inspect(self, image: Image.Image, path: Path, change: Change) -> list[ImageView]:
        """Return the image, its changed version, their difference, both decoded from their words, and a map of the
        changed words. For changed words, the changed version is already decoded, so only the image is decoded.

        The class of the image is the folder name of `path`, if the classifier has that class. Raises DataError for a
        size that cannot be corrupted.
        """
        if change.kind == "corruption":
            comparison = self._corrupt(image, change)
        else:
            comparison = self._change_words(image, path, change)
        predictions = self.predict([view for _, view in comparison.images])
        views = [
            ImageView(title, view[0], predictions=best)
            for (title, view), best in zip(comparison.images, predictions, strict=True)
        ]
        if path.parent.name in self.scorer.classes:
            views[0] = views[0]._replace(title=f"image ({path.parent.name})")
        adversary = comparison.adversary
        factor = amplification(adversary.adversarial - adversary.reconstruction)
        *_, (_, difference), (_, word_map) = adversary_columns(adversary.reconstruction, adversary, factor)
        scale = f"to {comparison.baseline}; gray: none, black and white: {127.5 / factor:.0f} gray levels or more"
        views.insert(2, ImageView(f"difference × {factor}", difference[0].clamp(0, 1), scale))
        changed, total = int((adversary.words != adversary.adversarial_words).sum()), adversary.words.numel()
        legend = f"dark: {changed} of {total} words ({changed / total:.1%})"
        return [*views, ImageView("changed words", word_map[0], legend)]

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[ClassShares]:
        """Return the first predictions for each of the images (1, C, H, W)."""
        probabilities = self.model(torch.cat(list(images))).float().softmax(1)
        best = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
        return [
            [(self.scorer.class_name(index), probability) for probability, index in zip(values, indices, strict=True)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _cropped_pixels(self, image: Image.Image) -> Pixels:
        """Crop an image as for evaluation, to uint8 (H, W, 3)."""
        pixels: Pixels = self.crop(image).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return pixels

    def _input(self, pixels: Pixels) -> Tensor:
        """Convert pixels to the model's input (1, C, H, W)."""
        return self.to_input(Image.fromarray(pixels)).unsqueeze(0).to(self.device)

    @torch.no_grad()
    def _corrupt(self, image: Image.Image, change: Change) -> _Comparison:
        pixels = self._cropped_pixels(image)
        clean = self._input(pixels)
        seed = image_seed(change.seed, 0, change.corruption, change.severity)
        # ImageNet-C's images are stored as JPEG, so this compression is part of the model's input.
        corrupted = self._input(as_stored(corrupt_image(pixels, change.corruption, change.severity, seed)))
        words, corrupted_words = self.tokenizer.encode(clean), self.tokenizer.encode(corrupted)
        title = f"{change.corruption.replace('_', ' ')} {change.severity}"
        images = [
            ("image", clean),
            (title, corrupted),
            ("image, decoded from its words", self.tokenizer.decode(words)),
            (f"{title}, decoded from its words", self.tokenizer.decode(corrupted_words)),
        ]
        return _Comparison(images, DiscreteAdversary(clean, corrupted, words, corrupted_words), "the image")

    def _change_words(self, image: Image.Image, path: Path, change: Change) -> _Comparison:
        assert change.kind != "corruption"
        clean = self._input(self._cropped_pixels(image))
        generator = step_generator(change.seed, 0, 0, self.device)
        target = self.scorer.context(clean, [path], generator)
        adversary = discrete_adversary(
            clean,
            lambda x: self.scorer.objective.loss(self.model, x, target),
            tokenizer=self.tokenizer,
            config=AttackConfig(change.kind, share=change.share),
            generator=generator,
        )
        images = [
            ("image", clean),
            (f"{change.share:.0%} of its words changed ({change.kind})", adversary.adversarial),
            ("image, decoded from its words", adversary.reconstruction),
        ]
        return _Comparison(images, adversary, "the decoded image")


def amplification(difference: Tensor) -> int:
    """Return the largest of 16, 8, 4, 2, 1 that clips at most 1 % of the values of a difference shown around gray."""
    values = difference.abs().flatten().float()
    large = float(values.kthvalue(max(1, math.ceil(0.99 * len(values)))).values)
    return next((factor for factor in AMPLIFICATIONS if factor * large <= 0.5), 1)


def prediction_change(views: Sequence[ImageView]) -> str:
    """Describe whether the first prediction for the changed image differs from the one for the image."""
    (before, before_probability), (after, after_probability) = views[0].predictions[0], views[1].predictions[0]
    if before == after:
        return f"The prediction stays: {before} {before_probability:.0%} → {after_probability:.0%}"
    return f"The prediction changes: {before} {before_probability:.0%} → {after} {after_probability:.0%}"
