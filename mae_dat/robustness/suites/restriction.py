"""Predictions restricted to the classes that have images in a folder.

Without the restriction a model predicts among all of its outputs, or among the list that a benchmark prescribes.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mae_dat.config.errors import DataError
from mae_dat.models.modes import Network
from mae_dat.robustness.suites.imagenet import mapping_of_outputs
from mae_dat.robustness.suites.sets import BenchmarkSet

_NEVER = -1e4  # the logit of a class that is not predicted: finite, so that losses and their gradients stay finite


def restrict_to_present(sets: Sequence[BenchmarkSet]) -> list[BenchmarkSet]:
    """Return the cells of a suite, measured among the classes that are the label of any of its images.

    The restriction is part of the protocol, and so of a result's key. It changes nothing where all classes are present.
    """
    present = torch.cat([images.targets.flatten() for images in sets]).unique()
    present = present[present >= 0]
    restricted = []
    for images in sets:
        mapping = images.class_mapping
        keep = torch.isin(mapping.class_of_logit, present)
        if keep.all():
            restricted.append(images)
            continue
        mapping = dataclasses.replace(
            mapping,
            name=f"{mapping.name}, restricted to the {len(present)} classes of the folder",
            used_logits=mapping.used_logits[keep],
            class_of_logit=mapping.class_of_logit[keep],
        )
        restricted.append(images.with_mapping(mapping))
    return restricted


def for_outputs(sets: Sequence[BenchmarkSet], names: Sequence[str]) -> list[BenchmarkSet]:
    """Return the cells of a suite for a network with some of ImageNet's classes, whose WordNet ids are `names`.

    Raises DataError if a cell has images of a class that the network does not have.
    """
    adapted = []
    for images in sets:
        mapping = mapping_of_outputs(images.class_mapping, names)
        labels = images.targets[images.targets >= 0].unique()
        if len(lacking := labels[~torch.isin(labels, mapping.class_of_logit)]):
            shown = ", ".join(mapping.classes[label] for label in lacking[:3].tolist())
            raise DataError(
                f"{images.root}: has images of {len(lacking)} classes that the model's {len(names)} outputs lack "
                f"({shown}): evaluate it on a folder of its classes, with --partial"
            )
        adapted.append(images.with_mapping(mapping))
    return adapted


class RestrictedNetwork(nn.Module):
    """A network whose other logits are so low that it never predicts them."""

    def __init__(self, network: Network, outputs: int, used_logits: Tensor) -> None:
        """`outputs` is the number of logits, `used_logits` int64 (L,) those that stay."""
        super().__init__()
        self.network = network
        used = torch.zeros(outputs, dtype=torch.bool, device=used_logits.device)
        used[used_logits] = True
        self.register_buffer("used", used)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 3, H, W)."""
        logits = self.network(image)
        assert isinstance(self.used, Tensor)
        return torch.where(self.used, logits, torch.full_like(logits, _NEVER))
