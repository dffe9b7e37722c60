"""Discrete adversaries (Mao et al. 2022, "Enhance the Visual Representation via Discrete Adversarial Training").

An attack needs a tokenizer Q and a function from pixels to a scalar loss, nothing else, so the same code serves
classification, masked autoencoding and detection. No gradient passes through Q: dQ(x)/dx is replaced by the identity
(section 3.3), and Q always runs without autograd. `symbolic`, which is not in the paper, differentiates Q's decoder. An
attack leaves no trace: no parameter gradient, no training flag changed. Shapes: image (B, C, H, W) in [0, 1]; words
(B, h, w), int64.
"""

import hashlib
import importlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mae_dat.attacks.gradient import LossFn, input_gradient, project, require_pixels, unit
from mae_dat.attacks.symbolic import nearest_codes, symbolic_words
from mae_dat.config.adversaries import ATTACKS, AttackConfig
from mae_dat.config.errors import ConfigError
from mae_dat.models.tokenizer.base import VisualTokenizer, share_changed

__all__ = ["AttackConfig", "DiscreteAdversary", "discrete_adversary", "random_words"]


class DiscreteAdversary:
    """The result of an attack.

    `adversarial` is the adversarial image in [0, 1], decoded from `adversarial_words`. Results that the attack itself
    does not need are computed only when they are read, since each costs a pass of the tokenizer.
    """

    def __init__(
        self,
        reconstruction: Tensor | Callable[[], Tensor],
        adversarial: Tensor,
        words: Tensor | Callable[[int], Tensor],
        adversarial_words: Tensor,
    ) -> None:
        """Keep the tensors. `words` may be a function that encodes the first `count` images of the batch."""
        self._reconstruction, self.adversarial = reconstruction, adversarial
        self._words, self.adversarial_words = words, adversarial_words

    @cached_property
    def reconstruction(self) -> Tensor:
        """Q(x), an image (B, C, H, W) in [0, 1]."""
        return self._reconstruction if isinstance(self._reconstruction, Tensor) else self._reconstruction()

    @cached_property
    def words(self) -> Tensor:
        """Visual words (B, h, w) of the attacked image: of Q(x) (`released`) or of x (all other attacks)."""
        return self._words if isinstance(self._words, Tensor) else self._words(len(self.adversarial_words))

    @property
    def changed_share(self) -> Tensor:
        """Share of words that the attack changed, a scalar in [0, 1]."""
        return share_changed(self.words, self.adversarial_words)

    def changed_share_in_first(self, count: int) -> Tensor:
        """Return `changed_share`, a scalar; of the first `count` images only, if the words have yet to be encoded."""
        if isinstance(self._words, Tensor):
            return self.changed_share
        return share_changed(self._words(count), self.adversarial_words[:count])


def discrete_adversary(
    image: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig | None = None,
    generator: torch.Generator | None = None,
    gradient: Tensor | None = None,
    check: bool = True,
    words: Tensor | None = None,
) -> DiscreteAdversary:
    """Change visual words of `image` (B, C, H, W) to raise `loss_fn`; the baselines change random words or none.

    The model gets no parameter gradient, and keeps its training flags.

    Args:
        image: float (B, C, H, W) in [0, 1]; H and W divisible by the tokenizer's factor.
        loss_fn: maps an image to the mean loss of the batch, a scalar.
        tokenizer: the tokenizer (`load_tokenizer`), on the device of the image.
        config: which adversary, and how strong; by default the one of DAT's released code with eps 0.1, which was
            chosen for vqgan_f8_16384 at 224 px. With the embedded tokenizer it changes almost no word: use a larger
            eps.
        generator: source of the random draws, on the image's device; by default torch's global one.
        gradient: dL/dimage (B, C, H, W), if already known; `released` then does not compute it.
        check: whether to check the range of the pixels, which synchronizes with the device.
        words: the words (B, h, w) of the image, if already known; saves an encoding, except for `released` at the
            image.

    Raises:
        ConfigError: the size does not fit the tokenizer, or `config` has only a share where eps is the strength.
        ValueError: pixels are outside [0, 1].

    Examples:
        >>> import mae_dat, torch
        >>> from torch.nn.functional import cross_entropy
        >>> model, tokenizer = mae_dat.load_model("mae_dat_demo"), mae_dat.load_tokenizer()
        >>> images, labels = torch.rand(2, 3, 64, 64), torch.tensor([3, 7])
        >>> attack = mae_dat.AttackConfig(eps=2.0)
        >>> result = mae_dat.discrete_adversary(images, lambda x: cross_entropy(model(x), labels), tokenizer, attack)
        >>> result.adversarial.shape, result.adversarial_words.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 16, 16]))
        >>> bool(result.changed_share > 0)
        True
    """
    config = config or AttackConfig()
    if math.isnan(config.eps):
        raise ConfigError(
            f"the attack `{config.kind}` needs eps, which AttackConfig(share={config.share}) does not set: set eps, or "
            "use WithDAT, which adjusts eps to the share."
        )
    if check:
        require_pixels(image)
    image = image.detach().float()
    attack = attack_function(config.kind)
    return attack(image, loss_fn, tokenizer, config, generator=generator, gradient=gradient, words=words)


def attack_function(kind: str) -> Callable[..., DiscreteAdversary]:
    """Import the function of a kind of attack.

    It takes what `discrete_adversary` takes, except `check`, with a float image and a configuration whose eps is known.
    """
    module, _, name = ATTACKS[kind].partition(":")
    function: Callable[..., DiscreteAdversary] = getattr(importlib.import_module(f"mae_dat.{module}"), name)
    return function


def released_attack(
    image: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    *,
    generator: torch.Generator | None,
    gradient: Tensor | None,
    words: Tensor | None,
) -> DiscreteAdversary:
    """Attack as the authors' released code does.

    c = Q(x), or x itself (`config.at`); p_0 = c or a random point of the ball;
    p_t = c + project(p_(t-1) + eps * unit(dL/dp) - c, eps), clamped to [0, 1]; the adversary is Q(p_T).
    With `config.fourth_pass`, p_T passes the model once more. `gradient` and `words` are those of the image, if known.
    """
    at_image = config.at == "image"
    if at_image:
        center = image
    else:
        center = decode_words(tokenizer, encode_words(tokenizer, image) if words is None else words)
    point = random_start(center, config, generator)
    for _ in range(config.steps):
        direction = unit(input_gradient(point, loss_fn) if gradient is None else gradient)
        delta = project(point + config.eps * direction - center, config.eps)
        point = (center + delta).clamp(0, 1)
    if config.fourth_pass:
        with torch.no_grad():
            loss_fn(point)  # for BatchNorm's running statistics
    adversarial_words = encode_words(tokenizer, point)
    return DiscreteAdversary(
        (lambda: reconstruct(tokenizer, image)) if at_image else center,
        decode_words(tokenizer, adversarial_words),
        # Encoding Q(x) can give other words than encoding x, so the attack's changes are counted against those of Q(x).
        lambda count: encode_words(tokenizer, center[:count]),
        adversarial_words,
    )


def paper_attack(
    image: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    *,
    words: Tensor | None,
    **_: Any,
) -> DiscreteAdversary:
    """Attack by the paper's Algorithm 1: Q(x + alpha * dL/dQ(x)), with the gradient of each sample's own loss.

    alpha is `config.eps`.
    """
    words = encode_words(tokenizer, image) if words is None else words
    reconstruction = decode_words(tokenizer, words)  # Q(x)
    # `loss_fn` is a mean over the batch; times B it is the sum, which has each sample's own gradient.
    gradient = input_gradient(reconstruction, loss_fn) * len(image)
    adversarial_words = encode_words(tokenizer, (image + config.eps * gradient).clamp(0, 1))
    return DiscreteAdversary(reconstruction, decode_words(tokenizer, adversarial_words), words, adversarial_words)


def symbolic_attack(
    image: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    *,
    words: Tensor | None,
    **_: Any,
) -> DiscreteAdversary:
    """Replace a share of the words by those that raise the loss most, by a first-order estimate (symbolic.py)."""
    words = encode_words(tokenizer, image) if words is None else words
    count = round(config.word_share * words[0].numel())
    adversarial_words = symbolic_words(
        words, loss_fn, tokenizer, count=count, steps=config.steps, nearest=config.nearest, rescore=config.rescore
    )
    return decoded_adversary(tokenizer, words, adversarial_words)


def random_attack(
    image: Tensor,
    loss_fn: LossFn,
    tokenizer: VisualTokenizer,
    config: AttackConfig,
    *,
    generator: torch.Generator | None,
    words: Tensor | None,
    **_: Any,
) -> DiscreteAdversary:
    """Replace a share of the words at random: a control."""
    words = encode_words(tokenizer, image) if words is None else words
    adversarial_words = random_words(
        words, tokenizer.codebook, share=config.word_share, generator=generator, nearest=config.nearest
    )
    return decoded_adversary(tokenizer, words, adversarial_words)


def no_attack(
    image: Tensor, loss_fn: LossFn, tokenizer: VisualTokenizer, config: AttackConfig, *, words: Tensor | None, **_: Any
) -> DiscreteAdversary:
    """Change no word: the reconstruction, a control."""
    words = encode_words(tokenizer, image) if words is None else words
    return decoded_adversary(tokenizer, words, words)


def decoded_adversary(tokenizer: VisualTokenizer, words: Tensor, adversarial_words: Tensor) -> DiscreteAdversary:
    """Return the result of an attack that changed the image's words (B, h, w) itself."""
    return DiscreteAdversary(
        lambda: decode_words(tokenizer, words), decode_words(tokenizer, adversarial_words), words, adversarial_words
    )


@torch.no_grad()
def encode_words(tokenizer: VisualTokenizer, image: Tensor) -> Tensor:
    """Encode an image (B, C, H, W) as words (B, h, w), outside autocast.

    An attack's step is a fraction of a gray level; bfloat16 would round it away.
    """
    with torch.autocast(image.device.type, enabled=False):
        return tokenizer.encode(image)


@torch.no_grad()
def decode_words(tokenizer: VisualTokenizer, words: Tensor) -> Tensor:
    """Decode words (B, h, w) to an image (B, C, H, W) in [0, 1], outside autocast."""
    with torch.autocast(words.device.type, enabled=False):
        return tokenizer.decode(words)


def reconstruct(tokenizer: VisualTokenizer, image: Tensor) -> Tensor:
    """Return Q(x), (B, C, H, W) in [0, 1]."""
    return decode_words(tokenizer, encode_words(tokenizer, image))


def random_start(center: Tensor, config: AttackConfig, generator: torch.Generator | None) -> Tensor:
    """Return `center` (B, C, H, W), or, with probability `config.random_start`, a random point at distance eps of it.

    One draw decides for the whole batch. The point is clamped to [0, 1].
    """
    if config.random_start == 0:
        return center
    # The random choice stays on the device: branching on it in Python would wait for the device.
    starts = torch.rand((), generator=generator, device=center.device) < config.random_start
    noise = torch.randn(center.shape, generator=generator, device=center.device)
    return torch.where(starts, (center + config.eps * unit(noise)).clamp(0, 1), center)


def random_words(
    words: Tensor, codebook: Tensor, share: float, generator: torch.Generator | None, nearest: int | None = None
) -> Tensor:
    """Replace exactly round(share * h * w) words of every image, at random places, by `other_words`; (B, h, w)."""
    flat = words.flatten(1)
    count = round(share * flat.shape[1])
    places = torch.rand(flat.shape, generator=generator, device=words.device).argsort(1)[:, :count]
    return flat.scatter(1, places, other_words(flat.gather(1, places), codebook, generator, nearest)).view_as(words)


def other_words(
    words: Tensor, codebook: Tensor, generator: torch.Generator | None, nearest: int | None = None
) -> Tensor:
    """Draw another word for each word, uniformly from the codebook (K, D) or from the `nearest` codes to its own.

    Returns a tensor of the shape of `words`.
    """
    choices = len(codebook) - 1 if nearest is None else min(nearest, len(codebook) - 1)
    offset = torch.randint(1, choices + 1, words.shape, generator=generator, device=words.device)
    if nearest is None:
        return (words + offset) % len(codebook)  # 1 to K - 1 places further in the codebook: never the word itself
    return nearest_codes(words.flatten(), codebook, choices).gather(1, offset.view(-1, 1) - 1).view_as(words)


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the random generator of one image, on the CPU: it does not depend on the batch, rank or worker."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
