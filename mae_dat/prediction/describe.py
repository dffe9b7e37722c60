"""The summary of what a prediction reads."""

import os

from mae_dat.config.commands.predict import PredictConfig
from mae_dat.config.groups import DEMO
from mae_dat.data.decode import describe_decoding
from mae_dat.data.describe import describe_classes, describe_ignored, describe_size
from mae_dat.data.inputs import InputImages
from mae_dat.data.loader import worker_count
from mae_dat.models.describe import describe_model, describe_normalization
from mae_dat.prediction.predictors import BoxPredictor, ClassPredictor, NetworkTransform
from mae_dat.robustness.describe import add_network_pixels, add_networks
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.runtime.device import describe_device
from mae_dat.runtime.inputs import InputSummary, count_of, list_names


def prediction_inputs(
    inputs: InputImages, predictor: ClassPredictor | BoxPredictor, setup: EvaluationSetup, config: PredictConfig
) -> InputSummary:
    """Return the summary of what a prediction reads."""
    summary = InputSummary(config.verb)
    places = [path if path == DEMO or "://" in path else os.path.abspath(path) for path in inputs.paths]
    summary.add("images", count_of(len(inputs), "image"), list_names(places) if places else "in memory")
    summary.add("decoding", describe_decoding())
    summary.add("left out", describe_ignored([inputs.ignored_files], ""))
    if isinstance(predictor, BoxPredictor):
        summary.add("model", describe_model(f"detector {predictor.name}", predictor.detector, len(predictor.classes)))
        normalization = describe_normalization(predictor.detector)
        summary.add(
            "pixels",
            f"{describe_size(predictor.size)}, {normalization}",
            "upright by EXIF, scaled to fit, black borders",
        )
    else:
        add_networks(summary, [predictor.network])
        add_network_pixels(summary, [(predictor.network, str(NetworkTransform(predictor.network).preprocessing))])
    summary.add("classes", f"{describe_classes(predictor.classes)} ({predictor.classes_from})")
    workers = worker_count(setup.num_workers)
    summary.add("device", describe_device(setup.options.device, setup.options.precision, workers))
    summary.add("output", os.path.abspath(setup.folder) if setup.folder else "nothing is written")
    return summary
