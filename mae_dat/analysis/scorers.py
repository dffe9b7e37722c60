"""Score images for an attack and for captions: with a classifier by its prediction, with an autoencoder by its loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.config.groups import AugmentConfig
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MaskedAutoencoder, mask_noise
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.reconstruction import MaskedReconstruction


class Scorer(ABC):
    """The objective that an attack raises, and captions for a model's output on views of the same images."""

    objective: Objective

    @abstractmethod
    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> Any:
        """Return what the objective needs besides images (B, C, H, W): targets of the clean images and a mask."""

    @abstractmethod
    def captions(self, image: Tensor, context: Any) -> list[str]:
        """Describe the model's output on each image of a view (B, C, H, W)."""


class ClassScorer(Scorer):
    """Score by a classifier; the target is the class that an image's folder names, else the model's prediction."""

    def __init__(self, model: Classifier, classes: Sequence[str] | None) -> None:
        self.model, self.classes = model, list(classes or [])
        self.objective = Classification(AugmentConfig(smoothing=0), model.net.num_classes)  # type: ignore[arg-type]

    @torch.no_grad()
    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> Tensor:
        """Return the targets, one-hot (B, K)."""
        logits = self.model(image)
        label = logits.argmax(1)
        for row, path in enumerate(paths):
            if path.parent.name in self.classes:
                label[row] = self.classes.index(path.parent.name)
        return F.one_hot(label, logits.shape[1]).float()

    @torch.no_grad()
    def captions(self, image: Tensor, context: Tensor) -> list[str]:
        """Return the predicted class and its probability, and those of the target if it is another class."""
        probabilities = self.model(image).float().softmax(1)
        captions = []
        for row, predicted, target in zip(
            probabilities, probabilities.argmax(1).tolist(), context.argmax(1).tolist(), strict=True
        ):
            lines = [f"{self.class_name(predicted)} {row[predicted]:.0%}"]
            if target != predicted:
                lines.append(f"target {self.class_name(target)} {row[target]:.0%}")
            captions.append("\n".join(lines))
        return captions

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its number if names are unknown."""
        return self.classes[index] if self.classes else f"class {index}"


class ReconstructionScorer(Scorer):
    """Score by a masked autoencoder's reconstruction loss, with the same mask for all views of an image."""

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float, norm_pix: bool) -> None:
        self.model, self.norm_pix = model, norm_pix
        self.objective = MaskedReconstruction(mask_ratio, norm_pix)

    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the target patches of the clean images (B, N, P) and the noise that draws the mask (B, N)."""
        noise = mask_noise(len(image), self.model.num_patches, generator, image.device)
        return self.model.target(image, self.norm_pix), noise

    @torch.no_grad()
    def captions(self, image: Tensor, context: tuple[Tensor, Tensor]) -> list[str]:
        """Return the loss of each image."""
        target, noise = context
        losses = [
            self.objective.loss(self.model, single_image, (single_target, single_noise))
            for single_image, single_target, single_noise in zip(
                image.split(1), target.split(1), noise.split(1), strict=True
            )
        ]
        return [f"loss {float(loss):.3f}" for loss in losses]
