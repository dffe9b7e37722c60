"""Discrete Adversarial Training (Mao et al., 2022) around any objective."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.discrete import DiscreteAdversary, discrete_adversary
from mae_dat.attacks.share_controller import ShareController
from mae_dat.config.groups import AttackConfig, DataConfig, DatConfig
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
    over its images: where a share of the batch is attacked, L(adversarial) estimates the whole batch's, unweighted. The
    share of changed words is part of the result, and a warning is given while it is 0: the quantizer then snaps every
    step back and DAT does nothing.
    """

    WARN_AFTER, WARN_EVERY = 3, 200
    READABLE = 0.1

    def __init__(self, objective: Objective, tokenizer: VisualTokenizer, attack: AttackConfig) -> None:
        self.objective, self.tokenizer, self.attack = objective, tokenizer, attack
        self.controller = ShareController(attack) if attack.share is not None and attack.moves_pixels else None
        self.strength_is_known = self.controller is None  # the search for it needs a batch
        self.checked = False
        self.idle_steps = 0
        self.ramp = 1.0

    def begin(self, epoch: float) -> None:
        """Sets the share of the strength that the warm-up has come to."""
        self.ramp = self.attack.ramp(epoch)
        super().begin(epoch)

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """One DAT step; parts: loss, loss_clean, loss_adversarial, changed_words (share), eps."""
        image, context = self.prepare(model, batch, generator)
        clean, told, gradient = self.clean_loss(model, image, context)
        image, context, gradient = first_rows((image, context, gradient), self.attack_count(image))
        with auxiliary_norms(model):
            adversary = self.adversary(model, image, context, generator, gradient)
            parts = {**clean, "loss_adversarial": self.loss(model, adversary.adversarial, context)}
        return {"loss": torch.stack([*parts.values()]).sum(), **parts, **told, **self.attack_metrics(adversary)}

    def attack_count(self, image: Tensor) -> int:
        """How many pictures of a batch are attacked."""
        return max(1, round(self.attack.batch_share * len(image)))

    def attack_metrics(self, adversary: DiscreteAdversary) -> Parts:
        """What to log of an attack: changed_words (share), eps, and the ramp of a warm-up."""
        changed = all_mean(adversary.changed_share_in_first(self.counted_images(adversary.adversarial)))
        ramp = {"dat_ramp": torch.full_like(changed, self.ramp)} if self.attack.warmup else {}
        return {"changed_words": changed, "eps": torch.full_like(changed, self.strength().eps), **ramp}

    def counted_images(self, image: Tensor) -> int:
        """In how many of a batch's pictures changed words are counted: to encode Q(x) again for all would cost a sixth
        of both reconstructions. A target share is held by more words than a log needs."""
        least, enough, most = (1 / 8, 512, 1 / 2) if self.controller else (1 / 32, 256, 1 / 4)
        words = max(1, image[0, 0].numel() // self.tokenizer.factor**2)
        wanted = max(least * len(image), enough / words)
        return math.ceil(min(wanted, most * len(image)))

    def clean_loss(self, model: nn.Module, image: Tensor, context: Any) -> tuple[Parts, Parts, Tensor | None]:
        """L(clean), if it counts, and what to log beside it; with `free` also its gradient at the image, from one
        backward pass for both."""
        if not self.attack.clean_weight:
            return {}, {}, None
        if not self.attack.free:
            told = self.objective.parts(model, image, context)
            return {"loss_clean": told.pop("loss")}, told, None
        inner, told = unwrap_ddp(model), {}

        def loss_of(view: Tensor) -> Tensor:
            told.update(self.objective.parts(inner, view, context))
            return told.pop("loss")

        loss, gradient = loss_and_gradient(loss_of, image, inner)
        return {"loss_clean": loss}, told, gradient

    def adversary(
        self,
        model: nn.Module,
        image: Tensor,
        context: Any,
        generator: torch.Generator,
        gradient: Tensor | None = None,
    ) -> DiscreteAdversary:
        """The attack on this batch, with the `gradient` at its images if that is known already. It runs on the bare
        module: DDP's hooks see nothing of it."""
        inner, check = unwrap_ddp(model), image.device.type == "cpu" or not self.checked
        self.checked = True
        words = self.objective.known_words(self.tokenizer, context)

        def attack_with(config: AttackConfig, source: torch.Generator) -> DiscreteAdversary:
            def loss_of(view: Tensor) -> Tensor:
                return self.loss(inner, view, context)

            with frozen_parameters(inner):
                return discrete_adversary(image, loss_of, self.tokenizer, config, source, gradient, check, words)

        if self.controller and not self.strength_is_known:
            self.find_strength(self.controller, attack_with, generator)
        return attack_with(self.strength(), generator)

    def find_strength(
        self,
        controller: ShareController,
        attack_with: Callable[[AttackConfig, torch.Generator], DiscreteAdversary],
        generator: torch.Generator,
    ) -> None:
        """Searches, before the first step, the eps that changes the target share of this batch's words."""
        # Every try starts from the same random state, so that the search compares strengths and nothing else.
        state = generator.get_state()

        def share_at(eps: float) -> float:
            config = dataclasses.replace(self.attack, eps=eps)
            return float(all_mean(attack_with(config, _restarted(generator, state)).changed_share))

        controller.find(share_at)
        told = (controller.eps, 100 * share_at(controller.eps), 100 * controller.target)
        logger.info("eps %.4g changes %.1f %% of the words at the start (wanted: %.1f %%)", *told)
        self.strength_is_known = True

    def strength(self) -> AttackConfig:
        """The attack as it stands now, with the controller's eps and so far as it is warmed up."""
        full = self.controller.apply(self.attack) if self.controller else self.attack
        return full if self.ramp == 1 else full.scaled(self.ramp)

    def observe(self, facts: Mapping[str, float]) -> None:
        """Follows the share of changed words; warns while it is 0."""
        share, ramp = facts["changed_words"], facts.get("dat_ramp", 1.0)
        # The target is warmed up like the step. A small part of it is a few words, and their number chance.
        if self.controller and (ramp >= self.READABLE or share > self.controller.target):
            self.controller.observe(share / ramp)
        weak = share == 0 and self.attack.moves_pixels and ramp == 1
        self.idle_steps = self.idle_steps + 1 if weak else 0
        if self.idle_steps % self.WARN_EVERY == self.WARN_AFTER:
            logger.warning(
                "the adversary changed no visual word for %d steps: eps %.3g is too small at this size and tokenizer. "
                "Give the strength as a share of words instead, such as --dat_share 0.04.",
                self.idle_steps,
                self.strength().eps,
            )
        super().observe(facts)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state and the wrapped objective's."""
        own = {"controller": self.controller.state_dict()} if self.controller and self.strength_is_known else {}
        return {**own, **super().state_dict(), "idle_steps": self.idle_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        super().load_state_dict(state)
        self.idle_steps = state["idle_steps"]
        if self.controller and "controller" in state:
            self.controller.load_state_dict(state["controller"])
            self.strength_is_known = True


def first_rows(value: Any, count: int) -> Any:
    """The first images' part of a tensor or list with a row for each image, or of all that a tuple holds."""
    if isinstance(value, tuple):
        return tuple(first_rows(one, count) for one in value)
    return value[:count] if isinstance(value, Tensor | list) else value


def _restarted(generator: torch.Generator, state: Tensor) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(state)
    return copy


def with_dat(
    objective: Objective, dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False
) -> Objective:
    """The objective itself, or wrapped in DAT with its tokenizer."""
    if dat.attack is None:
        return objective
    return WithDAT(objective, open_tokenizer(dat, data, device, pad), dat.attack)


def open_tokenizer(dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False) -> VisualTokenizer:
    """The tokenizer of the flags, after a check that the sizes fit; with `pad` all of them do."""
    tokenizer = in_precision(load_tokenizer(dat.tokenizer), device, dat.tokenizer_precision, dat.tokenizer_compile)
    if pad:
        tokenizer = PaddedTokenizer(tokenizer, data.image_size)
    tokenizer.check(torch.zeros(1, data.in_chans, *data.image_size))
    facts = (dat.tokenizer, tokenizer.factor, tokenizer.num_words, dat.dat)
    logger.info("tokenizer %s: factor %d, %d words; DAT: %s", *facts)
    return tokenizer
