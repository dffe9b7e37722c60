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
    """Cross-entropy with soft targets: mixup and cutmix if configured, label smoothing always.

    With `binary` it is the binary cross-entropy of each class, averaged over the classes. `class_weights` (K,) multiply
    the terms of the classes in the sum.
    """

    def __init__(
        self, augment: AugmentConfig, num_classes: int, binary: bool = False, class_weights: Tensor | None = None
    ) -> None:
        self.num_classes, self.smoothing = num_classes, augment.smoothing
        self.binary, self.class_weights = binary, class_weights
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

    def prepare_views(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return views (B, V, C, H, W), all mixed alike, and soft targets (B, K)."""
        views = batch["image"]
        # As channels of one image they get the same partners, shares and boxes.
        as_channels: Any = {**batch, "image": views.flatten(1, 2)}
        image, target = self.prepare(model, as_channels, generator)
        return image.view_as(views), target

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute the mean loss against the soft targets (B, K), a scalar."""
        return self.loss_of_logits(model(image).float(), prepared)

    def loss_of_logits(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss of logits against soft targets, both (B, K): a scalar."""
        if self.binary:
            return self._losses(logits, target).mean()
        return F.cross_entropy(logits, target, self.class_weights)

    def loss_per_image(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute the loss of each image against its soft targets (B, K): (B,)."""
        return self._losses(model(image).float(), prepared)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.binary:
            terms = F.binary_cross_entropy_with_logits(logits, target, self.class_weights, reduction="none")
            return terms.mean(dim=1)
        return F.cross_entropy(logits, target, self.class_weights, reduction="none")
