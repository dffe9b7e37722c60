"""Objectives: a batch in, a dictionary with `loss` and its named parts out. The engine knows none of them.

An objective draws its randomness once per step (`prepare`: mask noise, mixed labels), so that every view of the batch,
the clean and the adversarial one, is judged by the same mask or the same targets (`loss`). `WithDAT` wraps any of them.
"""

import contextlib
import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mae_dat.attacks.discrete import DiscreteAdversary, ShareController, discrete_adversary, encode
from mae_dat.config.groups import AttackConfig, AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.mae import MaskedAutoencoder, mask_noise, masked_mse
from mae_dat.models.split_norms import auxiliary_norms
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.runtime.world import all_mean

logger = logging.getLogger(__name__)

Parts = dict[str, Tensor]


def unwrapped(model: nn.Module) -> Any:
    """The module inside DistributedDataParallel, or the model itself."""
    return getattr(model, "module", model)


class Objective(ABC):
    """Maps (model, batch, generator) to a dictionary of scalars with `loss`."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The image to learn from, (B, C, H, W) in [0, 1], and all that judges it, such as targets or mask noise:
        tensors or lists with a row for each image, alone or in a tuple."""

    @abstractmethod
    def loss(self, model: nn.Module, image: Tensor, context: Any) -> Tensor:
        """Mean loss of a view of the image, a float32 scalar."""

    def parts(self, model: nn.Module, image: Tensor, context: Any) -> Parts:
        """`loss` of a view, with what of it is worth to be logged."""
        return {"loss": self.loss(model, image, context)}

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """The loss of one batch."""
        return self.parts(model, *self.prepare(model, batch, generator))

    def words_by(self, tokenizer: VisualTokenizer, context: Any) -> Tensor | None:
        """Words (B, h, w) of the image where `prepare` has had this tokenizer find them."""
        return None

    def begin(self, epoch: float) -> None:  # noqa: B027 - most keep no schedule
        """Is told, before each step, the fractional epoch that it stands at."""

    def observe(self, facts: Mapping[str, float]) -> None:  # noqa: B027 - most follow nothing
        """Is told a step's parts once they are read, the same on all ranks but for the losses: on a GPU that may be
        after the next step."""

    def state_dict(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """State from a checkpoint."""


class MaskedReconstruction(Objective):
    """He et al. 2021: predict the removed patches of the *clean* picture; mean squared error over them.

    With a tokenizer the target is its words of the clean picture, by their mean negative log-likelihood over the
    removed patches, in nats a word; with `words_weight` as the second of two targets, weighted so. The model then has
    a word head (`add_word_head`).
    """

    def __init__(
        self,
        mask_ratio: float,
        norm_pix: bool,
        tokenizer: VisualTokenizer | None = None,
        words_weight: float | None = None,
    ) -> None:
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.tokenizer, self.words_weight = tokenizer, words_weight

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The image, with (target patches (B, N, P) of the clean picture, mask noise (B, N), its words (B, h, w) where
        they are a target)."""
        image, inner = batch["image"], unwrapped(model)
        assert isinstance(inner, MaskedAutoencoder)
        noise = mask_noise(len(image), inner.num_patches, generator, image.device)
        words = (encode(self.tokenizer, image),) if self.tokenizer else ()
        return image, (inner.target(image, self.norm_pix), noise, *words)

    def loss(self, model: nn.Module, image: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Error of the prediction from a view of the picture, at its removed patches."""
        return self.parts(model, image, context)["loss"]

    def parts(self, model: nn.Module, image: Tensor, context: tuple[Tensor, ...]) -> Parts:
        """As `loss`; where words are a target also both losses and the share of words that are the most probable."""
        target, noise, *words = context
        if not words:
            prediction, mask = model(image, self.mask_ratio, noise)
            return {"loss": masked_mse(prediction.float(), target, mask)}
        by_patch = unwrapped(model).patch_words(words[0])
        prediction, mask, surprise, best = model(image, self.mask_ratio, noise, by_patch)
        of_words = surprise.mean()
        told = {"loss_words": of_words, "word_accuracy": best.mean()}
        if self.words_weight is None:
            return {"loss": of_words, **told}
        of_pixels = masked_mse(prediction.float(), target, mask)
        return {"loss": of_pixels + self.words_weight * of_words, "loss_pixels": of_pixels, **told}

    def words_by(self, tokenizer: VisualTokenizer, context: tuple[Tensor, ...]) -> Tensor | None:
        """The words that are a target, if they are this tokenizer's."""
        return context[2] if tokenizer is self.tokenizer else None


class Classification(Objective):
    """Cross-entropy with soft targets: mixup and cutmix where asked for, label smoothing always."""

    def __init__(self, augment: AugmentConfig, num_classes: int) -> None:
        self.num_classes, self.smoothing = num_classes, augment.smoothing
        self.mixup: Any = None
        if augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                cutmix_minmax=augment.cutmix_minmax,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                mode=augment.mixup_mode,
                label_smoothing=augment.smoothing,
                num_classes=num_classes,
            )

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The (mixed) image and soft targets (B, classes). timm's mixup draws from numpy's state, which the engine
        seeds per step."""
        image, label = batch["image"], batch["label"]
        if self.mixup is not None:
            return self.mixup(image.clone(), label)
        off = self.smoothing / self.num_classes
        return image, F.one_hot(label, self.num_classes).float() * (1 - self.smoothing) + off

    def loss(self, model: nn.Module, image: Tensor, context: Tensor) -> Tensor:
        """Mean cross-entropy against the soft targets."""
        return F.cross_entropy(model(image).float(), context)


class Around(Objective):
    """An objective that passes views of its own making to another one."""

    objective: Objective

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """As the wrapped objective."""
        return self.objective.prepare(model, batch, generator)

    def loss(self, model: nn.Module, image: Tensor, context: Any) -> Tensor:
        """As the wrapped objective."""
        return self.objective.loss(model, image, context)

    def begin(self, epoch: float) -> None:
        """As the wrapped objective."""
        self.objective.begin(epoch)

    def observe(self, facts: Mapping[str, float]) -> None:
        """As the wrapped objective."""
        self.objective.observe(facts)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped objective's."""
        return {"objective": self.objective.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.objective.load_state_dict(state["objective"])


class WithDAT(Around):
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
        self.found = self.checked = False
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
        image, context, gradient = first_rows((image, context, gradient), self.attacked(image))
        with auxiliary_norms(model):
            found = self.adversary(model, image, context, generator, gradient)
            parts = {**clean, "loss_adversarial": self.loss(model, found.adversarial, context)}
        return {"loss": torch.stack([*parts.values()]).sum(), **parts, **told, **self.told(found)}

    def attacked(self, image: Tensor) -> int:
        """How many pictures of a batch are attacked."""
        return max(1, round(self.attack.batch_share * len(image)))

    def told(self, found: DiscreteAdversary) -> Parts:
        """What to log of an attack: changed_words (share), eps, and the ramp of a warm-up."""
        changed = all_mean(found.changed_in(self.counted(found.adversarial)))
        ramp = {"dat_ramp": torch.full_like(changed, self.ramp)} if self.attack.warmup else {}
        return {"changed_words": changed, "eps": torch.full_like(changed, self.strength().eps), **ramp}

    def counted(self, image: Tensor) -> int:
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
        inner, told = unwrapped(model), {}

        def loss_of(view: Tensor) -> Tensor:
            told.update(self.objective.parts(inner, view, context))
            return told.pop("loss")

        loss, gradient = differentiated(loss_of, image, inner)
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
        inner, check = unwrapped(model), image.device.type == "cpu" or not self.checked
        self.checked = True
        words = self.objective.words_by(self.tokenizer, context)

        def attack_with(config: AttackConfig, source: torch.Generator) -> DiscreteAdversary:
            def loss_of(view: Tensor) -> Tensor:
                return self.loss(inner, view, context)

            with frozen(inner):
                return discrete_adversary(image, loss_of, self.tokenizer, config, source, gradient, check, words)

        if self.controller and not self.found:
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
            return float(all_mean(attack_with(config, _restarted(generator, state)).changed))

        controller.find(share_at)
        told = (controller.eps, 100 * share_at(controller.eps), 100 * controller.target)
        logger.info("eps %.4g changes %.1f %% of the words at the start (wanted: %.1f %%)", *told)
        self.found = True

    @property
    def ready(self) -> bool:
        """Whether the strength is known: always, but for a target share before the first step."""
        return self.found or self.controller is None

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
        own = {"controller": self.controller.state_dict()} if self.controller and self.found else {}
        return {**own, **super().state_dict(), "idle_steps": self.idle_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        super().load_state_dict(state)
        self.idle_steps = state["idle_steps"]
        if self.controller and "controller" in state:
            self.controller.load_state_dict(state["controller"])
            self.found = True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's parameters without gradients: a compiled model would compute them for an attack too, and any model
    keeps its activations for them. Shards stay as they are: they take the flag over when they are first gathered."""
    weights = [one for one in model.parameters() if one.requires_grad and not isinstance(one, DTensor)]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def first_rows(value: Any, count: int) -> Any:
    """The first images' part of a tensor or list with a row for each image, or of all that a tuple holds."""
    if isinstance(value, tuple):
        return tuple(first_rows(one, count) for one in value)
    return value[:count] if isinstance(value, Tensor | list) else value


def differentiated(loss_of: Callable[[Tensor], Tensor], image: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at the image, from one backward pass that serves the model's parameters too.

    Their gradients wait in the loss, and are handed on when the sum that it is part of is differentiated: DDP,
    accumulation and the optimizer see one backward pass like any other. For a model that is not in shards.
    """
    image = image.detach().requires_grad_()
    loss = loss_of(image)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.autocast(image.device.type, enabled=False):  # as the engine's own backward pass
        gradient, *known = torch.autograd.grad(loss, [image, *weights])
    handed_on: Tensor = _KnownGradient.apply(loss.detach(), known, *weights)
    return handed_on, gradient.float()


class _KnownGradient(torch.autograd.Function):
    """(loss, its gradients at the weights, the weights) -> loss, whose backward pass hands those gradients on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return (None, None, *(factor * gradient for gradient in ctx.saved_tensors))


def _restarted(generator: torch.Generator, state: Tensor) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(state)
    return copy
