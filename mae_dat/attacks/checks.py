"""Checks that the result of a pixel attack can be trusted: a broken attack makes a model look robust.

They detect two mistakes: a model that does not take pixels in [0, 1], the unit of eps (`require_pixel_model`), and
gradients that do not help an attack (`attack_checks`, printed next to the model's results). Shapes: image
(B, C, H, W) in [0, 1], label int64 (B,), logits (B, K).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mae_dat.attacks.pixel import (
    PixelAttack,
    loss_gradient,
    pixel_adversary,
    predict_logits,
    project_into_ball,
    random_point,
)
from mae_dat.config.errors import ConfigError
from mae_dat.models.modes import Network

# ---- does the model take pixels in [0, 1]? ----


def require_no_declared_normalization(model: Network) -> None:
    """Raise ConfigError if the model's own settings (timm's `pretrained_cfg`) declare normalized inputs."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    mean, std = settings.get("mean", (0,)), settings.get("std", (1,))
    if any(mean) or set(std) != {1}:
        raise ConfigError(
            f"{type(model).__name__} takes images normalized by mean {mean} and std {std}, but an attack needs pixels "
            "in [0, 1], the unit of eps: use mae_dat.models.classifier.Classifier(model, mean, std)."
        )


class InputScale(NamedTuple):
    """A scale of pixels other than [0, 1] that a model may expect."""

    name: str
    convert: Callable[[Tensor], Tensor]
    """Maps images in [0, 1] to this scale."""
    advice: str


def _normalized(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    return lambda image: (image - image.new_tensor(mean).view(-1, 1, 1)) / image.new_tensor(std).view(-1, 1, 1)


_CLASSIFIER = "mae_dat.models.classifier.Classifier(model, mean, std)"
_IMAGENET = _normalized(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
INPUT_SCALES = (
    InputScale("normalized by mean 0.5 and std 0.5", _normalized([0.5], [0.5]), _CLASSIFIER),
    InputScale("normalized by ImageNet's mean and std", _IMAGENET, _CLASSIFIER),
    InputScale("from 0 to 255", lambda image: 255 * image, "lambda image: model(255 * image)"),
)
PROBE_SIZE, MAX_PROBES = 64, 16
"""Images in a probe, and the largest number of probes."""
MAX_FALSE_ALARM = 1e-4
"""Upper bound on the probability that a model that takes [0, 1] is rejected."""


def require_pixel_model(model: Network, probes: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
    """Raise ConfigError for a model that classifies more images correctly at another `InputScale`.

    `probes`: up to `MAX_PROBES` pairs of color images (B, 3, H, W) in [0, 1] and a function from logits (B, K) to
    bool (B,), which predictions are right. They are read one by one until every scale is decided.

    The test is a sign test on the images that the model classifies correctly at exactly one of the two scales. For a
    model of pixels in [0, 1], each of them is correct at [0, 1] with a probability of at least 1/2. The model is
    rejected if a count as low as the observed one has a probability below MAX_FALSE_ALARM / (probes x scales), so the
    probability that any probe rejects a valid model stays below MAX_FALSE_ALARM, for images drawn at random.
    """
    threshold = MAX_FALSE_ALARM / (MAX_PROBES * len(INPUT_SCALES))
    right_plain = total = 0
    counts = {scale: _ScaleCounts() for scale in INPUT_SCALES}
    for image, right in probes:
        plain = right(predict_logits(model, image))
        right_plain += int(plain.sum())
        total += len(plain)
        for scale, count in list(counts.items()):
            try:
                scaled = right(predict_logits(model, scale.convert(image)))
            except (AssertionError, ValueError):  # a model that rejects this scale does not expect it
                del counts[scale]
                continue
            count = counts[scale] = count.plus(plain, scaled)
            if sign_test(count.scaled_only, count.plain_only) < threshold:
                raise ConfigError(
                    f"the model seems to take images {scale.name}: it classifies {count.scaled} of {total} images "
                    f"correctly this way, but about {right_plain} in [0, 1]. Use {scale.advice}."
                )
            if sign_test(count.plain_only, count.scaled_only) < threshold:
                del counts[scale]
        if not counts:
            return


class _ScaleCounts(NamedTuple):
    """Images classified correctly at another scale only, in [0, 1] only, and at the other scale in total."""

    scaled_only: int = 0
    plain_only: int = 0
    scaled: int = 0

    def plus(self, plain: Tensor, scaled: Tensor) -> "_ScaleCounts":
        """Add a probe: bool (B,), which images are right in [0, 1] and at the other scale."""
        return _ScaleCounts(
            self.scaled_only + int((scaled & ~plain).sum()),
            self.plain_only + int((plain & ~scaled).sum()),
            self.scaled + int(scaled.sum()),
        )


def sign_test(heads: int, tails: int) -> float:
    """Return the probability of at least `heads` heads in heads + tails throws of a fair coin (one-sided)."""
    throws = heads + tails
    return sum(math.comb(throws, count) for count in range(heads, throws + 1)) / 2**throws


# ---- do the gradients help an attack? ----

CHECK_PASSES = 99
"""Forward passes of `attack_checks`."""


class Check(NamedTuple):
    """One sign of a broken attack: what was checked, whether it passed, and the numbers in words."""

    name: str
    passed: bool
    details: str

    def as_json(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        return {"name": self.name, "passed": self.passed, "told": self.details}


def attack_checks(
    model: Network, image: Tensor, label: Tensor, generators: Sequence[torch.Generator], eps: float = 4 / 255
) -> list[Check]:
    """Check whether the gradients of a model help an attack (Carlini et al. 2019, AutoAttack's own checks).

    Costs about a hundred passes; 64 images are enough. A failed check means that the model may be *less* robust than
    its results suggest: it hides its gradients, or its predictions are random. Losses are means over the images; a loss
    that is at most 1 % lower than another counts as equal to it.
    """

    def loss_and_accuracy(adversarial: Tensor) -> tuple[float, float]:
        logits = predict_logits(model, adversarial)
        return float(F.cross_entropy(logits, label)), float((logits.argmax(1) == label).float().mean())

    def attacked(attack: PixelAttack) -> tuple[float, float]:
        return loss_and_accuracy(pixel_adversary(model, image, label, attack=attack, generators=generators))

    def pgd(steps: int, radius: float = eps) -> PixelAttack:
        return PixelAttack(radius, 2.5 * radius / steps, steps, random_start=True)

    gradient = loss_gradient(model, image, label).flatten(1).abs().amax(1)
    without_gradient = int((~((gradient > 0) & gradient.isfinite())).sum())
    first, second = predict_logits(model, image), predict_logits(model, image)
    moved = float((first - second).abs().max())
    ball = PixelAttack(eps, eps, random_start=True)
    signs = (random_point(image, ball, generators) - image).sign()
    noise, _ = loss_and_accuracy(project_into_ball(image + eps * signs, image, ball))
    fgsm, _ = attacked(PixelAttack(eps, eps))
    few, _ = attacked(pgd(10))
    many, _ = attacked(pgd(40))
    _, accuracy = attacked(pgd(40, 64 / 255))
    size = f"{255 * eps:.3g}/255"
    return [
        Check("gradients", without_gradient == 0, f"{without_gradient} of {len(image)} images have no gradient"),
        Check("no chance", torch.allclose(first, second, 1e-4, 1e-5), f"two passes differ by up to {moved:.2g}"),
        Check("FGSM beats noise", _at_least(fgsm, noise), f"loss {fgsm:.3f}, of random signs {noise:.3f} ({size})"),
        Check("PGD beats FGSM", _at_least(few, fgsm), f"loss {few:.3f} after 10 steps, of FGSM {fgsm:.3f} ({size})"),
        Check("more steps help", _at_least(many, few), f"loss {many:.3f} after 40 steps, after 10 {few:.3f} ({size})"),
        Check("a large eps wins", accuracy <= 0.05, f"{accuracy:.1%} right at 64/255, which hides any image"),
    ]


def _at_least(loss: float, other: float) -> bool:
    return loss >= other - 0.01 * abs(other)
