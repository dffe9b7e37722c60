"""AutoAttack (Croce and Hein 2020), built from the parts of the package torchattacks."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.gradient import require_pixels
from mae_dat.attacks.pixel import Norm, predict_logits
from mae_dat.config.errors import ConfigError
from mae_dat.config.extras import require_extra
from mae_dat.models.modes import frozen_parameters, restore_training_flags

AUTO_ATTACK_EPS = 4 / 255  # RobustBench's, for ImageNet


def auto_attack(
    model: nn.Module, image: Tensor, label: Tensor, eps: float = AUTO_ATTACK_EPS, norm: Norm = "linf", seed: int = 0
) -> Tensor:
    """Run the standard AutoAttack: APGD-CE, targeted APGD and FAB (9 targets), Square; returns (B, C, H, W) in [0, 1].

    The parts have the original's settings; torchattacks' own `AutoAttack` stops after 10 steps instead of 100. Random
    numbers are drawn for the whole batch, so the result depends on how images are batched. `image` (B, C, H, W) in
    [0, 1], `label` (B,). Raises MissingInputError without torchattacks, ValueError for pixels outside [0, 1],
    ConfigError for fewer than 4 classes.
    """
    require_pixels(image)
    classes = predict_logits(model, image[:1]).shape[1]
    require_auto_attack(classes)
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    shared: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}
    targets = {"n_classes": min(10, classes)}
    devices = [image.device] if image.is_cuda else []
    # torchattacks calls `backward` and `eval`: exclude the parameters from gradients and restore every training flag.
    with (
        restore_training_flags(model),
        frozen_parameters(model),
        torch.random.fork_rng(devices),
        torch.autocast(image.device.type, enabled=False),
    ):
        parts = [
            APGD(model, steps=100, loss="ce", **shared),
            APGDT(model, steps=100, **targets, **shared),
            FAB(model, steps=100, multi_targeted=True, **targets, **shared),
            Square(model, n_queries=5000, resc_schedule=False, **shared),
        ]
        return MultiAttack(parts)(image.float().contiguous(), label).detach()  # FAB takes views of it


def require_auto_attack(classes: int) -> None:
    """Raise MissingInputError without torchattacks, ConfigError for fewer than 4 classes."""
    require_extra("autoattack", "AutoAttack")
    if classes < 4:
        raise ConfigError(f"AutoAttack needs at least 4 classes (it compares the four highest logits), got {classes}.")
