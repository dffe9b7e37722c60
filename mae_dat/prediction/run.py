"""One prediction from start to end: open images and model, predict batch by batch, hand each batch on."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mae_dat.config.commands.predict import PredictConfig, ProbabilityConfig
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.groups import image_size
from mae_dat.data.inputs import InputImages, open_inputs
from mae_dat.prediction.batches import PredictionBatch
from mae_dat.prediction.box_files import DRAWN_FOLDER
from mae_dat.prediction.calibrate import fit_to_folder
from mae_dat.prediction.describe import prediction_inputs
from mae_dat.prediction.predictions import ImageBoxes, Predictions
from mae_dat.prediction.predictors import BoxPredictor, ClassPredictor, open_predictor
from mae_dat.prediction.results import ResultWriter, Tally
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.inputs import INPUTS_FILE
from mae_dat.storage.files import prepare_output_folder


@dataclasses.dataclass(frozen=True)
class PredictionRun:
    """An opened model and opened images, ready to predict."""

    predictor: ClassPredictor | BoxPredictor
    inputs: InputImages
    setup: EvaluationSetup
    config: PredictConfig
    temperature: float

    @property
    def empty(self) -> Predictions:
        """The predictions for no image: the classes and settings."""
        is_detector = isinstance(self.predictor, BoxPredictor)
        return Predictions(
            files=[],
            classes=list(self.predictor.classes),
            probabilities=np.zeros((0, 0 if is_detector else len(self.predictor.classes)), np.float32),
            boxes=[] if is_detector else None,
            top_k=self.config.probabilities.top_k,
            temperature=self.temperature,
            abstain_below=self.config.probabilities.abstain_below,
        )

    def predict(self, *sinks: Callable[[Predictions], None]) -> None:
        """Predict all images; each of `sinks`, and the files of the output folder, get the predictions of every batch.

        Raises DataError, after the files are written, if no image can be read; NumericsError; StorageError.
        """
        tally = Tally()
        with contextlib.ExitStack() as stack:
            if self.setup.folder is not None:
                writer = stack.enter_context(
                    ResultWriter(self.setup.folder, self.empty, self.inputs, self.config.boxes.images_to_draw)
                )
                sinks = (writer.add, *sinks)
            self._pass_images((tally.add, *sinks))
        if tally.predicted == 0:
            raise DataError(f"no image can be read, of {len(self.inputs):,}: {tally.first_unreadable}")

    def _pass_images(self, sinks: Sequence[Callable[[Predictions], None]]) -> None:
        empty = self.empty

        def deliver(batch: PredictionBatch, **results: Any) -> None:
            part = dataclasses.replace(empty, files=batch.names, unreadable=batch.unreadable, **results)
            for sink in sinks:
                sink(part)

        def deliver_logits(batch: PredictionBatch, logits: Tensor) -> None:
            probabilities = (logits / self.temperature).softmax(1)
            deliver(batch, probabilities=probabilities.numpy(), logits=logits.numpy())

        def deliver_boxes(batch: PredictionBatch, boxes: list[ImageBoxes]) -> None:
            deliver(batch, probabilities=np.zeros((len(boxes), 0), np.float32), boxes=boxes)

        if isinstance(self.predictor, BoxPredictor):
            self.predictor.predict(self.inputs, self.setup, deliver_boxes, self.config.boxes.score_threshold)
        else:
            self.predictor.predict(self.inputs, self.setup, deliver_logits)


def open_run(
    checkpoint: Any,
    images: Any,
    classes: Sequence[str] | None,
    config: PredictConfig,
    folder: Path | None,
    console: Console,
) -> PredictionRun:
    """Open images and model, prepare the output folder, and fit the temperature with `--calibrate`. Raises
    UserError."""
    device = pick_device(config.device)
    options = EvalOptions(
        device,
        amp_dtype(config.precision, device),
        size=image_size(config.input_size) if config.input_size else None,
        interpolation=config.interpolation,
        crop=config.crop,
    )
    setup = EvaluationSetup(options, folder, console, batch_size=config.batch_size, num_workers=config.num_workers)
    inputs = open_inputs(images)
    predictor = open_predictor(
        checkpoint, model=config.model, pretrained=config.pretrained, classes=classes, options=options
    )
    if isinstance(predictor, BoxPredictor):
        _require_no_class_flags(predictor, config.probabilities)
        inputs.upright = True
    if folder is not None:
        if isinstance(predictor, BoxPredictor):
            _require_no_inputs_in(folder / DRAWN_FOLDER, inputs)
        prepare_output_folder(folder)
    summary = prediction_inputs(inputs, predictor, setup, config)
    console.report_inputs(summary, folder / INPUTS_FILE if folder else None)
    temperature, labeled = config.probabilities.temperature, config.probabilities.calibrate
    if labeled is not None and isinstance(predictor, ClassPredictor):
        temperature = fit_to_folder(predictor, labeled, setup).temperature
    return PredictionRun(predictor, inputs, setup, config, temperature)


def _require_no_class_flags(predictor: BoxPredictor, config: ProbabilityConfig) -> None:
    """Raise ConfigError for flags that a detector has no use for."""
    given = {"temperature": config.temperature != 1, "calibrate": config.calibrate is not None}
    given["abstain_below"] = config.abstain_below is not None
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"--{name} is for classifiers; {predictor.name} is a detector: see --score_threshold.")


def _require_no_inputs_in(drawn: Path, inputs: InputImages) -> None:
    """Raise ConfigError if the folder of drawn images holds an input, which could be overwritten."""
    if not drawn.is_dir():
        return
    folder = os.path.realpath(drawn) + os.sep
    for path in inputs.files():
        if os.path.realpath(path).startswith(folder):
            raise ConfigError(
                f"{path} is one of the images to predict, and {drawn} is where boxes are drawn: choose another "
                "--output_dir, or name the images so that this folder is not among them."
            )
