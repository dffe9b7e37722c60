"""The objective of a detector, and the ground truth that it is trained and measured with."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.data.image_set import Batch
from mae_dat.models.detector import Boxes
from mae_dat.training.objectives.base import Objective, Parts


class DetectionObjective(Objective):
    """The total loss of a detector: the sum of its parts, which is also what an adversary raises.

    torchvision samples anchors and regions by chance. Every view of a batch, clean, attacked or adversarial, starts
    from the same random state, so that they differ in their pixels alone.
    """

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The image, with (the boxes and labels of each picture, without its crowds; a seed)."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return batch["image"], (ground_truth(batch), seed)

    def parts(self, model: nn.Module, image: Tensor, context: tuple[list[Boxes], int]) -> Parts:
        """The detector's losses by name, float32 scalars, and as `loss` their sum."""
        truth, seed = context
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            torch.manual_seed(seed)
            losses = {name: one.float() for name, one in model(image, truth).items()}
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    def loss(self, model: nn.Module, image: Tensor, context: tuple[list[Boxes], int]) -> Tensor:
        """Their sum."""
        return self.parts(model, image, context)["loss"]


def ground_truth(batch: Any, crowd: bool = False) -> list[dict[str, Tensor]]:
    """Boxes and labels of each picture of a `BoxBatch`, without the rows that fill it up; crowds are left out, or with
    `crowd` flagged as `iscrowd`."""
    rows = zip(batch["boxes"], batch["labels"], batch["crowd"], strict=True)
    found = []
    for boxes, labels, crowds in rows:
        kept = (labels > 0) & (~crowds | crowd)
        one = {"boxes": boxes[kept], "labels": labels[kept]}
        found.append({**one, "iscrowd": crowds[kept].long()} if crowd else one)
    return found
