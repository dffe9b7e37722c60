"""Features of images from Python: `mae_dat.extract_features`."""

from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch.utils.data import Dataset

from mae_dat.analysis.features import Features, compute_features
from mae_dat.config.commands.features import FeaturesConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import ImageSize, image_size
from mae_dat.config.signature import check_flag_names, takes_flags
from mae_dat.data.image_set import Sample, Transform
from mae_dat.data.inputs import InputImages, open_inputs
from mae_dat.data.loader import ImageLoader, batch_loader
from mae_dat.data.open import with_channels
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.adapters import is_timm_model
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.weights.open import classifier_size, open_model
from mae_dat.robustness.evaluate import is_timm_name, timm_place
from mae_dat.runtime.console import console_for_python
from mae_dat.runtime.device import pick_device

_LEFT_OUT = (
    *("checkpoint", "model", "data_path", "split", "output_dir", "format", "knn", "temperature"),
    *("corruptions", "severities", "neighbors", "limit", "seed"),
)


@takes_flags(FeaturesConfig, _LEFT_OUT)
def extract_features(model: Any, images: Any, pool: str = "mean", *, progress: bool = True, **flags: Any) -> Features:
    """Extract features of images with a pretrained or fine-tuned model: what it computes before its head.

    Args:
        model: an output folder, a weights file, a released or timm name, a `Classifier` or `MaskedAutoencoder`, or a
            timm module.
        images: a path (file, folder of any depth, shards), a PIL image, an array (H, W, 3) or (B, H, W, 3) of uint8 or
            float in [0, 1], a tensor (3, H, W) or (B, 3, H, W), or a list of these. Images are resized and cropped to
            the model's size.
        pool: mean (over the patches), cls (the class token), or tokens (every patch).
        progress: whether to show a progress bar and the log.
        flags: flags of `mae-dat features`, listed below.

    Returns:
        `Features`: `.values`, a float32 array (n, D), or (n, N, D) of N patches; `.paths`. `numpy.asarray` of it gives
        the values.

    Raises:
        UserError: the model or the images cannot be used, or an image cannot be read.

    Examples:
        >>> import mae_dat, numpy
        >>> features = mae_dat.extract_features("mae_dat_demo", "photos/val", progress=False)
        >>> numpy.asarray(features).shape
        (6, 128)
        >>> features.paths[0]
        'photos/val/cat/0.png'
    """
    check_flag_names(FeaturesConfig, flags, _LEFT_OUT, "extract_features")
    config = FeaturesConfig.from_flags(pool=pool, **flags)
    device = pick_device(config.device)
    network, size, channels = open_encoder(model, image_size(config.input_size) if config.input_size else None)
    prepared = _PreparedInputs(open_inputs(images), with_channels(EvalTransform(size), channels))
    with console_for_python(progress) as console, evaluation_mode(network):
        loader = prepared.loader(config, pin_memory=device.type == "cuda")
        values, labels = compute_features(network.to(device), loader, "features", config, console)
    return Features(values, labels, prepared.names())


class _PreparedInputs(Dataset[Sample]):
    """The images as the model gets them."""

    def __init__(self, images: InputImages, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> Sample:
        """Return an image without a label. Raises DataError."""
        image = self.transform(self.images.load_image(index))
        return {"image": image, "label": -1, "index": index, "skipped": 0}

    def names(self) -> list[str]:
        """Return the paths of the images, or `image N` in memory."""
        return [self.images.image_name(index) for index in range(len(self.images))]

    def loader(self, config: FeaturesConfig, pin_memory: bool) -> ImageLoader:
        """Return a loader of all images in order; of a single batch without workers."""
        indices = range(len(self.images))
        batches = [indices[start : start + config.batch_size] for start in indices[:: config.batch_size]]
        return batch_loader(self, batches, config.num_workers if len(batches) > 1 else 0, pin_memory)


def open_encoder(model: Any, size: ImageSize | None) -> tuple[Classifier | MaskedAutoencoder, ImageSize, int]:
    """Return the model that computes features, with its input size (height, width) and channels.

    Raises UserError for a model without features.
    """
    if isinstance(model, str | Path):
        if is_timm_name(str(model)):
            model = timm.create_model(timm_place(str(model)), pretrained=True)
        else:
            opened = open_model(model, img_size=size)
            return opened.encoder(), opened.input_size, opened.plan.in_chans
    if is_timm_model(model):
        statistics = resolve_model_data_config(model)
        model = Classifier(model, statistics["mean"], statistics["std"])
    if not isinstance(model, Classifier | MaskedAutoencoder):
        raise ConfigError(
            f"{type(model).__name__} has no features: give a path, a name, a Classifier, a MaskedAutoencoder or a timm "
            "module."
        )
    known = model.input_size or (classifier_size(model) if isinstance(model, Classifier) else None)
    assert known is not None
    return model, size or known, len(model.mean)
