"""Adversarial training on pixels around any objective: a baseline for DAT (docs/reference/adversaries.md)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.gradient import LossFn
from mae_dat.attacks.pixel import PixelAttack, gradient_ascent, random_point
from mae_dat.config.adversaries import strength_at
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import frozen_parameters, unwrap_ddp
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.training.objectives.base import Objective, ObjectiveWrapper, Parts


def projected_gradient(image: Tensor, loss_fn: LossFn, attack: PixelAttack, generator: torch.Generator) -> Tensor:
    """Run PGD on a batch: ascend the gradient of `loss_fn` in the ball around `image`; (B, C, H, W) in [0, 1].

    `generator`, on the image's device, draws the random start.
    """
    start = random_point(image, attack, generator) if attack.random_start else image
    return gradient_ascent(start, image, loss_fn, attack)


class WithPixelAdversary(ObjectiveWrapper):
    """Adversarial training on pixels: loss = w L(clean) + L(adversarial).

    With w = 0 this is Madry et al. 2018. With w = 1 and a model with two sets of norms (`split_norms`) it is AdvProp
    (Xie et al. 2020): the attack and the adversarial images use the auxiliary norms. Like the discrete attacks, the
    attack runs on the bare model in training mode: drop path draws anew in each step, and BatchNorm updates its
    statistics in each step. The radius and the step grow by the schedule of `strength_at`: none for `hold_epochs`,
    then linearly over `ramp_epochs`.
    """

    def __init__(
        self,
        objective: Objective,
        attack: PixelAttack,
        clean_weight: float = 0.0,
        hold_epochs: float = 0.0,
        ramp_epochs: float = 0.0,
    ) -> None:
        self.objective, self.attack, self.clean_weight = objective, attack, clean_weight
        self.hold_epochs, self.ramp_epochs = hold_epochs, ramp_epochs
        self.ramp = 1.0

    def begin(self, epoch: float) -> None:
        """Set the share of the strength that its schedule has reached at this fractional epoch."""
        self.ramp = strength_at(epoch, self.hold_epochs, self.ramp_epochs)
        super().begin(epoch)

    def strength(self) -> PixelAttack:
        """Return the current attack."""
        if self.ramp == 1:
            return self.attack
        return dataclasses.replace(self.attack, eps=self.ramp * self.attack.eps, step=self.ramp * self.attack.step)

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """Compute one step; parts: loss, loss_clean if w > 0, loss_adversarial, adversary_ramp if there is a
        schedule."""
        image, prepared = self.prepare(model, batch, generator)
        clean = {"loss_clean": self.loss(model, image, prepared)} if self.clean_weight else {}
        with auxiliary_norms(model):
            adversarial = self.loss(model, self.adversary(model, image, prepared, generator), prepared)
        loss = sum((self.clean_weight * part for part in clean.values()), adversarial)
        has_schedule = self.hold_epochs > 0 or self.ramp_epochs > 0
        ramp = {"adversary_ramp": torch.full_like(adversarial.detach(), self.ramp)} if has_schedule else {}
        return {"loss": loss, **clean, "loss_adversarial": adversarial, **ramp}

    def adversary(self, model: nn.Module, image: Tensor, prepared: Any, generator: torch.Generator) -> Tensor:
        """Attack this batch and return adversarial images (B, C, H, W) in [0, 1]; DDP's hooks do not run."""
        bare_model = unwrap_ddp(model)
        with frozen_parameters(bare_model):
            loss_fn: LossFn = lambda view: self.loss(bare_model, view, prepared)  # noqa: E731
            return projected_gradient(image, loss_fn, self.strength(), generator)
