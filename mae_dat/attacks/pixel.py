"""Pixel attacks for evaluation: FGSM, PGD and AutoAttack, and whether their outcome can be believed.

All of them work on pixels in [0, 1], the unit of eps: the normalization belongs into the model (`require_pixel_model`).
A broken attack looks like a robust model, so a row of a report stands beside its `attack_checks`. An attack leaves no
trace: no parameter gradient, no training flag changed. It runs in float32. Shapes: image (B, C, H, W), label (B,).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.attacks.gradient import LossFn, input_gradient, project, require_pixels, unit
from mae_dat.config.errors import ConfigError

Model = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class PixelAttack:
    """Gradient ascent on the cross-entropy in a ball around the picture: FGSM is one step without a random start."""

    eps: float
    """Radius of the ball, pixels in [0, 1]: of every pixel (`linf`), or of the picture (`l2`)."""
    step: float
    """Length of a step, in the same norm."""
    steps: int = 1
    norm: Norm = "linf"
    random_start: bool = False
    """Uniform in the box (`linf`), or on the sphere (`l2`)."""
    restarts: int = 1
    """Runs, of which each picture keeps the worst: a wrong answer before a right one, then the highest loss."""

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ConfigError(f"unknown norm {self.norm!r} of a pixel attack: known are linf, l2.")
        if not (self.eps > 0 and self.step > 0 and self.steps >= 1 and self.restarts >= 1):
            raise ConfigError(f"a pixel attack needs eps > 0, step > 0, steps >= 1 and restarts >= 1, got {self}.")
        if self.restarts > 1 and not self.random_start:
            raise ConfigError(f"{self.restarts} restarts without random_start would all be the same.")


# The first two as in RVT's evaluation, whose group is DAT's.
PIXEL_ATTACKS = {
    "fgsm-1/255": PixelAttack(1 / 255, 1 / 255),
    "pgd-5-1/255": PixelAttack(1 / 255, 0.5 / 255, 5, random_start=True),
    "pgd-20-l2-0.5": PixelAttack(0.5, 2.5 * 0.5 / 20, 20, "l2", random_start=True),
}


def pixel_adversary(
    model: Model, image: Tensor, label: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator]
) -> Tensor:
    """Adversarial pictures in [0, 1] within the ball, to the last bit.

    Each picture draws from a generator of its own (`attack.image_generator`): what it meets does not depend on its
    batch. Raises ValueError for pixels outside [0, 1].
    """
    require_pixels(image)
    image = image.detach().float().clamp(0, 1)
    worst, rank = image, torch.full((2, len(image)), -torch.inf, device=image.device)
    for _ in range(attack.restarts):
        found = _ascend(model, image, label, attack, generators)
        if attack.restarts == 1:
            return found
        logits = _logits(model, found)
        wrong, loss = logits.argmax(1) != label, F.cross_entropy(logits, label, reduction="none")
        new = torch.stack([wrong.float(), loss])
        worse = (new[0] > rank[0]) | ((new[0] == rank[0]) & (new[1] > rank[1]))
        worst = torch.where(worse.view(-1, 1, 1, 1), found, worst)
        rank = torch.where(worse, new, rank)
    return worst


def _ascend(
    model: Model, image: Tensor, label: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator]
) -> Tensor:
    point = random_point(image, attack, generators) if attack.random_start else image
    with torch.autocast(image.device.type, enabled=False):
        return gradient_ascent(point, image, _loss_of(model, label), attack)


def gradient_ascent(point: Tensor, center: Tensor, loss_of: LossFn, attack: PixelAttack) -> Tensor:
    """Where `attack.steps` steps from `point` up the gradient of a scalar loss lead, in the ball around `center`."""
    for _ in range(attack.steps):
        gradient = input_gradient(point, loss_of)
        direction = gradient.sign() if attack.norm == "linf" else unit(gradient)
        point = project_into_ball(point + attack.step * direction, center, attack)
    return point


def loss_gradient(model: Model, image: Tensor, label: Tensor) -> Tensor:
    """Gradient of each picture's own cross-entropy, (B, C, H, W)."""
    with torch.autocast(image.device.type, enabled=False):
        return input_gradient(image, _loss_of(model, label))


def _loss_of(model: Model, label: Tensor) -> LossFn:
    return lambda image: F.cross_entropy(model(image).float(), label, reduction="sum")


def random_point(image: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator] | torch.Generator) -> Tensor:
    """A random point of each picture's ball, of its own generator on the CPU, or of the batch's on its device."""
    draw: Callable[..., Tensor] = torch.rand if attack.norm == "linf" else torch.randn
    if isinstance(generators, torch.Generator):
        noise = draw(image.shape, generator=generators, device=image.device)
    else:
        noise = torch.stack([draw(image.shape[1:], generator=one) for one in generators]).to(image.device)
    return project_into_ball(
        image + attack.eps * (2 * noise - 1 if attack.norm == "linf" else unit(noise)), image, attack
    )


def project_into_ball(point: Tensor, center: Tensor, attack: PixelAttack) -> Tensor:
    """The point moved into the ball around `center` and into [0, 1], both in [0, 1], to the last bit: computed in
    float64, then rounded to the float32 on the centre's side."""
    middle, point = center.double(), point.double()
    if attack.norm == "linf":
        exact = point.clamp(middle - attack.eps, middle + attack.eps).clamp(0, 1)
    else:
        exact = (middle + project(point - middle, attack.eps)).clamp(0, 1)
    rounded = exact.float()
    beyond = (rounded.double() - exact) * (exact - middle) > 0
    return torch.where(beyond, rounded.nextafter(center), rounded)


@torch.no_grad()
def _logits(model: Model, image: Tensor) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):
        return model(image).float()


# ---- AutoAttack ----


# ---- can it be believed? ----
