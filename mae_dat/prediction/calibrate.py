"""Fit the temperature of a classifier's probabilities to labeled validation images."""

import dataclasses
import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import DataError
from mae_dat.data.inputs import InputImages
from mae_dat.data.open import image_root
from mae_dat.prediction.batches import PredictionBatch
from mae_dat.prediction.predictors import ClassPredictor
from mae_dat.robustness.checks import normalization_warning
from mae_dat.robustness.scores.calibration import TEMPERATURES, expected_error, fit_temperature, mean_nll
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.runtime.inputs import count_of

logger = logging.getLogger(__name__)


class LabeledImages:
    """The images of a benchmark's set, as a part of the inputs."""

    def __init__(self, images: BenchmarkSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def load_image(self, index: int, upright: bool = False) -> Image.Image:
        """Decode an image as 8-bit RGB; `upright` has no meaning for classifiers."""
        return self.images.load_image(index)

    def image_name(self, index: int) -> str:
        """Return the image's path."""
        return self.images.name_of(index)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A fitted temperature, and what it was fitted to."""

    temperature: float
    images: int
    nll: tuple[float, float]
    """Mean negative log-likelihood in nats at temperature 1 and at this one."""
    ece: tuple[float, float]
    """Expected calibration error (15 bins) at temperature 1 and at this one."""


def fit_to_folder(predictor: ClassPredictor, folder: str | Path, setup: EvaluationSetup) -> Calibration:
    """Fit the temperature to the images in `folder`/val/CLASS, or in shards of them, as an evaluation opens them.

    ImageNet's class folders work for networks of its 1000 classes, also a part of them. Raises MissingInputError, and
    DataError for other classes than the network's or no readable image.
    """
    network = predictor.network
    # Folders have the names in the checkpoint, even where others are given for the results.
    classes = network.classes or (predictor.classes if predictor.names_are_known else None)
    sources = SuiteSources(SuiteSettings(image_root(str(folder)), partial=True), network.outputs, classes)
    (labeled,) = sources.image_sets(sources.clean_suite)
    facts = network.facts
    seen = labeled.for_input(network.size, facts["interpolation"], facts.get("crop"), facts.get("protocol", "native"))
    if warning := normalization_warning(network, seen):
        logger.warning("%s", warning)
    parts: list[Tensor] = []
    indices: list[int] = []

    def collect(batch: PredictionBatch, logits: Tensor) -> None:
        parts.append(logits)
        indices.extend(batch.indices)

    predictor.predict(InputImages([LabeledImages(labeled)]), setup, collect, title="calibrate")
    if not indices:
        raise DataError(f"--calibrate {folder}: none of the {len(labeled)} images can be read.")
    if len(indices) < len(labeled):
        logger.warning("--calibrate %s: %s left out", folder, count_of(len(labeled) - len(indices), "unreadable image"))
    return fit_calibration(torch.cat(parts), labeled.targets[indices, 0])


def fit_calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """Fit the temperature to logits (N, K) and labels int64 (N,), and log how the probabilities change."""
    if bool((logits.argmax(1) == labels).all()):
        logger.warning(
            "all %d images are predicted correctly, to which no temperature can be fitted: it stays 1; calibrate with "
            "more images.",
            len(labels),
        )
        temperature = 1.0
    else:
        temperature = fit_temperature(logits, labels)
    errors = []
    for number in (1.0, temperature):
        confidence, prediction = (logits.double() / number).softmax(1).max(1)
        errors.append(expected_error(confidence, (prediction == labels).double()))
    calibration = Calibration(
        temperature=temperature,
        images=len(labels),
        nll=(mean_nll(logits, labels), mean_nll(logits, labels, temperature)),
        ece=(errors[0], errors[1]),
    )
    logger.info(
        "temperature %.3f, fitted on %d images: NLL %.4f -> %.4f, expected calibration error %.4f -> %.4f",
        temperature,
        calibration.images,
        *calibration.nll,
        *calibration.ece,
    )
    if temperature > 0.99 * TEMPERATURES[1]:
        logger.warning("the model predicts these images no better than by chance: are they of its classes?")
    return calibration
