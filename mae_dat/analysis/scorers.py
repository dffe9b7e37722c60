"""The network that pictures are made of: built and loaded from any checkpoint, and asked what it makes of an image."""

import logging
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

logger = logging.getLogger(__name__)


class Scorer(ABC):
    """The loss that an attack raises, and in words what the network makes of a view of the pictures."""

    objective: Objective

    @abstractmethod
    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> Any:
        """What the objective compares pictures (B, C, H, W) with."""

    @abstractmethod
    def verdicts(self, image: Tensor, context: Any) -> list[str]:
        """A few words on every picture."""


class ClassScorer(Scorer):
    """A classifier, with the class of the picture's folder as target where there is one, else its own answer."""

    def __init__(self, model: Classifier, classes: Sequence[str] | None) -> None:
        self.model, self.classes = model, list(classes or [])
        self.objective = Classification(AugmentConfig(smoothing=0), model.net.num_classes)  # type: ignore[arg-type]

    @torch.no_grad()
    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> Tensor:
        """Targets, one-hot (B, classes)."""
        logits = self.model(image)
        label = logits.argmax(1)
        for row, path in enumerate(paths):
            if path.parent.name in self.classes:
                label[row] = self.classes.index(path.parent.name)
        return F.one_hot(label, logits.shape[1]).float()

    @torch.no_grad()
    def verdicts(self, image: Tensor, context: Tensor) -> list[str]:
        """The answer and its probability; the target's too, where it is another."""
        shares = self.model(image).float().softmax(1)
        told = []
        for row, best, target in zip(shares, shares.argmax(1).tolist(), context.argmax(1).tolist(), strict=True):
            named = {best: "", target: "" if best == target else "target "}
            told.append("\n".join(f"{what}{self.name_of(index)} {row[index]:.0%}" for index, what in named.items()))
        return told

    def name_of(self, index: int) -> str:
        """A class in words."""
        return self.classes[index] if self.classes else f"class {index}"


class ReconstructionScorer(Scorer):
    """A masked autoencoder and its reconstruction loss; one mask for all views of a picture."""

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float, norm_pix: bool) -> None:
        self.model, self.norm_pix = model, norm_pix
        self.objective = MaskedReconstruction(mask_ratio, norm_pix)

    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The clean target patches and the mask's noise."""
        noise = mask_noise(len(image), self.model.num_patches, generator, image.device)
        return self.model.target(image, self.norm_pix), noise

    @torch.no_grad()
    def verdicts(self, image: Tensor, context: tuple[Tensor, Tensor]) -> list[str]:
        """The loss of each picture."""
        target, noise = context
        one_by_one = zip(image.split(1), zip(target.split(1), noise.split(1), strict=True), strict=True)
        return [f"loss {float(self.objective.loss(self.model, one, own)):.3f}" for one, own in one_by_one]
