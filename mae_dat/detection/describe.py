"""The summary of what the training and the measurement of a detector read."""

import os
from pathlib import Path

from mae_dat.config.commands.detect import DetectConfig
from mae_dat.data.describe import add_images
from mae_dat.data.open import image_root
from mae_dat.detection.coco import CocoImages
from mae_dat.models.describe import describe_model
from mae_dat.models.detector import Detector
from mae_dat.runtime.inputs import InputSummary, count_of
from mae_dat.training.describe import add_adversary, add_on_bad, add_pixels
from mae_dat.training.objectives.base import Objective


def describe_boxes(images: CocoImages, root: Path) -> str:
    """Return the JSON file of an image set relative to `root`, and the number of its images, boxes and classes."""
    boxes = sum(len(scene.boxes) for scene in images.scenes)
    crowds = sum(int(scene.crowd.sum()) for scene in images.scenes)
    empty = sum(not len(scene.boxes) for scene in images.scenes)
    used = sum(count > 0 for count in images.class_counts())
    notes = [f"{crowds:,} of them crowds"] * (crowds > 0) + [f"{count_of(empty, 'image')} without"] * (empty > 0)
    return (
        f"{os.path.relpath(images.annotations, root)}: {count_of(len(images), 'image')}, "
        f"{count_of(boxes, 'box', 'boxes')} in {count_of(used, 'class', 'classes')}"
        + (f" ({', '.join(notes)})" if notes else "")
    )


def training_inputs(
    config: DetectConfig,
    model: Detector,
    objective: Objective,
    images: CocoImages,
    validation: CocoImages,
    weights: str,
) -> InputSummary:
    """Return the summary of what a training reads; `weights` says where those it starts from came from."""
    inputs = _shared_inputs(config, model, {"training": images, "validation": validation}, weights)
    low, high = config.detector.scale_jitter
    inputs.add("pixels", f"training: scaled by {low:g} to {high:g}, cropped, flipped; black borders")
    add_adversary(inputs, config.dat, objective)
    return inputs


def measurement_inputs(config: DetectConfig, model: Detector, validation: CocoImages, weights: str) -> InputSummary:
    """Return the summary of what a measurement reads."""
    inputs = _shared_inputs(config, model, {"validation": validation}, weights, "stored with the model")
    if config.measure.corrupted:
        severities = ", ".join(map(str, config.measure.severities))
        inputs.add("corruptions", f"15 of ImageNet-C at severity {severities}, made at the images' own size")
    return inputs


def _shared_inputs(
    config: DetectConfig, model: Detector, splits: dict[str, CocoImages], weights: str, names_from: str = ""
) -> InputSummary:
    data, validation = config.data, splits["validation"]
    inputs = InputSummary(config.verb)
    add_images(
        inputs,
        data.data_path,
        image_root(data.data_path),
        splits,
        names_from=names_from or "categories by id",
        describe=describe_boxes,
    )
    add_on_bad(inputs, data.on_bad)
    inputs.add("model", describe_model(config.detector.model, model, len(validation.classes)))
    inputs.add("weights", weights)
    add_pixels(inputs, data, model, "validation: scaled to fit, centered, black borders")
    return inputs
