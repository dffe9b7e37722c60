"""Discrete Adversarial Training (Mao et al. 2022) around any objective."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.discrete import DiscreteAdversary, discrete_adversary
from mae_dat.attacks.share_controller import ShareController
from mae_dat.config.adversaries import AttackConfig, DatConfig
from mae_dat.config.groups import DataConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import frozen_parameters, unwrap_ddp
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.models.tokenizer import in_precision, load_tokenizer
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.tokenizer.padded import PaddedTokenizer
from mae_dat.runtime.collectives import all_mean
from mae_dat.training.objectives.base import Objective, ObjectiveWrapper, Parts
from mae_dat.training.objectives.free_gradient import loss_and_gradient

logger = logging.getLogger(__name__)


class WithDAT(ObjectiveWrapper):
    """Discrete Adversarial Training around any objective.

    loss = w L(clean) + L(adversarial), with w = 1 in the released code and 0 in the paper's Algorithm 1. Each is a mean
    over its images; if only a share of the batch is attacked, L(adversarial) estimates the whole batch's, unweighted.
    The share of changed words is part of the result. A warning is logged while it is 0: the quantizer then rounds every
    step away, and DAT has no effect.

    `strength_is_known`: whether the attack has an eps. Only a target share has none, until the first step.
    """

    WARN_AFTER, WARN_EVERY = 3, 200
    """Steps without a changed word before the first warning, and between two warnings."""
    MIN_RAMP = 0.1
    """Part of the warm-up from which the share of changed words is precise enough to adjust eps."""

    def __init__(self, objective: Objective, tokenizer: VisualTokenizer, attack: AttackConfig) -> None:
        self.objective, self.tokenizer, self.attack = objective, tokenizer, attack
        self.controller = ShareController(attack) if attack.share is not None and attack.moves_pixels else None
        self.strength_is_known = self.controller is None
        self.pixels_checked = False
        self.idle_steps = 0
        self.ramp = 1.0

    def begin(self, epoch: float) -> None:
        """Set the share of the strength that the warm-up has reached at this fractional epoch."""
        self.ramp = self.attack.ramp(epoch)
        super().begin(epoch)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """Compute one DAT step; parts: loss, loss_clean, loss_adversarial, changed_words (share), eps."""
        image, prepared = self.prepare(model, batch, generator)
        clean, logged, gradient = self.clean_loss(model, image, prepared)
        image, prepared, gradient = first_rows((image, prepared, gradient), self.attack_count(image))
        with auxiliary_norms(model):
            adversary = self.adversary(model, image, prepared, generator=generator, gradient=gradient)
            losses = {**clean, "loss_adversarial": self.loss(model, adversary.adversarial, prepared)}
        return {"loss": torch.stack([*losses.values()]).sum(), **losses, **logged, **self.attack_metrics(adversary)}

    def clean_loss(self, model: nn.Module, image: Tensor, prepared: Any) -> tuple[Parts, Parts, Tensor | None]:
        """Compute L(clean) if it has a weight: (`loss_clean`, scalars to log, gradient at the image (B, C, H, W)).

        Only a `free` attack has the gradient, from the one backward pass that also serves the parameters.
        """
        if not self.attack.clean_weight:
            return {}, {}, None
        if not self.attack.free:
            logged = self.objective.parts(model, image, prepared)
            return {"loss_clean": logged.pop("loss")}, logged, None
        bare_model, logged = unwrap_ddp(model), {}

        def loss_fn(view: Tensor) -> Tensor:
            logged.update(self.objective.parts(bare_model, view, prepared))
            return logged.pop("loss")

        loss, gradient = loss_and_gradient(loss_fn, image, bare_model)
        return {"loss_clean": loss}, logged, gradient

    def attack_count(self, image: Tensor) -> int:
        """Return how many images of the batch (B, C, H, W) are attacked."""
        return max(1, round(self.attack.batch_share * len(image)))

    def adversary(
        self,
        model: nn.Module,
        image: Tensor,
        prepared: Any,
        generator: torch.Generator,
        gradient: Tensor | None = None,
    ) -> DiscreteAdversary:
        """Attack this batch (B, C, H, W); `gradient` is dL/dimage if it is known. DDP's hooks do not run.

        The first call with a target share searches the strength.
        """
        bare_model = unwrap_ddp(model)
        # On a GPU the check waits for the image, so only the first batch is checked.
        check = image.device.type == "cpu" or not self.pixels_checked
        self.pixels_checked = True
        words = self.objective.known_words(self.tokenizer, prepared)

        def attack_batch(config: AttackConfig, generator: torch.Generator) -> DiscreteAdversary:
            with frozen_parameters(bare_model):
                return discrete_adversary(
                    image,
                    lambda view: self.loss(bare_model, view, prepared),
                    self.tokenizer,
                    config=config,
                    generator=generator,
                    gradient=gradient,
                    check=check,
                    words=words,
                )

        if self.controller and not self.strength_is_known:
            self.find_strength(self.controller, attack_batch, generator)
        return attack_batch(self.strength(), generator)

    def find_strength(
        self,
        controller: ShareController,
        attack_batch: Callable[[AttackConfig, torch.Generator], DiscreteAdversary],
        generator: torch.Generator,
    ) -> None:
        """Search the eps that changes the target share of this batch's words, before the first step."""
        # Every attempt starts from the same random state, so only the strength differs.
        state = generator.get_state()

        def share_at(eps: float) -> float:
            config = dataclasses.replace(self.attack, eps=eps)
            return float(all_mean(attack_batch(config, _generator_at(state, generator.device)).changed_share))

        controller.find(share_at)
        # This attacks once more, for the log line alone: the search does not return the share at its result.
        logger.info(
            "eps %.4g changes %.1f %% of the words at the start (target: %.1f %%)",
            controller.eps,
            100 * share_at(controller.eps),
            100 * controller.target,
        )
        self.strength_is_known = True

    def strength(self) -> AttackConfig:
        """Return the current attack: with the controller's eps, scaled by the warm-up."""
        attack = self.controller.apply(self.attack) if self.controller else self.attack
        return attack if self.ramp == 1 else attack.scaled(self.ramp)

    def attack_metrics(self, adversary: DiscreteAdversary) -> Parts:
        """Return what to log of an attack: changed_words (share), eps, and dat_ramp if there is a warm-up."""
        count = self.counted_images(adversary.adversarial)
        changed = all_mean(adversary.changed_share_in_first(count))
        ramp = {"dat_ramp": torch.full_like(changed, self.ramp)} if self.attack.warmup else {}
        return {"changed_words": changed, "eps": torch.full_like(changed, self.strength().eps), **ramp}

    def counted_images(self, image: Tensor) -> int:
        """Return in how many images of the batch (B, C, H, W) changed words are counted.

        Encoding Q(x) again for all of them would cost a sixth of both reconstructions. So it is done for enough images
        to have `enough_words` words, but for no less than `least_share` of the batch and no more than `most_share`.
        """
        if self.controller:  # its eps follows this number, which must therefore vary less than one for the log
            least_share, enough_words, most_share = 1 / 8, 512, 1 / 2
        else:
            least_share, enough_words, most_share = 1 / 32, 256, 1 / 4
        words_per_image = max(1, image[0, 0].numel() // self.tokenizer.factor**2)
        count = max(least_share * len(image), enough_words / words_per_image)
        return math.ceil(min(count, most_share * len(image)))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Adjust eps to the share of changed words; warn while it is 0."""
        share, ramp = metrics["changed_words"], metrics.get("dat_ramp", 1.0)
        # The target is warmed up like the step. Early in the warm-up it is a few words, whose number is mostly chance.
        if self.controller and (ramp >= self.MIN_RAMP or share > self.controller.target):
            self.controller.observe(share / ramp)
        is_idle = share == 0 and self.attack.moves_pixels and ramp == 1
        self.idle_steps = self.idle_steps + 1 if is_idle else 0
        if self.idle_steps % self.WARN_EVERY == self.WARN_AFTER:
            logger.warning(
                "the adversary changed no visual word for %d steps: eps %.3g is too small at this size and tokenizer. "
                "Give the strength as a share of words instead, such as --dat_share 0.04.",
                self.idle_steps,
                self.strength().eps,
            )
        super().observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the controller's, the wrapped objective's, and `idle_steps`."""
        controller = {"controller": self.controller.state_dict()} if self.controller and self.strength_is_known else {}
        return {**controller, **super().state_dict(), "idle_steps": self.idle_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(state)
        self.idle_steps = state["idle_steps"]
        if self.controller and "controller" in state:
            self.controller.load_state_dict(state["controller"])
            self.strength_is_known = True


def first_rows(value: Any, count: int) -> Any:
    """Return the rows of the first `count` images of all that an objective prepares.

    Of a tensor or list these are its first entries. In a tuple, also a nested one, every entry is cut. Anything else,
    such as a detector's seed (an int) or a gradient that is None, belongs to the whole batch and stays as it is.
    """
    if isinstance(value, tuple):
        return tuple(first_rows(entry, count) for entry in value)
    return value[:count] if isinstance(value, Tensor | list) else value


def _generator_at(state: Tensor, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def with_dat(
    objective: Objective, dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False
) -> Objective:
    """Wrap the objective in DAT with its tokenizer; return it unchanged without an attack."""
    if dat.attack is None:
        return objective
    return WithDAT(objective, open_tokenizer(dat, data, device, pad), dat.attack)


def open_tokenizer(dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False) -> VisualTokenizer:
    """Load the configured tokenizer and check that it fits the image size; with `pad` every size fits.

    Raises ConfigError for a size that does not fit.
    """
    tokenizer = in_precision(load_tokenizer(dat.tokenizer), device, dat.tokenizer_precision, dat.tokenizer_compile)
    if pad:
        tokenizer = PaddedTokenizer(tokenizer, data.image_size)
    tokenizer.check(torch.zeros(1, data.in_chans, *data.image_size))
    logger.info(
        "tokenizer %s: factor %d, %d words; DAT: %s", dat.tokenizer, tokenizer.factor, tokenizer.num_words, dat.kind
    )
    return tokenizer
