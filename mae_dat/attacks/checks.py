"""Checks that an attack's outcome can be believed."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mae_dat.attacks.pixel import (
    Model,
    PixelAttack,
    _logits,
    loss_gradient,
    pixel_adversary,
    project_into_ball,
    random_point,
)
from mae_dat.config.errors import ConfigError


def require_no_declared_normalization(model: Model) -> None:
    """Raises ConfigError for a bare network whose settings, timm's, say that it takes normalised pictures."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    mean, std = settings.get("mean", (0,)), settings.get("std", (1,))
    if any(mean) or set(std) != {1}:
        raise ConfigError(
            f"{type(model).__name__} takes pictures normalised by mean {mean} and std {std}, and an attack's eps is in "
            "pixels in [0, 1]: give mae_dat.models.classifier.Classifier(model, mean, std)."
        )


class InputScale(NamedTuple):
    """Pictures as a model may want them that does not take pixels in [0, 1]."""

    name: str
    made: Callable[[Tensor], Tensor]
    advice: str


def _normalised(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    return lambda image: (image - image.new_tensor(mean).view(-1, 1, 1)) / image.new_tensor(std).view(-1, 1, 1)


_CLASSIFIER = "mae_dat.models.classifier.Classifier(model, mean, std)"


_IMAGENET = _normalised(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


INPUT_SCALES = (
    InputScale("normalised by mean 0.5 and std 0.5", _normalised([0.5], [0.5]), _CLASSIFIER),
    InputScale("normalised by ImageNet's mean and std", _IMAGENET, _CLASSIFIER),
    InputScale("from 0 to 255", lambda image: 255 * image, "lambda image: model(255 * image)"),
)


PROBE_SIZE, MAX_PROBES = 64, 16
"""Pictures of a look, and how many looks there are at most."""


MAX_FALSE_ALARM = 1e-4
"""Probability that a good model is refused, at most."""


def require_pixel_model(model: Model, looks: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
    """Raises ConfigError for a model that knows more of the pictures when they are another `InputScale`.

    `looks`: up to `MAX_PROBES` times colour images (B, 3, H, W), and which logits (B, K) are right for them, bool
    (B,). They are taken one by one until every scale is decided. Of the images of which a model has one version alone
    right, one that takes [0, 1] has it in at least half of the cases there; it is refused where so few as are found
    had a probability below MAX_FALSE_ALARM / (looks x scales). So the probability that any of the looks refuses it is
    below MAX_FALSE_ALARM, for images drawn at random.
    """
    least = MAX_FALSE_ALARM / (MAX_PROBES * len(INPUT_SCALES))
    known, counts = [0, 0], {version: [0, 0, 0] for version in INPUT_SCALES}
    for image, right in looks:
        plain = right(_logits(model, image))
        known[0] += int(plain.sum())
        known[1] += len(plain)
        for version, count in [*counts.items()]:
            try:
                other = right(_logits(model, version.made(image)))
            except (AssertionError, ValueError):  # a model that refuses them does not take them
                del counts[version]
                continue
            count[0] += int((other & ~plain).sum())
            count[1] += int((plain & ~other).sum())
            count[2] += int(other.sum())
            if _chance(count[0], count[1]) < least:
                raise ConfigError(
                    f"the model seems to take pictures {version.name}: of {known[1]} it knows {count[2]} so, and "
                    f"{known[0]} in [0, 1]. Give {version.advice}."
                )
            if _chance(count[1], count[0]) < least:
                del counts[version]
        if not counts:
            return


def _chance(ours: int, theirs: int) -> float:
    """Probability of at least so many heads of ours + theirs throws of a coin."""
    throws = ours + theirs
    return sum(math.comb(throws, heads) for heads in range(ours, throws + 1)) / 2**throws


CHECK_PASSES = 99
"""Forward passes of `attack_checks`."""


class Check(NamedTuple):
    """One sign of a broken attack: what was looked at, whether all is well, and the numbers in words."""

    name: str
    passed: bool
    told: str


def attack_checks(
    model: Model, image: Tensor, label: Tensor, generators: Sequence[torch.Generator], eps: float = 4 / 255
) -> list[Check]:
    """Whether the gradients of this model lead an attack (Carlini et al. 2019, AutoAttack's own checks).

    Costs about a hundred passes: give some 64 pictures. A check that fails says that the model may be *less* robust
    than its rows: it hides its gradients, or answers by chance. Losses are means over the pictures, and may fall short
    by 1 % of themselves.
    """

    def loss_under(attack: PixelAttack | None, of: float = eps) -> tuple[float, float]:
        if attack is None:
            noise = PixelAttack(of, of, random_start=True)
            found = project_into_ball(
                image + of * (random_point(image, noise, generators) - image).sign(), image, noise
            )
        else:
            found = pixel_adversary(model, image, label, attack, generators)
        logits = _logits(model, found)
        return float(F.cross_entropy(logits, label)), float((logits.argmax(1) == label).float().mean())

    def pgd(steps: int, of: float = eps) -> PixelAttack:
        return PixelAttack(of, 2.5 * of / steps, steps, random_start=True)

    gradient = loss_gradient(model, image, label).flatten(1).abs().amax(1)
    lost = int((~((gradient > 0) & gradient.isfinite())).sum())
    first, second = _logits(model, image), _logits(model, image)
    moved = float((first - second).abs().max())
    (noise, _), (fgsm, _) = loss_under(None), loss_under(PixelAttack(eps, eps))
    (few, _), (many, _) = loss_under(pgd(10)), loss_under(pgd(40))
    _, left = loss_under(pgd(40, 64 / 255), 64 / 255)
    size = f"{255 * eps:.3g}/255"
    return [
        Check("gradients", lost == 0, f"{lost} of {len(image)} pictures have no gradient"),
        Check("no chance", torch.allclose(first, second, 1e-4, 1e-5), f"two passes differ by up to {moved:.2g}"),
        Check("FGSM beats noise", _at_least(fgsm, noise), f"loss {fgsm:.3f}, of random signs {noise:.3f} ({size})"),
        Check("PGD beats FGSM", _at_least(few, fgsm), f"loss {few:.3f} after 10 steps, of FGSM {fgsm:.3f} ({size})"),
        Check("more steps help", _at_least(many, few), f"loss {many:.3f} after 40 steps, after 10 {few:.3f} ({size})"),
        Check("a large eps wins", left <= 0.05, f"{left:.1%} right at 64/255, which hides any picture"),
    ]


def _at_least(one: float, other: float) -> bool:
    return one >= other - 0.01 * abs(other)
