"""Models by name or from weights, in Python: `mae_dat.load_model`, `mae_dat.create_model`, `mae_dat.list_models`."""

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError
from mae_dat.config.groups import ImageSize, image_size
from mae_dat.models.classifier import Classifier, build_classifier, pretrained_timm
from mae_dat.models.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder, build_mae
from mae_dat.models.weights.load import load_autoencoder, load_classifier, load_pretrained
from mae_dat.models.weights.open import OpenedModel, classifier_size, open_model, plan_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.runtime.device import pick_device
from mae_dat.storage.released import released_weights

if TYPE_CHECKING:
    from mae_dat.models.detector import Detector

logger = logging.getLogger(__name__)

Pretrained = bool | str | Path
"""Whether to load released weights; or the weights to load: a file, an output folder or a released name."""


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    model: str | None = None,
    input_size: int | Sequence[int] | None = None,
) -> "Classifier | MaskedAutoencoder | Detector":
    """Load a model from weights, in evaluation mode: a classifier, a masked autoencoder or an object detector.

    Args:
        source: the output folder of a run (its `model.safetensors`, or the newest checkpoint of a run that has not
            finished), a weights file (ours, MAE's, timm's, DeiT's, easyrobust's, Hugging Face's ViT and ViTMAE), or the
            name of released weights (`list_models`), which are downloaded once and verified on every load.
        device: cpu, cuda, or auto: CUDA if there is any.
        model: the architecture, if neither the file nor its shapes show it, such as resnet50.
        input_size: side, or height and width, in pixels, in place of the one that the file records.

    Returns:
        A `Classifier`, which returns logits (B, K), a `MaskedAutoencoder`, which has `features(images)`, or a
        `Detector`, which returns the boxes of each image. All take float images (B, C, H, W) in [0, 1] and normalize
        them themselves. `model.classes` are the names of the outputs, or None if the file does not record them;
        `model.input_size` is (height, width). What was loaded is logged in one line, at level INFO.

    Raises:
        MissingInputError: no such file or name.
        CheckpointError: the file is damaged, is a tokenizer, or does not show its architecture.
        ConfigError: the input size does not fit.
        DownloadError: released weights cannot be downloaded.

    Examples:
        >>> import mae_dat, torch
        >>> model = mae_dat.load_model("mae_dat_demo")
        >>> model(torch.rand(2, 3, *model.input_size)).shape
        torch.Size([2, 10])
        >>> model.classes[:3]
        ('arrow', 'bolt', 'cross')
    """
    try:
        opened = open_model(source, model, _as_size(input_size))
    except MissingInputError as error:
        if isinstance(source, str) and timm.is_model(source) and not Path(source).exists():
            raise MissingInputError(
                f"{source} is a timm model: mae_dat.create_model({source!r}, pretrained=True) loads timm's weights."
            ) from error
        raise
    logger.info("%s", _description(source, opened))
    opened = opened.to(pick_device(str(device)))
    if isinstance(opened.model, Classifier):
        opened.model.crop_pct, opened.model.interpolation = opened.crop_pct, opened.interpolation
    return _with_facts(opened.model, opened.classes, opened.input_size)


def _description(source: str | Path, opened: OpenedModel) -> str:
    """Return one line about a loaded model; the line before it in the log names the file and its format."""
    kind = {"autoencoder": "masked autoencoder", "classifier": "classifier", "detector": "object detector"}[opened.kind]
    if opened.kind == "autoencoder" and not opened.plan.has_decoder:
        kind = "encoder of a masked autoencoder (the decoder is untrained)"
    return f"{source}: {kind}, {opened.plan}"


def _with_facts(model: Any, classes: Sequence[str] | None, size: ImageSize | None) -> Any:
    """Set `classes` and `input_size` of a model, and return it."""
    model.classes, model.input_size = None if classes is None else tuple(classes), size
    return model


def _as_size(input_size: int | Sequence[int] | None) -> ImageSize | None:
    if input_size is None:
        return None
    return image_size((input_size,) if isinstance(input_size, int) else tuple(input_size))


# ---- by name ----


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: Pretrained = False,
    *,
    input_size: int | Sequence[int] | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
) -> "Classifier | MaskedAutoencoder | Detector":
    """Build a model by its name, with fresh or pretrained weights, in training mode.

    Args:
        name: one of `list_models`: MAE's (vit_base_patch16, mae_vit_base_patch16, ...), released weights, any timm
            model, or a torchvision detector.
        num_classes: outputs of a classifier (default: those of the weights or of timm's), or kinds of boxes of a
            detector.
        pretrained: True loads the weights that are released under this name, or timm's; a file, an output folder or
            another released name loads that. With `num_classes` the head is new where the weights have another one.
        input_size: side, or height and width, in pixels (default: the model's own; detectors: 224).
        in_chans: channels of the images.
        drop_path: probability of stochastic depth, for classifiers.

    Returns:
        A `Classifier`, `MaskedAutoencoder` or `Detector`, which takes float images (B, C, H, W) in [0, 1] and
        normalizes them itself.

    Raises:
        ConfigError: the name is unknown (the message has the nearest ones), or settings do not fit.
        UserError: the weights are missing, damaged or cannot be downloaded.

    Examples:
        >>> import mae_dat, torch
        >>> model = mae_dat.create_model("vit_demo_patch8", num_classes=5)
        >>> model(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """
    size, entry = _as_size(input_size), released_weights().get(name)
    if entry and entry.kind == "tokenizer":
        raise ConfigError(f"{name} is a tokenizer: mae_dat.load_tokenizer({name!r}).")
    settings: dict[str, Any] = {"in_chans": in_chans}
    if size:
        settings["img_size"] = size
    if name in MAE_MODELS or (entry and entry.kind == "mae"):
        if num_classes is not None:
            raise ConfigError(f"{name} is a masked autoencoder, which has no classes: leave out num_classes.")
        decoder = entry.decoder if entry and pretrained is True else True
        autoencoder = build_named_autoencoder(name, pretrained, decoder, settings)
        return _with_facts(autoencoder.train(), None, autoencoder.img_size)
    if not (entry or name in VIT_SIZES or timm.is_model(name)) and name in _detector_names():
        return _create_detector(name, num_classes, pretrained, size or (224, 224))
    classes = None
    if entry and entry.kind == "export":
        classifier, classes = _create_exported(name, num_classes, pretrained, size)
    elif entry:
        if num_classes is not None:
            settings["num_classes"] = num_classes
        classifier = build_named_classifier(name, pretrained, {**settings, "drop_path": drop_path})
    else:
        classifier = _create_classifier(name, num_classes, pretrained, {**settings, "drop_path": drop_path})
    return _with_facts(classifier.train(), classes, size or classifier_size(classifier))


def _create_classifier(
    name: str, num_classes: int | None, pretrained: Pretrained, settings: dict[str, Any]
) -> Classifier:
    """Build a classifier of MAE or timm, with timm's weights (True) or those of a source."""
    if num_classes is None and pretrained is True and settings["in_chans"] == 3:
        return pretrained_timm(name, settings.get("img_size"))
    if num_classes is None:
        if name in VIT_SIZES:
            raise ConfigError(f"{name} has no default number of classes: give num_classes.")
        config: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
        num_classes = config.num_classes if config else 1000
    model = build_classifier(name, num_classes, pretrained=pretrained is True, **settings)
    if not isinstance(pretrained, bool):
        load_pretrained(model, pretrained)
    return model


def _create_exported(
    name: str, num_classes: int | None, pretrained: Pretrained, size: ImageSize | None
) -> tuple[Classifier, Sequence[str] | None]:
    """Build a model from a file of this package, which describes it, and return it with its classes."""
    plan = plan_model(read_model_file(name))
    if num_classes is not None and num_classes != plan.num_classes:
        classifier = build_classifier(plan.name, num_classes, size or plan.img_size, global_pool=plan.global_pool)
        if pretrained:
            load_pretrained(classifier, weights_source(name, pretrained))
        return classifier, None
    if pretrained:
        opened = open_model(weights_source(name, pretrained), img_size=size)
        return opened.classifier(), opened.classes
    return build_classifier(plan.name, plan.num_classes, size or plan.img_size, global_pool=plan.global_pool), None


def _create_detector(name: str, num_classes: int | None, pretrained: Pretrained, size: ImageSize) -> "Detector":
    from mae_dat.models.detector import build_detector

    if num_classes is None:
        raise ConfigError(f"{name} is an object detector: give num_classes, the number of kinds of boxes.")
    if not isinstance(pretrained, bool):
        raise ConfigError(f"{name}: pretrained=True loads torchvision's backbone; load_model opens a trained detector.")
    detector = build_detector(name, num_classes, size, pretrained_backbone=pretrained)
    detector = _with_facts(detector.train(), None, size)
    return detector


def build_named_autoencoder(
    name: str, pretrained: Pretrained, decoder: bool, settings: dict[str, Any]
) -> MaskedAutoencoder:
    """Build a masked autoencoder by the name of its architecture or of released weights.

    `settings` are arguments of `build_mae`. With `pretrained` weights but without `decoder`, the decoder is left as
    initialized. Raises ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    entry = released_weights().get(name)
    model = build_mae(entry.model if entry else name, **settings)
    if pretrained:
        load_autoencoder(model, weights_source(name, pretrained), decoder=decoder)
    return model.eval()


def build_named_classifier(name: str, pretrained: Pretrained, settings: dict[str, Any]) -> Classifier:
    """Build a classifier by the name of released weights, with their pooling and pixel statistics.

    `settings` are arguments of `build_classifier`; with `num_classes` the head may be new. Raises ConfigError,
    MissingInputError, CheckpointError, DownloadError.
    """
    entry = released_weights()[name]
    defaults = {"num_classes": entry.nb_classes, "global_pool": entry.global_pool}
    statistics = {} if settings.get("in_chans", 3) != 3 else {"mean": entry.mean, "std": entry.std}
    model = build_classifier(entry.model, **{**defaults, **statistics, **settings})
    if pretrained:
        load = load_pretrained if "num_classes" in settings else load_classifier
        load(model, weights_source(name, pretrained))
    return model.eval()


def weights_source(name: str, pretrained: Pretrained) -> str | Path:
    """Return the name of the released weights, or the file or other name that was given instead.

    Raises CheckpointError if no weights are released under that name.
    """
    if not isinstance(pretrained, bool):
        return pretrained
    if name not in released_weights():
        raise CheckpointError(f"there are no released weights {name}: give a file or an output folder as `pretrained`.")
    return name


def _detector_names() -> list[str]:
    from mae_dat.models.detector import TORCHVISION_DETECTORS  # slow to import, and rarely needed

    return TORCHVISION_DETECTORS


def list_models(pattern: str = "") -> list[str]:
    """Return the names that `create_model` takes: MAE's models, released weights and detectors.

    With a `pattern`, also the matching ones of timm's thousand models: a part of the name, or a pattern with `*` for
    any characters. Names of released weights are also a source for `load_model`.

    Examples:
        >>> import mae_dat
        >>> mae_dat.list_models("demo")
        ['mae_dat_demo', 'mae_vit_demo_patch8', 'vit_demo_patch8']
        >>> "resnet50.a1_in1k" in mae_dat.list_models("resnet50*")
        True
    """
    released = [name for name, entry in released_weights().items() if entry.kind != "tokenizer"]
    names = {*MAE_MODELS, *VIT_SIZES, *released, *_detector_names()}
    if not pattern:
        return sorted(names)
    pattern = pattern if "*" in pattern else f"*{pattern}*"
    names |= {*timm.list_models(pattern), *timm.list_models(pattern, pretrained=True)}
    return sorted(fnmatch.filter(names, pattern))
