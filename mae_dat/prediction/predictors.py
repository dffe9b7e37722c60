"""The models of a prediction: any classifier that an evaluation takes, or a detector of ours."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from mae_dat.config.errors import CheckpointError, ConfigError, NumericsError
from mae_dat.config.groups import ImageSize
from mae_dat.data.class_names import imagenet_synsets, readable_class
from mae_dat.data.inputs import InputImages
from mae_dat.detection.coco import BoxTransform, Scene
from mae_dat.models.detector import Boxes, Detector
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import autocast, evaluation_mode
from mae_dat.models.weights.open import OpenedModel
from mae_dat.prediction.batches import PredictionBatch, PreparedImages, predict_batches
from mae_dat.prediction.predictions import ImageBoxes
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import (
    distinct_names,
    open_callable,
    open_network_or_detector,
    open_timm,
    opened_network,
)
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.imagenet import SYNSETS
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.runtime.inputs import count_of

FROM_CHECKPOINT = "names in the checkpoint"


class NetworkTransform:
    """From a decoded image to the input of a classifier, uint8 (3, H, W): that of an evaluation."""

    def __init__(self, network: EvaluatedNetwork) -> None:
        # As for `val/CLASS` in an evaluation, an image that has the model's size already passes unchanged.
        self.preprocessing = Preprocessing(
            network.size, network.facts["interpolation"], crop=network.facts.get("crop"), keep_size=True
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the resized and cropped image."""
        pixels = np.array(self.preprocessing.resize_and_crop(image))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@dataclasses.dataclass(frozen=True)
class ClassPredictor:
    """A classifier with the names of its K classes."""

    network: EvaluatedNetwork
    classes: tuple[str, ...]
    classes_from: str
    """Where the names come from, in words."""
    names_are_known: bool
    """Whether they are the model's own, and neither guessed nor numbers."""

    def predict(
        self,
        images: InputImages,
        setup: EvaluationSetup,
        deliver: Callable[[PredictionBatch, Tensor], None],
        title: str = "predict",
    ) -> None:
        """Pass images through the network; `deliver` gets each batch with its logits, float32 (B, K) on the CPU, of the
        images that could be read.

        Raises NumericsError for NaN or infinite logits, naming the image.
        """
        network, options = self.network, setup.options

        def compute(image: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
            with autocast(options.device, options.precision):
                logits = network.model(image).float()
            return _start_copy(logits)

        def check_and_deliver(batch: PredictionBatch, copy: tuple[Tensor, torch.cuda.Event | None]) -> None:
            logits, copied = copy
            if copied:
                copied.synchronize()
            logits = logits[batch.kept]
            for position in (~logits.isfinite().all(1)).nonzero().flatten().tolist():
                raise NumericsError(
                    f"{network.name} gave NaN or infinite logits for {batch.names[position]}: its weights are damaged "
                    "or its arithmetic overflows; check the checkpoint, or give --precision fp32."
                )
            deliver(batch, logits)

        blank = torch.zeros(3, *network.size, dtype=torch.uint8)
        with evaluation_mode(network.model):
            dataset = PreparedImages(images, NetworkTransform(network), blank)
            predict_batches(dataset, compute, check_and_deliver, setup, title)


def _start_copy(result: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the copy of a tensor to the CPU; return the copy, and the event after which it is complete (None: now)."""
    if not result.is_cuda:
        return result, None
    copy = result.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


class DetectorTransform:
    """From a decoded image to the input of a detector, float32 (3, H, W) in [0, 1]: that of `mae-dat detect --eval`."""

    def __init__(self, size: ImageSize) -> None:
        self.box_transform = BoxTransform(size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the whole image, resized to fit and centered on black."""
        nothing = torch.zeros(0, dtype=torch.int64)
        scene = Scene("", (image.height, image.width), torch.zeros(0, 4), nothing, nothing.bool())
        return self.box_transform(image, scene)[0]


@dataclasses.dataclass(frozen=True)
class BoxPredictor:
    """A detector with the names of its classes."""

    detector: Detector
    classes: tuple[str, ...]
    size: ImageSize
    """Height and width of its input in pixels."""
    name: str
    classes_from: str

    def predict(
        self,
        images: InputImages,
        setup: EvaluationSetup,
        deliver: Callable[[PredictionBatch, list[ImageBoxes]], None],
        score_threshold: float,
    ) -> None:
        """Pass images through the detector; `deliver` gets each batch with the boxes of the images that could be read,
        those of a score of `score_threshold` or more."""
        transform, options = DetectorTransform(self.size), setup.options

        def compute(image: Tensor) -> list[Boxes]:
            with autocast(options.device, options.precision):
                return self.detector(image)

        def convert_and_deliver(batch: PredictionBatch, detections: list[Boxes]) -> None:
            rows = zip(batch.kept, batch.sizes, batch.indices, strict=True)
            found = [
                _image_boxes(detections[position], transform.box_transform, size, number, score_threshold)
                for position, size, number in rows
            ]
            deliver(batch, found)

        blank = torch.zeros(3, *self.size)
        with evaluation_mode(self.detector):
            predict_batches(PreparedImages(images, transform, blank), compute, convert_and_deliver, setup)


def _image_boxes(
    detections: Boxes, transform: BoxTransform, size: ImageSize, number: int, score_threshold: float
) -> ImageBoxes:
    """Return the detections of one image in pixels of its own; those that lie in the black border alone are left
    out."""
    scores = detections["scores"].float().cpu()
    boxes = transform.original_boxes(detections["boxes"].float().cpu(), size)
    keep = (scores >= score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    labels = detections["labels"].cpu() - 1
    return ImageBoxes(boxes[keep].numpy(), labels[keep].numpy(), scores[keep].numpy(), size, number)


# ---- opening ----


def open_predictor(
    source: Any,
    *,
    model: str | None,
    pretrained: bool,
    classes: Sequence[str] | None,
    options: EvalOptions,
) -> ClassPredictor | BoxPredictor:
    """Open what `--checkpoint` names, a model that was opened already, or a callable from images to logits.

    `classes` replaces the names of the classes. Raises MissingInputError, CheckpointError (also for a pretraining),
    ConfigError, DownloadError.
    """
    if source is None or source == "":
        if not (model and pretrained):
            raise ConfigError(
                "no model: give --checkpoint OUT (an output folder, weights file, released name or .onnx file), or "
                "--model NAME --pretrained for timm's weights."
            )
        return _class_predictor(open_timm(model, model, options), classes)
    if pretrained:
        raise ConfigError("--checkpoint and --pretrained: give one of them.")
    if isinstance(source, str | Path):
        opened = open_network_or_detector(str(source), model, distinct_names((str(source),))[0], options)
        return _from_opened(opened, classes, options)
    if isinstance(source, OpenedModel):
        return _from_opened(source, classes, options)
    if isinstance(source, Detector):
        return _box_predictor(source, None, getattr(source, "input_size", None), "the detector", classes, options)
    if isinstance(source, MaskedAutoencoder):
        raise CheckpointError("the model is a pretraining, which has no classes yet: fine-tune it first.")
    if not callable(source) and not isinstance(source, tuple):  # a pair: a model of transformers and its processor
        raise ConfigError(f"a checkpoint of type {type(source).__name__} is no model: give a path, a name or a module.")
    # `load_model` leaves the size and the names of the classes on the module.
    size = options.size or getattr(source, "input_size", None)
    known = classes or getattr(source, "classes", None)
    name = type(source).__name__ if isinstance(source, nn.Module) else getattr(source, "__name__", "the callable")
    return _class_predictor(open_callable(source, name, dataclasses.replace(options, size=size), known), classes)


def _from_opened(
    opened: OpenedModel | EvaluatedNetwork, classes: Sequence[str] | None, options: EvalOptions
) -> ClassPredictor | BoxPredictor:
    if isinstance(opened, EvaluatedNetwork):
        return _class_predictor(opened, classes)
    if opened.kind == "detector":
        return _box_predictor(opened.model, opened.classes, opened.input_size, opened.title, classes, options)
    return _class_predictor(opened_network(opened, "Python", opened.title, options), classes)


def _box_predictor(
    detector: Detector,
    recorded: Sequence[str] | None,
    size: ImageSize | None,
    name: str,
    classes: Sequence[str] | None,
    options: EvalOptions,
) -> BoxPredictor:
    """Return the predictor of a detector whose file records these classes. Raises ConfigError for what is missing."""
    if options.interpolation or options.crop:
        raise ConfigError(f"--interpolation and --crop are for classifiers: {name} sees whole images.")
    names = classes or recorded or getattr(detector, "classes", None)
    size = options.size or size
    if names is None or size is None:
        raise ConfigError(f"{name} does not record its classes and its input size: give `classes` and `input_size`.")
    if recorded and len(names) != len(recorded):
        raise ConfigError(
            f"--classes has {count_of(len(names), 'name')}, {name} has {count_of(len(recorded), 'class', 'classes')}."
        )
    origin = "given" if classes else FROM_CHECKPOINT
    return BoxPredictor(detector.to(options.device).eval(), tuple(names), size, name, origin)


def _class_predictor(network: EvaluatedNetwork, classes: Sequence[str] | None) -> ClassPredictor:
    """Return the predictor of a network, with the names of its classes. Raises ConfigError for a wrong number of
    them."""
    if classes is not None and len(classes) != network.outputs:
        raise ConfigError(
            f"--classes has {count_of(len(classes), 'name')}, {network.name} has {count_of(network.outputs, 'output')}."
        )
    return ClassPredictor(network, *_class_names(network, classes))


def _class_names(network: EvaluatedNetwork, classes: Sequence[str] | None) -> tuple[tuple[str, ...], str, bool]:
    """Return the names of a network's classes, where they come from, and whether they are its own."""
    if classes is not None:
        return tuple(classes), "given", True
    if network.classes:
        return network.classes, FROM_CHECKPOINT, True
    settings = getattr(getattr(network.model, "net", None), "pretrained_cfg", None) or {}
    labels = settings.get("label_names")
    if labels and len(labels) == network.outputs:
        return tuple(map(str, labels)), "names in timm's settings of the model", True
    if network.outputs == len(SYNSETS):
        return imagenet_names(), "ImageNet's names, because the model has 1000 outputs", False
    if synsets := imagenet_synsets(network.outputs):
        names = tuple(map(readable_class, synsets))
        return names, f"ImageNet's WordNet ids, because the model has {network.outputs:,} outputs", False
    return tuple(map(str, range(network.outputs))), "numbers, because the model records no names", False


def imagenet_names() -> tuple[str, ...]:
    """Return the English names of ImageNet's 1000 classes, all different, in the order of `SYNSETS`."""
    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
