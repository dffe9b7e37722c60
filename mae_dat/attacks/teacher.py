"""The classifier that stored adversaries are made against, at any image size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.attacks.gradient import LossPerImage
from mae_dat.config.groups import ImageSize
from mae_dat.models.classifier import Classifier


class Teacher:
    """Predicts whole images of any size with a classifier of a fixed size.

    An image is resized until its crops of the classifier's size are as large as possible; the fewest crops that cover
    it are predicted, and their losses or probabilities averaged.
    """

    def __init__(self, model: Classifier, size_HW: ImageSize) -> None:
        self.model, self.size_HW = model, size_HW

    def loss(self, label: Tensor) -> LossPerImage:
        """Return a function from images (B, C, H, W) in [0, 1] to their cross-entropy with labels (B,)."""

        def each(image: Tensor) -> Tensor:
            crops = self.covering_crops(image)
            logits = self.model(crops.flatten(0, 1)).float()
            loss = F.cross_entropy(logits, label.repeat(len(crops)), reduction="none")
            return loss.view(len(crops), -1).mean(0)

        return LossPerImage(each)

    @torch.no_grad()
    def predict(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss (B,) of images (B, C, H, W), and whether the mean probabilities are right, bool (B,)."""
        crops = self.covering_crops(image)
        logits = self.model(crops.flatten(0, 1)).float().view(len(crops), len(image), -1)
        loss = torch.stack([F.cross_entropy(view, label, reduction="none") for view in logits]).mean(0)
        return loss, logits.softmax(-1).mean(0).argmax(-1) == label

    def covering_crops(self, image: Tensor) -> Tensor:
        """Return the fewest crops that cover images (B, C, H, W), evenly spaced, (V, B, C, h, w)."""
        height, width = self.size_HW
        scale = max(height / image.shape[-2], width / image.shape[-1])
        resized = (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale)))
        if resized != tuple(image.shape[-2:]):
            image = F.interpolate(image, resized, mode="bilinear", antialias=True)
        tops, lefts = _starts(resized[0], height), _starts(resized[1], width)
        return torch.stack([image[..., top : top + height, left : left + width] for top in tops for left in lefts])


def _starts(length: int, size: int) -> list[int]:
    """Return where the fewest evenly spaced parts of `size` start that cover `length`."""
    count = math.ceil(length / size)
    return [round(index * (length - size) / max(1, count - 1)) for index in range(count)]
