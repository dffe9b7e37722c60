"""Consistent predictions: the Jensen-Shannon divergence between views of an image as a part of the loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.training.objectives.base import Parts
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT, first_rows

AUGMIX_VIEWS = 3  # the crop, and two mixtures of it


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Compute the divergence between the predictions for several views, each logits (B, K).

    The mean over views and images of KL(view || mean of the views): a scalar in [0, log(views)].
    """
    views = torch.stack([view.float() for view in logits]).log_softmax(-1)
    mean = views.exp().mean(0).clamp(1e-7, 1).log()  # AugMix's bound, for views that exclude each other
    return (views.exp() * (views - mean)).sum(-1).mean()


class AugMix(Classification):
    """AugMix (Hendrycks et al. 2020): cross-entropy of the clean view, and the divergence between all views.

    Images come with their views, (B, V, C, H, W), the clean one first. All views pass through the model at once, so
    BatchNorm computes its statistics over all of them.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, weight: float) -> None:
        super().__init__(augment, num_classes)
        self.weight = weight

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        """Compute cross-entropy + weight * divergence, a scalar."""
        return self.parts(model, image, prepared)["loss"]

    def parts(self, model: nn.Module, image: Tensor, target: Tensor) -> Parts:
        """Compute loss, loss_clean and jsd (unweighted) of views (B, V, C, H, W), for soft targets (B, K)."""
        logits = model(image.transpose(0, 1).flatten(0, 1)).float().chunk(image.shape[1])
        clean, divergence = F.cross_entropy(logits[0], target), jensen_shannon(logits)
        return {"loss": clean + self.weight * divergence, "loss_clean": clean, "jsd": divergence}


class ConsistentDAT(WithDAT):
    """DAT of a classifier with consistent predictions.

    A weighted divergence between the predictions for an image, its reconstruction and its adversary joins DAT's loss.
    """

    def __init__(
        self, tokenizer: VisualTokenizer, attack: AttackConfig, objective: Classification, weight: float
    ) -> None:
        super().__init__(tokenizer, attack, objective)
        self.weight = weight

    def attack_step(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Parts, DiscreteAdversary]:
        """Compute one step and return it with its adversary; parts: those of DAT, and jsd (unweighted)."""
        image, target = self.prepare(model, batch, generator)
        clean = model(image).float()
        parts = {"loss_clean": F.cross_entropy(clean, target)} if self.attack.clean_weight else {}
        image, target = first_rows((image, target), self.attack_count(image))
        with auxiliary_norms(model):
            adversary = self.adversary(model, image, target, generator)
            adversarial = model(adversary.adversarial).float()
        parts["loss_adversarial"] = F.cross_entropy(adversarial, target)
        divergence = jensen_shannon([clean[: len(image)], model(adversary.reconstruction), adversarial])
        loss = torch.stack([*parts.values(), self.weight * divergence]).sum()
        return {"loss": loss, **parts, "jsd": divergence, **self.attack_metrics(adversary)}, adversary
