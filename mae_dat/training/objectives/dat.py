"""Discrete Adversarial Training (Mao et al. 2022) around any objective, in our training loop or in your own."""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.attacks.discrete import DiscreteAdversary, discrete_adversary
from mae_dat.attacks.gradient import LossFn, LossPerImage
from mae_dat.attacks.share_controller import ShareController
from mae_dat.config.adversaries import NO_STRENGTH, PUBLISHED_SHARE, AttackConfig, DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DataConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import Network, frozen_parameters, unwrap_ddp
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.models.tokenizer import in_precision, load_tokenizer
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.tokenizer.padded import PaddedTokenizer
from mae_dat.runtime.collectives import all_mean
from mae_dat.training.objectives.base import Objective, ObjectiveWrapper, Parts
from mae_dat.training.objectives.free_gradient import loss_and_gradient
from mae_dat.training.objectives.own_loop import (
    Criterion,
    CriterionObjective,
    MetricsCopy,
    as_module,
    batch_from,
    seeded_generator,
)
from mae_dat.training.step_report import report_lag

logger = logging.getLogger(__name__)


class WithDAT(ObjectiveWrapper):
    """Discrete Adversarial Training: the loss of a batch and of its adversary, in your own training loop.

    loss = w L(clean) + L(adversarial), with w = 1 in the released code and 0 in the paper's Algorithm 1. Each is a mean
    over its images; if only a share of the batch is attacked, L(adversarial) estimates the whole batch's, unweighted.
    The share of changed words is part of the result. One warning is logged if it stays below 0.5 %: the quantizer then
    rounds nearly every step away, and DAT has hardly any effect.

    `strength_is_known`: whether the attack has an eps. Only a target share has none, until the first step.
    `last_adversary`: the result of the attack in the last call, for images and statistics; None before.

    Args:
        tokenizer: the visual words, from `load_tokenizer`. It is moved to the device of the images.
        attack: the adversary. By default it changes 3.8 % of the words, as in the paper.
        objective: what the model is trained for: a criterion of logits and labels, which returns the mean over the
            batch, such as `nn.CrossEntropyLoss(label_smoothing=0.1)`; or an `Objective`. By default cross-entropy.

    Examples:
        >>> import mae_dat, torch
        >>> dat = mae_dat.WithDAT(mae_dat.load_tokenizer(), mae_dat.AttackConfig(share=0.04))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        >>> loader = [(torch.rand(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))]
        >>> for images, labels in loader:  # float (B, C, H, W) in [0, 1], and int64 (B,)
        ...     loss = dat(model, images, labels)
        ...     loss.backward()
        >>> sorted(dat.metrics)
        ['changed_words', 'eps', 'loss', 'loss_adversarial', 'loss_clean']
    """

    WEAK_SHARE, WARN_AFTER = 0.005, 3
    """An adversary is weak if it changes less than this share of the words, on average over this number of steps."""
    MIN_RAMP = 0.1
    """Part of the ramp from which the share of changed words is precise enough to adjust eps."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        attack: AttackConfig | None = None,
        objective: Objective | Criterion = F.cross_entropy,
    ) -> None:
        self.tokenizer, self.attack = tokenizer, attack or AttackConfig(share=PUBLISHED_SHARE)
        self.objective = objective if isinstance(objective, Objective) else CriterionObjective(objective)
        if self.attack.rescore and type(self.objective).loss_per_image is Objective.loss_per_image:
            raise ConfigError(
                "--dat_rescore needs the loss of each image, which only classification has: leave it out."
            )
        self.controller = (
            ShareController(self.attack) if self.attack.share is not None and self.attack.moves_pixels else None
        )
        self.strength_is_known = self.controller is None
        self.pixels_checked = False
        self.ramp, self.is_held = 1.0, False
        self.last_adversary: DiscreteAdversary | None = None
        self._recent_shares: deque[float] = deque(maxlen=self.WARN_AFTER)
        self._weakness_reported = False
        self._newest_metrics: MetricsCopy | None = None
        self._unobserved: deque[MetricsCopy] = deque()
        """The metrics of the calls that `observe` has not had yet."""

    def __repr__(self) -> str:
        return f"WithDAT({type(self.tokenizer).__name__}, {self.attack}, {type(self.objective).__name__})"

    def __call__(
        self,
        model: Network,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        epoch: float | None = None,
    ) -> Tensor:
        """Compute the loss of a batch in your own training loop, a scalar; call `backward` on it.

        model: maps images in [0, 1] to logits (B, K): any module, also inside DistributedDataParallel or under
            autocast. Normalization belongs to the model.
        images: float (B, C, H, W) in [0, 1].
        labels: class indices int64 (B,), or probabilities (B, K) from mixup or label smoothing. Objectives that need
            none, such as `MaskedReconstruction`, accept None.
        generator: the source of the attack's random start, on the device of the images. By default every call draws a
            seed from torch's global generator, so `torch.manual_seed` makes a run repeatable.
        epoch: the fractional epoch, which only an attack with `hold_epochs` or `ramp_epochs` needs.

        With a share, the first call searches the eps that changes this share of the words, and every call adjusts it to
        the steps before. With torch.distributed all ranks must call together. Raises ValueError for images or labels
        of another form, and ConfigError for settings that do not fit.
        """
        if self.attack.has_schedule and epoch is None:
            raise ConfigError("an AttackConfig with hold_epochs or ramp_epochs needs the epoch: dat(..., epoch=0.5).")
        batch, module = batch_from(images, labels), as_module(model, free=self.attack.free)
        if self.tokenizer.codebook.device != images.device:
            self.tokenizer.to(images.device)
        # As late as in the training loop, so that a GPU does not wait for the host.
        while len(self._unobserved) > report_lag(images.device):
            self.observe(self._unobserved.popleft().read())
        self.begin(epoch or 0.0)
        parts, self.last_adversary = self.attack_step(module, batch, generator or seeded_generator(images.device))
        self._newest_metrics = MetricsCopy(parts)
        self._unobserved.append(self._newest_metrics)
        return parts["loss"]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the last call: loss, loss_clean, loss_adversarial, changed_words (share of the words), eps.

        Reading them waits for the device, so read them every few steps only. Empty before the first call.
        """
        return self._newest_metrics.read() if self._newest_metrics else {}

    def begin(self, epoch: float) -> None:
        """Set the share of the strength that its schedule has reached at this fractional epoch."""
        self.ramp, self.is_held = self.attack.ramp(epoch), epoch < self.attack.hold_epochs
        super().begin(epoch)

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """Compute one DAT step; parts: loss, loss_clean, loss_adversarial, changed_words (share), eps."""
        return self.attack_step(model, batch, generator)[0]

    def attack_step(
        self, model: nn.Module, batch: Batch, generator: torch.Generator
    ) -> tuple[Parts, DiscreteAdversary]:
        """Compute one DAT step (see `step`) and return it with its adversary."""
        image, prepared = self.prepare(model, batch, generator)
        clean, logged, gradient = self.clean_loss(model, image, prepared)
        image, prepared, gradient = first_rows((image, prepared, gradient), self.attack_count(image))
        with auxiliary_norms(model):
            adversary = self.adversary(model, image, prepared, generator=generator, gradient=gradient)
            losses = {**clean, "loss_adversarial": self.loss(model, adversary.adversarial, prepared)}
        loss = torch.stack([*losses.values()]).sum()
        return {"loss": loss, **losses, **logged, **self.attack_metrics(adversary)}, adversary

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

        The first call with a target share searches the strength, but not before the adversary has any.
        """
        bare_model = unwrap_ddp(model)
        # On a GPU the check waits for the image, so only the first batch is checked.
        check = image.device.type == "cpu" or not self.pixels_checked
        self.pixels_checked = True
        words = self.objective.known_words(self.tokenizer, prepared)
        loss_fn: LossFn = lambda view: self.loss(bare_model, view, prepared)  # noqa: E731
        if self.attack.rescore:
            loss_fn = LossPerImage(lambda view: self.objective.loss_per_image(bare_model, view, prepared))

        def attack_batch(config: AttackConfig, generator: torch.Generator) -> DiscreteAdversary:
            with frozen_parameters(bare_model):
                return discrete_adversary(
                    image,
                    loss_fn,
                    self.tokenizer,
                    config=config,
                    generator=generator,
                    gradient=gradient,
                    check=check,
                    words=words,
                )

        if self.controller and not self.strength_is_known and not self.is_held:
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
        """Return the current attack: with the controller's eps, scaled by the schedule."""
        attack = self.controller.apply(self.attack) if self.controller else self.attack
        return attack if self.ramp == 1 else attack.scaled(self.ramp)

    def attack_metrics(self, adversary: DiscreteAdversary) -> Parts:
        """Return what to log of an attack: changed_words (share), eps, and adversary_ramp if there is a schedule."""
        count = self.counted_images(adversary.adversarial)
        changed = all_mean(adversary.changed_share_in_first(count))
        ramp = {"adversary_ramp": torch.full_like(changed, self.ramp)} if self.attack.has_schedule else {}
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
        """Adjust eps to the share of changed words; warn once if the adversary is weak."""
        share = metrics["changed_words"]
        ramp = metrics.get(
            "adversary_ramp", metrics.get("dat_ramp", 1.0)
        )  # the second is the name in older checkpoints
        # The target grows like the strength. Early in the ramp it is a few words, whose number is mostly chance.
        if self.controller and (ramp >= self.MIN_RAMP or (ramp > NO_STRENGTH and share > self.controller.target)):
            self.controller.observe(share / ramp)
        if ramp == 1:
            self._warn_if_weak(share)
        super().observe(metrics)

    def _warn_if_weak(self, share: float) -> None:
        """Log one warning if the last steps, this one with `share` included, changed almost no words.

        A controller that holds a smaller share than that was asked to; it is weak only where no word changes.
        """
        self._recent_shares.append(share)
        mean = sum(self._recent_shares) / self.WARN_AFTER
        is_weak = mean == 0 or (mean < self.WEAK_SHARE and not self.controller)
        if not (is_weak and self.attack.moves_pixels and len(self._recent_shares) == self.WARN_AFTER):
            return
        if not self._weakness_reported:
            logger.warning(
                "the adversary changed %.2g %% of the visual words in the last %d steps: eps %.3g is too small at this "
                "image size and with this tokenizer, and DAT has hardly any effect. Give the strength as a share of "
                "words: AttackConfig(share=%g), on the command line --dat_share %g.",
                100 * mean,
                self.WARN_AFTER,
                self.strength().eps,
                PUBLISHED_SHARE,
                PUBLISHED_SHARE,
            )
        self._weakness_reported = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the controller's, the wrapped objective's, and the metrics of your own
        loop that were not observed yet."""
        controller = {"controller": self.controller.state_dict()} if self.controller and self.strength_is_known else {}
        unobserved = {"unobserved": [metrics.read() for metrics in self._unobserved]} if self._unobserved else {}
        return {**controller, **super().state_dict(), **unobserved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(state)
        self._unobserved = deque(map(MetricsCopy.from_host, state.get("unobserved", [])))
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
    return WithDAT(open_tokenizer(dat, data, device, pad), dat.attack, objective)


def open_tokenizer(dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False) -> VisualTokenizer:
    """Load the configured tokenizer and check that it fits the image size; with `pad` every size fits.

    Raises ConfigError for a size that does not fit.
    """
    tokenizer = in_precision(load_tokenizer(dat.tokenizer), device, dat.tokenizer_precision, dat.tokenizer_compile)
    if pad:
        tokenizer = PaddedTokenizer(tokenizer, data.image_size)
    tokenizer.check(torch.zeros(1, data.in_chans, *data.image_size))
    return tokenizer
