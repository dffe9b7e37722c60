"""What `WithDAT` needs in a training loop that is not ours: batches, criteria, functions as models, metrics."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import Network
from mae_dat.training.objectives.base import Objective, Parts
from mae_dat.training.step_report import HostCopy

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps float32 logits (B, K) and labels to the mean loss of the batch, a scalar, as `nn.CrossEntropyLoss` does."""


class CriterionObjective(Objective):
    """Any criterion of logits and labels; the labels are used as they are."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the image (B, C, H, W) and its labels, int64 (B,) or probabilities (B, K)."""
        return batch["image"], batch["label"]

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute the criterion of the model's logits and the labels, a scalar. Raises ValueError for another shape."""
        loss = self.criterion(model(image).float(), prepared)
        if loss.ndim:
            raise ValueError(f"the criterion must return a scalar (reduction='mean'), got shape {tuple(loss.shape)}.")
        return loss


class FunctionModel(nn.Module):
    """A function from images to logits as a module without parameters of its own."""

    def __init__(self, function: Network) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor) -> Tensor:
        """Return the function's logits (B, K)."""
        return self.function(image)


def as_module(model: Network, free: bool) -> nn.Module:
    """Return the model, wrapped if it is a function. Raises ConfigError for a function with a `free` attack, which
    needs the parameters."""
    if isinstance(model, nn.Module):
        return model
    if free:
        raise ConfigError("AttackConfig(free=True) needs the model's parameters: pass an nn.Module, not a function.")
    return FunctionModel(model)


def batch_from(images: Tensor, labels: Tensor | None) -> Batch:
    """Return images (B, C, H, W) and their labels, int64 (B,), probabilities (B, K) or none, as a batch.

    Raises ValueError for tensors of another form.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"the images must be float (B, C, H, W) with pixels in [0, 1], got {images.dtype} {tuple(images.shape)}."
        )
    numbers = torch.arange(len(images))
    if labels is None:
        labels = torch.zeros_like(numbers)
    elif len(labels) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels.")
    labels = labels if labels.is_floating_point() else labels.long()
    return {"image": images, "label": labels, "index": numbers, "skipped": torch.zeros_like(numbers)}


def seeded_generator(device: torch.device) -> torch.Generator:
    """Return a generator on a device, seeded by a draw from torch's global generator."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))


class MetricsCopy:
    """The metrics of one call, on their way from the device to the host."""

    def __init__(self, parts: Parts) -> None:
        self.names = list(parts)
        self._copy = HostCopy(torch.stack([value.detach().double() for value in parts.values()]))

    @classmethod
    def from_host(cls, metrics: Mapping[str, Any]) -> Self:
        """Return metrics that are on the host already."""
        return cls({name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()})

    def read(self) -> dict[str, float]:
        """Return the metrics by name; waits until they have arrived."""
        return dict(zip(self.names, self._copy.read(), strict=True))
