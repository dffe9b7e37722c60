"""Classification with soft targets."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.training.objectives.base import Objective


class Classification(Objective):
    """Cross-entropy with soft targets: mixup and cutmix if configured, label smoothing always."""

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes, self.smoothing = num_classes, augment.smoothing
        self.mixup: Any = None
        if augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                cutmix_minmax=augment.cutmix_minmax,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                mode=augment.mixup_mode,
                label_smoothing=augment.smoothing,
                num_classes=num_classes,
            )

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the (mixed) image (B, C, H, W) and soft targets (B, K) for K classes."""
        image, label = batch["image"], batch["label"]
        if self.mixup is not None:
            # It draws from numpy's global state, which the training loop seeds for each step.
            return self.mixup(image.clone(), label)
        off_value = self.smoothing / self.num_classes
        return image, F.one_hot(label, self.num_classes).float() * (1 - self.smoothing) + off_value

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute the mean cross-entropy against the soft targets (B, K), a scalar."""
        return F.cross_entropy(model(image).float(), prepared)

    def loss_per_image(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute the cross-entropy of each image against its soft targets (B, K): (B,)."""
        return F.cross_entropy(model(image).float(), prepared, reduction="none")
