"""Adversarial training on pixels, around any objective: what DAT is compared with (docs/adversaries.md)."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.gradient import LossFn
from mae_dat.attacks.pixel import PixelAttack, gradient_ascent, random_point
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import frozen_parameters, unwrap_ddp
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.training.objectives.base import Objective, ObjectiveWrapper, Parts


def projected_gradient(image: Tensor, loss_of: LossFn, attack: PixelAttack, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1] in the ball around `image`, after steps up the gradient of `loss_of`, an image's scalar loss;
    `generator`, on its device, draws the start."""
    start = random_point(image, attack, generator) if attack.random_start else image
    return gradient_ascent(start, image, loss_of, attack)


class WithPixelAdversary(ObjectiveWrapper):
    """Adversarial training on pixels: loss = w L(clean) + L(adversarial).

    With w = 0 that is Madry et al. 2018. With w = 1, and a network of two sets of norms (`split_norms`), it is AdvProp
    (Xie et al. 2020): the attack and its outcome pass through the auxiliary ones. The attack sees the bare network in
    training mode, as the discrete ones do: drop path draws anew in each step, and BatchNorm gathers from each of them.
    """

    def __init__(self, objective: Objective, attack: PixelAttack, clean_weight: float = 0.0) -> None:
        self.objective, self.attack, self.clean_weight = objective, attack, clean_weight

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """One step; parts: loss, loss_clean where it counts, loss_adversarial."""
        image, context = self.prepare(model, batch, generator)
        clean = {"loss_clean": self.loss(model, image, context)} if self.clean_weight else {}
        with auxiliary_norms(model):
            adversarial = self.loss(model, self.adversary(model, image, context, generator), context)
        loss = sum((self.clean_weight * part for part in clean.values()), adversarial)
        return {"loss": loss, **clean, "loss_adversarial": adversarial}

    def adversary(self, model: nn.Module, image: Tensor, context: Any, generator: torch.Generator) -> Tensor:
        """The pictures that the attack makes of this batch. It runs on the bare module: DDP's hooks see nothing."""
        inner = unwrap_ddp(model)
        with frozen_parameters(inner):
            return projected_gradient(image, lambda view: self.loss(inner, view, context), self.attack, generator)
