"""Check the normalization of a classifier from another project on validation images."""

import logging

import torch
from torch import nn

from mae_dat.attacks.normalization import CHECKED_INPUTS, better_normalization
from mae_dat.data.image_set import ImageSet
from mae_dat.data.sampler import evenly_spaced

logger = logging.getLogger(__name__)


def warn_of_normalization(name: str, model: nn.Module, images: ImageSet, device: torch.device) -> None:
    """Log a warning if a model on `device` classifies more of a hundred labeled images correctly under another usual
    normalization, beyond chance. The labels are numbers of its outputs."""
    samples = [images[index] for index in evenly_spaced(len(images), CHECKED_INPUTS)]
    pixels = torch.stack([sample["image"] for sample in samples]).to(device)
    label = torch.tensor([sample["label"] for sample in samples], device=device)
    if warning := better_normalization(name, model, pixels, lambda logits: logits.argmax(1) == label):
        logger.warning("%s", warning)
