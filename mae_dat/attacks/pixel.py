"""Pixel attacks for evaluation: FGSM, PGD and AutoAttack, and whether their outcome can be believed.

All of them work on pixels in [0, 1], the unit of eps: the normalization belongs into the model (`require_pixel_model`).
A broken attack looks like a robust model, so a row of a report stands beside its `attack_checks`. An attack leaves no
trace: no parameter gradient, no training flag changed. It runs in float32. Shapes: image (B, C, H, W), label (B,).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from mae_dat.attacks.discrete import input_gradient, project, require_pixels, unit
from mae_dat.config.errors import ConfigError, MissingInputError

Model = Callable[[Tensor], Tensor]
LossOf = Callable[[Tensor], Tensor]
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
AUTO_ATTACK_EPS = 4 / 255  # RobustBench's, for ImageNet


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
        return steps_up(point, image, _loss_of(model, label), attack)


def steps_up(point: Tensor, center: Tensor, loss_of: LossOf, attack: PixelAttack) -> Tensor:
    """Where `attack.steps` steps from `point` up the gradient of a scalar loss lead, in the ball around `center`."""
    for _ in range(attack.steps):
        gradient = input_gradient(point, loss_of)
        direction = gradient.sign() if attack.norm == "linf" else unit(gradient)
        point = into_ball(point + attack.step * direction, center, attack)
    return point


def loss_gradient(model: Model, image: Tensor, label: Tensor) -> Tensor:
    """Gradient of each picture's own cross-entropy, (B, C, H, W)."""
    with torch.autocast(image.device.type, enabled=False):
        return input_gradient(image, _loss_of(model, label))


def _loss_of(model: Model, label: Tensor) -> LossOf:
    return lambda image: F.cross_entropy(model(image).float(), label, reduction="sum")


def random_point(image: Tensor, attack: PixelAttack, generators: Sequence[torch.Generator] | torch.Generator) -> Tensor:
    """A random point of each picture's ball, of its own generator on the CPU, or of the batch's on its device."""
    draw: Callable[..., Tensor] = torch.rand if attack.norm == "linf" else torch.randn
    if isinstance(generators, torch.Generator):
        noise = draw(image.shape, generator=generators, device=image.device)
    else:
        noise = torch.stack([draw(image.shape[1:], generator=one) for one in generators]).to(image.device)
    return into_ball(image + attack.eps * (2 * noise - 1 if attack.norm == "linf" else unit(noise)), image, attack)


def into_ball(point: Tensor, center: Tensor, attack: PixelAttack) -> Tensor:
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


def auto_attack(
    model: nn.Module, image: Tensor, label: Tensor, eps: float = AUTO_ATTACK_EPS, norm: Norm = "linf", seed: int = 0
) -> Tensor:
    """The standard AutoAttack (Croce and Hein 2020): APGD-CE, targeted APGD and FAB (9 targets), Square.

    Put together from the parts of `torchattacks` with the original's settings: its own `AutoAttack` stops after 10
    steps of 100. It draws for the whole batch, so that the batch belongs to the result. Raises MissingInputError
    without that package, ValueError for pixels outside [0, 1], ConfigError for fewer than 4 classes.
    """
    require_pixels(image)
    classes = _logits(model, image[:1]).shape[1]
    require_auto_attack(classes)
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    shared: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}
    targets = {"n_classes": min(10, classes)}
    devices = [image.device] if image.is_cuda else []
    with _untouched(model), torch.random.fork_rng(devices), torch.autocast(image.device.type, enabled=False):
        parts = [
            APGD(model, steps=100, loss="ce", **shared),
            APGDT(model, steps=100, **targets, **shared),
            FAB(model, steps=100, multi_targeted=True, **targets, **shared),
            Square(model, n_queries=5000, resc_schedule=False, **shared),
        ]
        return MultiAttack(parts)(image.float().contiguous(), label).detach()  # FAB takes views of it


def require_auto_attack(classes: int) -> None:
    """Raises MissingInputError without torchattacks, ConfigError for fewer than 4 classes."""
    if find_spec("torchattacks") is None:
        raise MissingInputError('AutoAttack needs torchattacks: pip install "mae_dat[autoattack]"')
    if classes < 4:
        raise ConfigError(f"AutoAttack compares the four highest logits, and this model has {classes} classes.")


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Others' code may call `backward` and `eval`: no parameter takes a gradient, every flag comes back."""
    training = {part: part.training for part in model.modules()}
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in learned:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in learned:
            weight.requires_grad_(True)
        for part, flag in training.items():
            part.training = flag


# ---- can it be believed? ----


def require_undeclared(model: Model) -> None:
    """Raises ConfigError for a bare network whose settings, timm's, say that it takes normalised pictures."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    mean, std = settings.get("mean", (0,)), settings.get("std", (1,))
    if any(mean) or set(std) != {1}:
        raise ConfigError(
            f"{type(model).__name__} takes pictures normalised by mean {mean} and std {std}, and an attack's eps is in "
            "pixels in [0, 1]: give mae_dat.models.classifier.Classifier(model, mean, std)."
        )


class Version(NamedTuple):
    """Pictures as a model may want them that does not take pixels in [0, 1]."""

    name: str
    made: Callable[[Tensor], Tensor]
    advice: str


def _normalised(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    return lambda image: (image - image.new_tensor(mean).view(-1, 1, 1)) / image.new_tensor(std).view(-1, 1, 1)


_CLASSIFIER = "mae_dat.models.classifier.Classifier(model, mean, std)"
_IMAGENET = _normalised(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
VERSIONS = (
    Version("normalised by mean 0.5 and std 0.5", _normalised([0.5], [0.5]), _CLASSIFIER),
    Version("normalised by ImageNet's mean and std", _IMAGENET, _CLASSIFIER),
    Version("from 0 to 255", lambda image: 255 * image, "lambda image: model(255 * image)"),
)
LOOK, LOOKS = 64, 16
"""Pictures of a look, and how many looks there are at most."""
MISTAKE = 1e-4
"""Probability that a good model is refused, at most."""


def require_pixel_model(model: Model, looks: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
    """Raises ConfigError for a model that knows more of the pictures when they are another `Version`.

    `looks`: up to `LOOKS` times colour pictures (B, 3, H, W), and which logits (B, K) are right for them, bool (B,).
    They are taken one by one until every version is decided. Of the pictures of which a model has one version alone
    right, one that takes [0, 1] has it in at least half of the cases there; it is refused where so few as are found had
    a probability below MISTAKE / (looks x versions). So the probability that any of the looks refuses it is below
    MISTAKE, for pictures drawn at random.
    """
    least = MISTAKE / (LOOKS * len(VERSIONS))
    known, counts = [0, 0], {version: [0, 0, 0] for version in VERSIONS}
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
            found = into_ball(image + of * (random_point(image, noise, generators) - image).sign(), image, noise)
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
