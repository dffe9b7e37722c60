"""Models, weights and tokenizers in words, for the summary of a command's inputs (`runtime/inputs.py`)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, VIT_SIZES, pixel_statistics
from mae_dat.models.tokenizer import VisualTokenizer, tokenizer_path
from mae_dat.runtime.inputs import count_of
from mae_dat.storage.files import sha256_of
from mae_dat.storage.released import released_weights

HASH_DIGITS = 12
"""Digits of a sha256 that a summary shows."""


@dataclass(frozen=True)
class WeightsOrigin:
    """Where weights came from: the file, its format, the name under which it was released, and what was unwrapped."""

    source: str
    format: str = ""
    released: str = ""
    wrappers: tuple[str, ...] = ()
    sha256: str = ""
    """Empty if the file has not been hashed yet."""
    normalization_is_known: bool = True
    """Whether the file records the normalization; or it has no whole head, so that nothing shows it."""

    def describe(self) -> str:
        """Return the origin in words, with the first digits of the file's sha256, which is computed if necessary."""
        path = Path(self.source)
        is_file = path.is_file()
        name = os.path.abspath(path) if is_file else self.source
        digest = self.sha256 or (sha256_of(path) if is_file else "")
        parts = [f"released as {self.released}"] * bool(self.released) + [self.format, *self.wrappers]
        parts += [f"sha256 {digest[:HASH_DIGITS]}"] * bool(digest)
        notes = ", ".join(filter(None, parts))
        return f"{name} ({notes})" if notes else name


def timm_origin(model: Any) -> WeightsOrigin:
    """Return where the weights of a `Classifier` that timm built with its own weights came from."""
    settings: Any = getattr(model.net, "pretrained_cfg", None) or {}
    name = ".".join(filter(None, (settings.get("architecture"), settings.get("tag"))))
    place = next(filter(None, (settings.get(key) for key in ("file", "hf_hub_id", "url"))), "")
    return WeightsOrigin(f"timm's weights {name}".strip(), str(place))


def describe_model(name: str, model: nn.Module, classes: int = 0) -> str:
    """Return the name, the number of parameters (also of those that are trained, if not all are) and of classes."""
    parameters = [*model.parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    text = f"{name}, {total:,} parameters"
    if 0 < trained < 0.99 * total:
        text += f" ({trained:,} trained)"
    return text + (f", {count_of(classes, 'class', 'classes')}" if classes else "")


def describe_normalization(model: Any) -> str:
    """Return the mean and deviation by which a model normalizes pixels in [0, 1], one value per channel."""
    transform: Any = getattr(getattr(model, "net", None), "transform", None)  # of torchvision's detectors
    if hasattr(model, "mean"):
        mean, std = model.mean, model.std
    elif hasattr(transform, "image_mean"):
        mean, std = transform.image_mean, transform.image_std
    else:
        return "normalization inside the model"
    mean, std = (
        tuple(value.flatten().tolist()) if isinstance(value, Tensor) else tuple(value) for value in (mean, std)
    )
    return describe_statistics(mean, std)


def describe_default_normalization(name: str, in_chans: int) -> str:
    """Return the normalization of a classifier of this name that is trained from here: MAE's, or timm's own."""
    if in_chans == 3 and name not in VIT_SIZES:
        settings: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if settings is not None:
            return describe_statistics(tuple(settings.mean), tuple(settings.std))
    return describe_statistics(*pixel_statistics(in_chans))


def describe_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Return mean and deviation in numbers, ImageNet's by name."""
    expected = (*IMAGENET_MEAN, *IMAGENET_STD)
    if len(mean) == 3 and all(abs(a - b) < 1e-4 for a, b in zip((*mean, *std), expected, strict=True)):
        return "ImageNet's mean and std"
    return f"mean {_numbers(mean)}, std {_numbers(std)}"


def _numbers(values: tuple[float, ...]) -> str:
    """Return the values, one alone if all are equal."""
    distinct = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:.6g}" for value in distinct)


def describe_tokenizer(name: str, tokenizer: VisualTokenizer) -> str:
    """Return the name, factor, words and file of a tokenizer, with the first digits of the file's sha256."""
    path = tokenizer_path(name)
    released = "released, " if not Path(name).exists() and name in released_weights() else ""
    shown = os.path.abspath(path) if Path(name).exists() else name
    digest = sha256_of(path)[:HASH_DIGITS]
    return f"{shown} ({released}sha256 {digest}), factor {tokenizer.factor}, {tokenizer.num_words:,} words"
