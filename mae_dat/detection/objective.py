"""The objective of a detector, and the ground truth that it is trained and measured with."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.data.image_set import Batch
from mae_dat.models.detector import Boxes
from mae_dat.training.objectives.base import Objective, Parts


class DetectionObjective(Objective):
    """The total loss of a detector, the sum of its losses; DAT's adversary raises the same loss.

    torchvision samples anchors and regions at random. Every view of a batch (clean, attacked or adversarial) starts
    from the same random state, so that views differ only in their pixels.
    """

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return the images (B, 3, H, W), and each image's boxes without crowds with a seed."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return batch["image"], (ground_truth(batch), seed)

    def parts(self, model: nn.Module, image: Tensor, prepared: tuple[list[Boxes], int]) -> Parts:
        """Compute the detector's losses by name, float32 scalars, and as `loss` their sum."""
        truth, seed = prepared
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            torch.manual_seed(seed)
            losses = {name: loss.float() for name, loss in model(image, truth).items()}
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    def loss(self, model: nn.Module, image: Tensor, prepared: tuple[list[Boxes], int]) -> Tensor:
        """Compute the sum of the losses, a float32 scalar."""
        return self.parts(model, image, prepared)["loss"]


def ground_truth(batch: Any, crowd: bool = False) -> list[dict[str, Tensor]]:
    """Return boxes (N, 4) and labels (N,) of each image of a `BoxBatch`, without the padding.

    Crowds are left out; with `crowd` they are included and flagged in `iscrowd` (N,), int64.
    """
    truths = []
    for boxes, labels, is_crowd in zip(batch["boxes"], batch["labels"], batch["crowd"], strict=True):
        selected = (labels > 0) & (~is_crowd | crowd)
        truth = {"boxes": boxes[selected], "labels": labels[selected]}
        truths.append({**truth, "iscrowd": is_crowd[selected].long()} if crowd else truth)
    return truths
