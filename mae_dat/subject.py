"""The network that pictures are made of: built and loaded from any checkpoint, and asked what it makes of an image."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat import run
from mae_dat.classifier import Classifier
from mae_dat.config import AugmentConfig, ClassifierConfig, DataConfig, FinetuneConfig, image_size
from mae_dat.errors import CheckpointError, ConfigError
from mae_dat.finetune import load_classifier
from mae_dat.formats import Recognized, recognize
from mae_dat.loading import load_mae, size_of
from mae_dat.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder, build_mae, mask_noise, unknown_name
from mae_dat.objectives import Classification, MaskedReconstruction, Objective

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


def load_subject(
    checkpoint: str, name: str | None, input_size: tuple[int, ...] | None, device: torch.device, decoder: bool = True
) -> Subject:
    """The network of an output folder or a weights file. Without `decoder` an autoencoder's encoder is enough.

    `name` is the architecture and `input_size` the pictures' where the file does not say, or others are wanted. Raises
    ConfigError where the architecture is not known, MissingInputError, CheckpointError.
    """
    if not checkpoint:
        raise ConfigError("--checkpoint is missing: give an output folder or a weights file.")
    weights, facts = run.read_export(Path(checkpoint))
    found = recognize(weights)
    name = name or facts.get("model") or _architecture(found)
    if name is None:
        raise ConfigError(
            f"{checkpoint} ({found.format}) does not say which model it is: give --model, such as "
            "mae_vit_base_patch16 (an autoencoder), vit_base_patch16 (a classifier) or any timm name."
        )
    if name not in MAE_MODELS and name not in VIT_SIZES and not timm.is_model(name):
        raise unknown_name("--model", name, [*MAE_MODELS, *VIT_SIZES, *timm.list_models()])
    asked, in_chans = input_size or facts.get("input_size") or _default_size(name), facts.get("in_chans", 3)
    size = image_size(tuple(asked))
    model: MaskedAutoencoder | Classifier
    if name in MAE_MODELS:
        model = build_mae(name, img_size=size, in_chans=in_chans)
        with run.naming("--checkpoint"):
            load_mae(model, weights, decoder=decoder)
    else:
        pooled = facts.get("global_pool", "fc_norm.weight" in found.tensors) and not facts.get("cls_token", False)
        classes = facts.get("nb_classes") or _classes_of(name, found)
        classifier = ClassifierConfig(model=name, nb_classes=classes, global_pool=pooled, drop_path=0.0)
        data = DataConfig(input_size=size, in_chans=in_chans)
        model = load_classifier(Path(checkpoint), FinetuneConfig(classifier=classifier, data=data), [])
    return Subject(model.eval().to(device), f"{Path(checkpoint).name} ({name})", facts, size, in_chans)


def _architecture(found: Recognized) -> str | None:
    """The model's name where the shapes tell it."""
    size = size_of(found.tensors)
    return f"mae_{size}" if size and found.kind in ("autoencoder", "encoder") else size


def _classes_of(name: str, found: Recognized) -> int:
    """Rows of a file's head, which the model of this name has under this key."""
    settings = None if name in VIT_SIZES else timm.get_pretrained_cfg(name, allow_unregistered=True)
    head = (settings and settings.classifier) or "head"
    key = f"{head if isinstance(head, str) else head[0]}.weight"
    if key not in found.tensors:
        raise CheckpointError(
            f"{name} has its head at {key}, and the file ({found.format}) has none there. For an autoencoder or its "
            f"encoder give --model with one of {', '.join(MAE_MODELS)}."
        )
    return len(found.tensors[key])


def _default_size(name: str) -> tuple[int, ...]:
    """Height and width that an architecture is meant for, in pixels."""
    if name in VIT_SIZES or name in MAE_MODELS:
        size = VIT_SIZES[name] if name in VIT_SIZES else MAE_MODELS[name].encoder
        return size.img_size if isinstance(size.img_size, tuple) else (size.img_size,)
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return settings.input_size[-2:] if settings else (224,)


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
