"""Consistent predictions: the Jensen-Shannon divergence between views of a picture as a part of the loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.config.groups import AttackConfig, AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.training.objectives.base import Parts
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT, first_rows

AUGMIX_VIEWS = 3  # of AugMix: the crop, and two mixtures of it


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Divergence between the predictions for several views, each (B, classes): the mean over views and pictures of
    KL(view || mean of the views), a scalar in [0, log(views)]."""
    views = torch.stack([one.float() for one in logits]).log_softmax(-1)
    mean = views.exp().mean(0).clamp(1e-7, 1).log()  # AugMix's bound, for views that exclude each other
    return (views.exp() * (views - mean)).sum(-1).mean()


class AugMix(Classification):
    """AugMix (Hendrycks et al. 2020): cross-entropy of the clean view, and a divergence between all of them.

    Pictures come with their views, (B, V, C, H, W), the clean one first. They pass through the network at once, so that
    BatchNorm sees all of them together.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, weight: float) -> None:
        super().__init__(augment, num_classes)
        self.weight = weight

    def loss(self, model: nn.Module, image: Tensor, context: Tensor) -> Tensor:
        """Their weighted sum."""
        return self.parts(model, image, context)["loss"]

    def parts(self, model: nn.Module, image: Tensor, target: Tensor) -> Parts:
        """loss, loss_clean and jsd (unweighted) of pictures in their views, for soft targets (B, classes)."""
        logits = model(image.transpose(0, 1).flatten(0, 1)).float().chunk(image.shape[1])
        clean, divergence = F.cross_entropy(logits[0], target), jensen_shannon(logits)
        return {"loss": clean + self.weight * divergence, "loss_clean": clean, "jsd": divergence}


class ConsistentDAT(WithDAT):
    """DAT of a classifier, whose predictions for a picture, its reconstruction and its adversary are to agree: a
    weighted divergence between them joins DAT's loss."""

    def __init__(
        self, objective: Classification, tokenizer: VisualTokenizer, attack: AttackConfig, weight: float
    ) -> None:
        super().__init__(objective, tokenizer, attack)
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """One step; parts: as DAT's, and jsd (unweighted)."""
        image, target = self.prepare(model, batch, generator)
        clean = model(image).float()
        parts = {"loss_clean": F.cross_entropy(clean, target)} if self.attack.clean_weight else {}
        attacked, target = first_rows((image, target), self.attack_count(image))
        with auxiliary_norms(model):
            found = self.adversary(model, attacked, target, generator)
            adversarial = model(found.adversarial).float()
        parts["loss_adversarial"] = F.cross_entropy(adversarial, target)
        divergence = jensen_shannon([clean[: len(attacked)], model(found.reconstruction), adversarial])
        loss = torch.stack([*parts.values(), self.weight * divergence]).sum()
        return {"loss": loss, **parts, "jsd": divergence, **self.attack_metrics(found)}
