"""Discrete adversaries (Mao et al. 2022, "Enhance the Visual Representation via Discrete Adversarial Training").

A tokenizer Q and *a function from pixels to a scalar loss* are all that an attack needs, so the same code serves
classification, masked autoencoding and detection. No gradient passes through Q: dQ(x)/dx is taken for the identity
(section 3.3), and every reconstruction runs without autograd; `symbolic`, which is not the paper's, differentiates Q's
decoder. An attack leaves no trace: no parameter gradient, no training flag changed. Shapes: image (B, C, H, W) in
[0, 1]; words (B, h, w).
"""

import hashlib
import logging
import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mae_dat.attacks.gradient import LossFn, input_gradient, project, require_pixels, unit
from mae_dat.attacks.share_controller import ShareController
from mae_dat.attacks.symbolic import nearest_codes, symbolic_words
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import AttackConfig
from mae_dat.models.tokenizer.base import VisualTokenizer, share_changed

__all__ = ["AttackConfig", "DiscreteAdversary", "ShareController", "discrete_adversary", "random_words"]

logger = logging.getLogger(__name__)


class DiscreteAdversary:
    """What an attack found.

    `adversarial` is the adversarial image in [0, 1], decoded from `adversarial_words`. What an attack does not need is
    given as a function, and costs a pass of the tokenizer only if somebody asks for it.
    """

    def __init__(
        self,
        reconstruction: Tensor | Callable[[], Tensor],
        adversarial: Tensor,
        words: Tensor | Callable[[int], Tensor],
        adversarial_words: Tensor,
    ) -> None:
        """`words` may be a function that encodes so many pictures of the batch, the first ones."""
        self._reconstruction, self.adversarial = reconstruction, adversarial
        self._words, self.adversarial_words = words, adversarial_words

    @cached_property
    def reconstruction(self) -> Tensor:
        """Q(x), an image in [0, 1]."""
        return self._reconstruction if isinstance(self._reconstruction, Tensor) else self._reconstruction()

    @cached_property
    def words(self) -> Tensor:
        """Visual words of the picture that was attacked: of Q(x) (`released`) or of x (all others)."""
        return self._words if isinstance(self._words, Tensor) else self._words(len(self.adversarial_words))

    @property
    def changed_share(self) -> Tensor:
        """Share of words that the attack changed, a scalar in [0, 1]."""
        return share_changed(self.words, self.adversarial_words)

    def changed_share_in_first(self, pictures: int) -> Tensor:
        """`changed_share`; counted in so many pictures of the batch alone where the words of more had to be encoded."""
        if isinstance(self._words, Tensor):
            return self.changed_share
        return share_changed(self._words(pictures), self.adversarial_words[:pictures])


def discrete_adversary(
    image: Tensor,
    loss_of: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    generator: torch.Generator,
    gradient: Tensor | None = None,
    check: bool = True,
    words: Tensor | None = None,
) -> DiscreteAdversary:
    """Changes visual words of `image` to raise `loss_of`; or, as baselines, at random or not at all (`reconstruction`).

    `loss_of` maps an image to the mean loss of the batch, a scalar, and closes over targets, mask or boxes. `generator`
    lives on the image's device. `released` takes a `gradient` that is known already, dL/dimage, for its own; the
    image's `words`, where they are known, save all but `released` at the image an encoding. Raises ConfigError when the
    size does not fit the tokenizer or only a share is given where eps is the strength, and ValueError when pixels leave
    [0, 1] by more than 1e-6: that `check` waits for the image.
    """
    if math.isnan(config.eps):
        raise ConfigError(
            f"one attack by `{config.kind}` has the strength eps, and AttackConfig(share={config.share}) gives none: "
            "WithDAT finds and holds it, and so do ShareController's find and apply; or give eps."
        )
    if check:
        require_pixels(image)
    image = image.detach().float()
    if config.kind == "released":
        return _released(image, loss_of, tokenizer, config, generator, gradient, words)
    words = encode_words(tokenizer, image) if words is None else words
    if config.kind == "paper":
        return _paper(image, loss_of, tokenizer, config, words)
    return _replaced(words, loss_of, tokenizer, config, generator)


def _released(
    image: Tensor,
    loss_of: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    generator: torch.Generator,
    gradient: Tensor | None,
    words: Tensor | None,
) -> DiscreteAdversary:
    """The released code's attack: unit-norm steps in an L2 ball around Q(x), or around x itself, then Q of the end."""
    at_image = config.at == "image"
    center = image if at_image else decode_words(tokenizer, encode_words(tokenizer, image) if words is None else words)
    point = random_start(center, config, generator)
    for _ in range(config.steps):
        direction = unit(input_gradient(point, loss_of) if gradient is None else gradient)
        delta = project(point + config.eps * direction - center, config.eps)
        point = (center + delta).clamp(0, 1)
    changed = encode_words(tokenizer, point)
    return DiscreteAdversary(
        (lambda: reconstruct(tokenizer, image)) if at_image else center,
        decode_words(tokenizer, changed),
        # Q(x) has words of its own, not always those of x: only against them is a change the attack's doing.
        lambda pictures: encode_words(tokenizer, center[:pictures]),
        changed,
    )


def _paper(
    image: Tensor, loss_of: LossFn, tokenizer: VisualTokenizer, config: AttackConfig, words: Tensor
) -> DiscreteAdversary:
    """Algorithm 1: Q(x + alpha * gradient), the gradient of each sample's own loss taken at Q(x)."""
    reconstruction = decode_words(tokenizer, words)
    gradient = input_gradient(reconstruction, loss_of) * len(image)  # of the sample's loss, not of the batch's mean
    changed = encode_words(tokenizer, (image + config.eps * gradient).clamp(0, 1))
    return DiscreteAdversary(reconstruction, decode_words(tokenizer, changed), words, changed)


def _replaced(
    words: Tensor, loss_of: LossFn, tokenizer: VisualTokenizer, config: AttackConfig, generator: torch.Generator
) -> DiscreteAdversary:
    """A share of the words replaced by those that raise the loss to first order; or, as baselines, at random, or
    none."""
    changed = words
    if config.kind == "symbolic":
        count = round(config.word_share * words[0].numel())
        changed = symbolic_words(words, loss_of, tokenizer, count, config.steps, config.nearest)
    elif config.kind == "random":
        changed = random_words(words, tokenizer.codebook, config.word_share, generator, config.nearest)
    return DiscreteAdversary(lambda: decode_words(tokenizer, words), decode_words(tokenizer, changed), words, changed)


@torch.no_grad()
def encode_words(tokenizer: VisualTokenizer, image: Tensor) -> Tensor:
    """Words of the image, outside autocast: a step is a fraction of a grey level, and bfloat16 would lose it."""
    with torch.autocast(image.device.type, enabled=False):
        return tokenizer.encode(image)


@torch.no_grad()
def decode_words(tokenizer: VisualTokenizer, words: Tensor) -> Tensor:
    """The image of the words, outside autocast."""
    with torch.autocast(words.device.type, enabled=False):
        return tokenizer.decode(words)


def reconstruct(tokenizer: VisualTokenizer, image: Tensor) -> Tensor:
    """Q(x)."""
    return decode_words(tokenizer, encode_words(tokenizer, image))


def random_start(center: Tensor, config: AttackConfig, generator: torch.Generator) -> Tensor:
    """With probability `random_start`, for the whole batch, a random point at distance eps from `center`, clamped to
    [0, 1]."""
    if config.random_start == 0:
        return center
    # The coin stays on the device: to branch on it here would be to wait for it.
    starts = torch.rand((), generator=generator, device=center.device) < config.random_start
    noise = torch.randn(center.shape, generator=generator, device=center.device)
    return torch.where(starts, (center + config.eps * unit(noise)).clamp(0, 1), center)


def random_words(
    words: Tensor, codebook: Tensor, share: float, generator: torch.Generator, nearest: int | None = None
) -> Tensor:
    """Replaces exactly round(share * h * w) words of every image, at random places, each by another word, uniformly:
    any of the codebook (K, D), or one of those `nearest` to its own."""
    flat = words.flatten(1)
    count = round(share * flat.shape[1])
    places = torch.rand(flat.shape, generator=generator, device=words.device).argsort(1)[:, :count]
    return flat.scatter(1, places, other_words(flat.gather(1, places), codebook, generator, nearest)).view_as(words)


def other_words(words: Tensor, codebook: Tensor, generator: torch.Generator, nearest: int | None = None) -> Tensor:
    """For each word, whatever their shape, another, uniformly: any of the codebook, or one of those `nearest` to it."""
    choices = len(codebook) - 1 if nearest is None else min(nearest, len(codebook) - 1)
    drawn = torch.randint(1, choices + 1, words.shape, generator=generator, device=words.device)
    if nearest is None:
        return (words + drawn) % len(codebook)
    return nearest_codes(words.flatten(), codebook, choices).gather(1, drawn.view(-1, 1) - 1).view_as(words)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The chance of one picture, on the CPU: the same whatever batch, rank or worker it comes in."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
