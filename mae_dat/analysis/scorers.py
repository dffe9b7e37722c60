"""The network that pictures are made of: built and loaded from any checkpoint, and asked what it makes of an image."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.groups import AugmentConfig, image_size
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MaskedAutoencoder, mask_noise
from mae_dat.models.weights.open import open_source
from mae_dat.training import run
from mae_dat.training.objectives.base import Classification, MaskedReconstruction, Objective

logger = logging.getLogger(__name__)

Size = tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, what to call it, what its file says about itself, and the pictures it takes:
    height and width in pixels, and channels."""

    model: Classifier | MaskedAutoencoder
    name: str
    facts: dict[str, Any]
    size: Size
    in_chans: int
    decoder: bool

    def autoencoder(self) -> MaskedAutoencoder:
        """The network, if it can reconstruct. Raises CheckpointError otherwise."""
        if not isinstance(self.model, MaskedAutoencoder):
            raise CheckpointError(f"{self.name} is a classifier and reconstructs nothing: give a pretraining.")
        if not self.decoder:
            raise CheckpointError(
                f"{self.name} has no decoder, without which nothing is reconstructed: MAE's mae_pretrain_* files hold "
                "the encoder alone. Give one with decoder, such as mae_visualize_vit_large.pth or a pretraining of "
                "yours; the encoder's attention can be drawn."
            )
        return self.model


def load_subject(
    checkpoint: str, name: str | None, input_size: tuple[int, ...] | None, device: torch.device
) -> Subject:
    """The network of an output folder, of a weights file or of released weights.

    `name` is the architecture and `input_size` the pictures' where the file does not say, or others are wanted. Raises
    ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    if not checkpoint:
        raise ConfigError("--checkpoint is missing: give an output folder, a weights file or a released name.")
    weights, facts = run.read_export(Path(checkpoint))
    told = weights._replace(metadata={"mae_dat": json.dumps(facts)}) if facts else weights
    with run.naming("--checkpoint"):
        opened = open_source(told, name, image_size(input_size) if input_size else None)
    plan, model = opened.plan, opened.network
    height, width = plan.img_size or resolve_model_data_config(model.net)["input_size"][-2:]
    title = f"{Path(checkpoint).name} ({plan.name})"
    return Subject(model.to(device), title, facts, (height, width), plan.in_chans, plan.decoder)


def predicts_normalized(subject: Subject, asked: bool | None) -> bool:
    """Whether an autoencoder predicts normalized patches: as asked, else as its file says, else not, with a warning."""
    if asked is None and "norm_pix_loss" not in subject.facts:
        logger.warning(
            "%s does not say whether it was trained with --norm_pix_loss; taken as False. If its reconstructions are "
            "grey, give --norm_pix_loss True.",
            subject.name,
        )
    return bool(subject.facts.get("norm_pix_loss", False) if asked is None else asked)


class Judge(ABC):
    """The loss that an attack raises, and in words what the network makes of a view of the pictures."""

    objective: Objective

    @abstractmethod
    def context(self, image: Tensor, paths: Sequence[Path], generator: torch.Generator) -> Any:
        """What the objective compares pictures (B, C, H, W) with."""

    @abstractmethod
    def verdicts(self, image: Tensor, context: Any) -> list[str]:
        """A few words on every picture."""


class ClassJudge(Judge):
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


class ReconstructionJudge(Judge):
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
