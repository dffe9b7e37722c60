"""Classifiers of other libraries as models of pixels in [0, 1]: timm's modules, and those of Hugging Face transformers.

Both take normalized images. The adapters normalize by the model's own settings: timm's `pretrained_cfg`, or the image
processor of transformers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import torch
from huggingface_hub import hf_hub_download
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.extras import require_extra
from mae_dat.config.groups import ImageSize
from mae_dat.models.classifier import Classifier
from mae_dat.storage.json_files import read_json

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "preprocessor_config.json"
_PIXEL_SCALE = 1 / 255
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PAIR = "give the pair (model, image_processor)"


@dataclass(frozen=True)
class ProcessorSettings:
    """What an image processor of transformers does to an image."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: ImageSize
    """Height and width of the model's input in pixels."""
    crop: float
    """The crop's side over the resized image's."""
    interpolation: str

    @classmethod
    def read(cls, processor: Any) -> Self:
        """Read an image processor, or the content of its `preprocessor_config.json`. Raises ConfigError."""
        settings = processor if isinstance(processor, Mapping) else processor.to_dict()
        settings = settings.get("image_processor", settings)  # of a processor for images and text
        scale = settings.get("rescale_factor", _PIXEL_SCALE)
        if not settings.get("do_rescale", True) or abs(scale - _PIXEL_SCALE) > 1e-6:
            raise ConfigError(
                f"the image processor scales pixels by {scale}, but only 1/255 is supported: wrap the model in a "
                "function from images in [0, 1] to logits."
            )
        normalizes = settings.get("do_normalize", True) and settings.get("image_mean") is not None
        mean, std = (settings["image_mean"], settings["image_std"]) if normalizes else ((0.0,) * 3, (1.0,) * 3)
        resized = _sides(settings.get("size") or settings.get("crop_size") or 224)
        size, crop = resized, settings.get("crop_pct") or 1.0
        if settings.get("do_center_crop") and settings.get("crop_size"):
            size = _sides(settings["crop_size"])
            crop = min(1.0, size[0] / resized[0])
        resample = settings.get("resample")
        interpolation = "bicubic" if resample is None else _RESAMPLING.get(int(resample), "bicubic")
        return cls(tuple(mean), tuple(std), size, crop, interpolation)


def _sides(size: Any) -> ImageSize:
    """Return height and width from an image processor's size: a number, or a mapping."""
    if isinstance(size, int | float):
        return int(size), int(size)
    if isinstance(size, Mapping):
        if size.get("height"):
            return int(size["height"]), int(size["width"])
        if side := size.get("shortest_edge"):
            return int(side), int(side)
    raise ConfigError(f"the image processor has the size {size}: expected one side, or height and width.")


class HuggingFaceClassifier(nn.Module):
    """An image classifier of transformers as a model of pixels in [0, 1] that returns logits (B, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, processor: ProcessorSettings) -> None:
        super().__init__()
        self.net, self.processor = net, processor
        self.register_buffer("mean", torch.tensor(processor.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.std).view(-1, 1, 1), persistent=False)
        self.input_size = processor.size
        names: Mapping[Any, str] = getattr(net.config, "id2label", None) or {}
        in_order = [names[index] for index in sorted(names, key=int)]
        are_names = in_order and not all(name == f"LABEL_{index}" for index, name in enumerate(in_order))
        self.classes = tuple(in_order) if are_names else None

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.net(pixel_values=(image - self.mean) / self.std).logits


def is_timm_model(model: Any) -> bool:
    """Return whether a model is a module of timm, which takes normalized images."""
    return type(model).__module__.startswith("timm.") and bool(getattr(model, "pretrained_cfg", None))


def is_transformers_model(model: Any) -> bool:
    """Return whether a model is a module of transformers, or one with the same interface."""
    return isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "id2label")


def timm_classifier(net: nn.Module) -> Classifier:
    """Return a timm module as a classifier of pixels in [0, 1]. Raises ConfigError for one without classes."""
    if not getattr(net, "num_classes", 0):
        raise ConfigError(f"{type(net).__name__} has no classes, only features: fine-tune it first.")
    statistics = resolve_model_data_config(net)
    return Classifier(net, statistics["mean"], statistics["std"])


def transformers_classifier(model: nn.Module, processor: Any = None) -> HuggingFaceClassifier:
    """Return a classifier of transformers as a model of pixels in [0, 1].

    Without a `processor`, the settings are read from the folder or repository that the model was loaded from. Raises
    ConfigError if there are none, or if the processor does more than resize, crop and normalize.
    """
    return HuggingFaceClassifier(model, ProcessorSettings.read(processor or _stored_processor(model)))


def _stored_processor(model: nn.Module) -> Mapping[str, Any]:
    """Read the settings of the image processor in the folder or repository that a model was loaded from."""
    source = str(getattr(model, "name_or_path", "") or "")
    name = type(model).__name__
    if not source:
        raise ConfigError(f"{name} does not record how it normalizes images: {_PAIR}.")
    file = Path(source) / PROCESSOR_FILE
    try:
        if not Path(source).is_dir():
            file = Path(hf_hub_download(source, PROCESSOR_FILE))
        settings: dict[str, Any] = read_json(file, dict[str, Any], "an image processor", ConfigError)
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"the image processor of {name} is not available ({error}): {_PAIR}.") from error
    return settings


def open_transformers_folder(folder: Path) -> HuggingFaceClassifier:
    """Open an image classifier saved by transformers in a folder, in evaluation mode.

    Raises MissingInputError if transformers is not installed, ConfigError.
    """
    require_extra("huggingface", f"opening {folder}")
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} cannot be opened by transformers: {error}") from error
    return transformers_classifier(model).eval()


class _TransformersConfig(TypedDict):
    architectures: NotRequired[list[str] | None]


def is_transformers_folder(folder: Path) -> bool:
    """Return whether a folder holds an image classifier saved by transformers."""
    try:
        config = read_json(folder / "config.json", _TransformersConfig, "the configuration of a model")
    except CheckpointError:
        return False
    return any(name.endswith("ForImageClassification") for name in config.get("architectures") or ())


def as_pixel_classifier(model: Any) -> Any:
    """Return a model of timm or transformers as a module from pixels in [0, 1] to logits, any other model unchanged.

    Of transformers: a module; a pair (module, image processor); or a pipeline for image classification.
    Raises ConfigError.
    """
    if isinstance(model, tuple) and len(model) == 2 and is_transformers_model(model[0]):
        return transformers_classifier(*model)
    if is_transformers_model(getattr(model, "model", None)) and hasattr(model, "image_processor"):
        return transformers_classifier(model.model, model.image_processor)
    if is_transformers_model(model):
        return transformers_classifier(model)
    return timm_classifier(model) if is_timm_model(model) else model
