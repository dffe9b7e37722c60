"""Pixel attacks for evaluation: FGSM and PGD in an L-infinity or L2 ball.

They work on pixels in [0, 1], the unit of eps, so the normalization belongs inside the model. `auto_attack.py` has
AutoAttack; `checks.py` checks that the model takes such pixels and that the result of an attack can be trusted. An
attack leaves no trace: no parameter gradient, no training flag changed. It runs in float32. Shapes: image (B, C, H, W)
in [0, 1], label int64 (B,), logits (B, K).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.attacks.gradient import LossFn, input_gradient, project, require_pixels, unit
from mae_dat.config.errors import ConfigError
from mae_dat.models.modes import Network

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class PixelAttack:
    """Gradient ascent on the cross-entropy in a ball around the image; FGSM is one step without a random start."""

    eps: float
    """Radius of the ball, pixels in [0, 1]: of every pixel (`linf`) or of the image (`l2`)."""
    step: float
    """Length of a step, in the same norm."""
    steps: int = 1
    norm: Norm = "linf"
    random_start: bool = False
    """Uniform in the box (`linf`), or on the sphere (`l2`)."""
    restarts: int = 1
    """Number of runs. The worst result of each image counts: a misclassification first, then the highest loss."""

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ConfigError(f"unknown norm {self.norm!r} of a pixel attack: use linf or l2.")
        if not (self.eps > 0 and self.step > 0 and self.steps >= 1 and self.restarts >= 1):
            raise ConfigError(f"a pixel attack needs eps > 0, step > 0, steps >= 1 and restarts >= 1, got {self}.")
        if self.restarts > 1 and not self.random_start:
            raise ConfigError(
                f"{self.restarts} restarts of a pixel attack would all be the same: set random_start or restarts=1."
            )


# The first two as in the evaluation of RVT, by the authors of DAT.
PIXEL_ATTACKS = {
    "fgsm-1/255": PixelAttack(1 / 255, 1 / 255),
    "pgd-5-1/255": PixelAttack(1 / 255, 0.5 / 255, 5, random_start=True),
    "pgd-20-l2-0.5": PixelAttack(0.5, 2.5 * 0.5 / 20, 20, "l2", random_start=True),
}


def pixel_adversary(
    model: Network, image: Tensor, label: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return adversarial images (B, C, H, W) in [0, 1], exactly inside the ball.

    Each image draws from its own generator (`discrete.image_generator`), so its result does not depend on its batch.
    Raises ValueError for pixels outside [0, 1].
    """
    require_pixels(image)
    image = image.detach().float().clamp(0, 1)
    worst, worst_rank = image, torch.full((2, len(image)), -torch.inf, device=image.device)
    for _ in range(attack.restarts):
        start = random_point(image, attack, generators) if attack.random_start else image
        with torch.autocast(image.device.type, enabled=False):
            adversarial = gradient_ascent(start, image, _cross_entropy_sum(model, label), attack)
        if attack.restarts == 1:
            return adversarial
        logits = predict_logits(model, adversarial)
        wrong, loss = logits.argmax(1) != label, F.cross_entropy(logits, label, reduction="none")
        rank = torch.stack([wrong.float(), loss])  # compared in this order
        worse = (rank[0] > worst_rank[0]) | ((rank[0] == worst_rank[0]) & (rank[1] > worst_rank[1]))
        worst = torch.where(worse.view(-1, 1, 1, 1), adversarial, worst)
        worst_rank = torch.where(worse, rank, worst_rank)
    return worst


def gradient_ascent(point: Tensor, center: Tensor, loss_fn: LossFn, attack: PixelAttack) -> Tensor:
    """Take `attack.steps` steps from `point` up the gradient of a loss, inside the ball around `center`; (B, C, H, W).

    A step follows the gradient's sign (`linf`) or its unit vector (`l2`), so the scale of the loss does not matter.
    """
    for _ in range(attack.steps):
        gradient = input_gradient(point, loss_fn)
        direction = gradient.sign() if attack.norm == "linf" else unit(gradient)
        point = project_into_ball(point + attack.step * direction, center, attack)
    return point


def loss_gradient(model: Network, image: Tensor, label: Tensor) -> Tensor:
    """Compute the gradient of each image's own cross-entropy at the image, (B, C, H, W)."""
    with torch.autocast(image.device.type, enabled=False):
        return input_gradient(image, _cross_entropy_sum(model, label))


def _cross_entropy_sum(model: Network, label: Tensor) -> LossFn:
    """Return the loss summed over the batch: its gradient at an image is that of the loss of this image alone."""
    return lambda image: F.cross_entropy(model(image).float(), label, reduction="sum")


def random_point(image: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator] | torch.Generator) -> Tensor:
    """Draw a random point of each image's ball, (B, C, H, W).

    `generators` is one CPU generator for each image, or one for the batch on the image's device.
    """
    draw: Callable[..., Tensor] = torch.rand if attack.norm == "linf" else torch.randn
    if isinstance(generators, torch.Generator):
        noise = draw(image.shape, generator=generators, device=image.device)
    else:
        noise = torch.stack([draw(image.shape[1:], generator=generator) for generator in generators]).to(image.device)
    direction = 2 * noise - 1 if attack.norm == "linf" else unit(noise)
    return project_into_ball(image + attack.eps * direction, image, attack)


def project_into_ball(point: Tensor, center: Tensor, attack: PixelAttack) -> Tensor:
    """Project `point` into the ball around `center` and into [0, 1], exactly; all (B, C, H, W).

    The projection is computed in float64. If rounding to float32 leaves the ball, the result is the next float32
    toward the center.
    """
    middle, point = center.double(), point.double()
    if attack.norm == "linf":
        exact = point.clamp(middle - attack.eps, middle + attack.eps).clamp(0, 1)
    else:
        exact = (middle + project(point - middle, attack.eps)).clamp(0, 1)
    rounded = exact.float()
    outside = (rounded.double() - exact) * (exact - middle) > 0
    return torch.where(outside, rounded.nextafter(center), rounded)


@torch.no_grad()
def predict_logits(model: Network, image: Tensor) -> Tensor:
    """Return float32 logits (B, K), computed without autograd and outside autocast."""
    with torch.autocast(image.device.type, enabled=False):
        return model(image).float()
