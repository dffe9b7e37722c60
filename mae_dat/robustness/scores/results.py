"""The content of `results.json`: integer counts of every cell, and the facts that they depend on.

A cell is one measurement of a suite: all of its images, one corruption at one severity, or one share of changed words.
Every percentage of a report is computed from these counts, and can be computed again offline.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.config.protocols import ProtocolName
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.class_counts import ClassScores
from mae_dat.robustness.scores.image_bits import CellImages
from mae_dat.robustness.scores.predictions import ImageSets
from mae_dat.robustness.scores.reliability import ReliabilityBins
from mae_dat.storage.files import atomic_write
from mae_dat.storage.json_files import read_json

FORMAT = 1
CLEAN_SUITES = ("imagenet", "clean")
GROUP_PREFIX = "group:"
"""Begins the name of a cell that is a group of images, such as group:night."""
SUITE_ORDER = (
    *CLEAN_SUITES, "imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "objnet-113",
    "objnet-1000", "stylized", "imagenet-c", "generated", "imagenet-c-bar", "imagenet-3dcc", "laion-c",
    "tiny-imagenet-c", "cifar-10-c", "cifar-100-c", "cue-conflict", "conflict",
)  # fmt: skip


class ModelFacts(TypedDict):
    """A model that was evaluated; all of it is part of the key of its results."""

    title: str
    source: str
    """The source as given: a path, a released or timm name, "callable"."""
    sha256: str | None
    """Hash of the weights file with an ONNX graph's external files, or of the weights of a model passed from Python."""
    architecture: str
    parameters: int
    size: list[int]
    """Input height and width in pixels."""
    normalization: str
    """The mean and deviation that the model applies to its input, in words."""
    interpolation: str
    crop: NotRequired[float]
    """The crop's side over the resized image's, if it is not the default; for timm's weights, timm's crop_pct."""
    protocol: NotRequired[ProtocolName]
    """The protocol, if it is not `native`."""
    outputs: NotRequired[str]
    """probabilities, if the model gives these, so that their logarithms were used; logits otherwise."""
    precision: str
    """fp32 or bf16."""
    averaged: bool | None
    """Whether the weights are an exponential moving average; None if unknown."""


class SuiteFacts(TypedDict):
    """How a suite was measured."""

    title: str
    protocol: dict[str, str]
    """Reading of the logits, preprocessing, folder, subset, seed, strength: part of a result's key."""
    official: bool
    """Whether the images are the published files; generated images are labeled as such."""
    images: int
    """Number of images in each cell; in the largest one if the cells of a partial folder differ."""
    left_out: int
    """Number of images left out of each cell."""
    missing: list[str]
    """Descriptions of what a partial folder lacks in any cell; the report marks such rows."""
    fingerprint: str
    """sha256 of the names, the labels and some of the bytes of the images of all cells."""


TrainingCurve = list[list[float | None]]
"""[epoch, value] pairs; None where the value was not finite."""


class TrainingRun(TypedDict):
    """The training of a model. Runs of the same `arm` differ only in their seed and form a group in the report."""

    arm: str
    label: str
    seed: int
    seconds: float
    """Wall-clock time of the training."""
    cpu_seconds: NotRequired[float]
    """Processor time of the training over all threads and ranks, without loader workers."""
    curves: dict[str, TrainingCurve]
    """train_loss, test_acc1 (%), changed_words (share, 0 to 1)."""


class TrainingGallery(TypedDict):
    """An image drawn in training."""

    title: str
    caption: str
    file: str
    """A PNG, relative to the folder of results.json."""


class TrainingFacts(TypedDict):
    """The trainings of a comparison."""

    runs: dict[str, TrainingRun]
    """By model."""
    pretraining: dict[str, TrainingCurve]
    """Curves of the pretraining."""
    seconds: float
    """Wall-clock time of the pretraining."""
    cpu_seconds: NotRequired[dict[str, float]]
    """Processor time of each pretraining, by its title."""
    settings: dict[str, dict[str, Any]]
    """Stage -> setting -> value."""
    galleries: list[TrainingGallery]


class VersionedCells(TypedDict):
    """The cells that were measured under the same versions."""

    versions: dict[str, str]
    """Empty where an older release, which did not record them, stored the counts."""
    cells: dict[str, dict[str, list[str]]]
    """By model and suite."""


class PairedCounts(TypedDict):
    """Images that exist both among the clean ones and in a cell, by which of the two predictions was correct."""

    both: int
    only_clean: int
    only_shifted: int
    neither: int


class Collapse(TypedDict):
    """What shows that a model has collapsed."""

    suite: str
    """The suite that shows it."""
    name: str
    """The class that it predicts."""
    percent: float
    """The share of images for which it predicts this class."""


CalibrationScores = dict[str, dict[str, dict[str, float | None]]]
"""By model and suite: ece, rms, rms_compat, nll (None where it is infinite), brier."""
AttackChecks = dict[str, dict[str, list[dict[str, Any]]]]
"""By model and attack: the sanity checks of the attack (`attacks.pixel.attack_checks`)."""


class Results(TypedDict):
    """Everything that an evaluation measured: the content of results.json."""

    format: int
    title: str
    command: str
    created: str
    """UTC, ISO 8601."""
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    """All versions that any cell was measured under."""
    measured_under: NotRequired[list[VersionedCells]]
    """Which cells were measured under which versions: cached ones may be older than the run that wrote these
    results."""
    models: dict[str, ModelFacts]
    """By the model's name, in the order of the command line."""
    suites: dict[str, dict[str, SuiteFacts]]
    """By model (its size and interpolation are part of the protocol) and suite: imagenet-v2, imagenet-c, generated,
    cue-conflict, pgd-5-1/255, words-symbolic, ..."""
    cells: dict[str, dict[str, dict[str, Count]]]
    """By model and suite, then by cell: "" for a whole suite, "fog/3" for a corruption and severity, "0.05" for a share
    of changed words."""
    images: NotRequired[dict[str, dict[str, dict[str, CellImages]]]]
    """Predictions for each image, by model, suite and cell; absent for cells that an older release measured."""
    paired: NotRequired[dict[str, dict[str, dict[str, PairedCounts]]]]
    """By model, suite of the user's own images and cell: the comparison with clean images of the same names."""
    classes: NotRequired[dict[str, dict[str, ClassScores]]]
    """Predictions by class and their scores, by model and suite of unchanged images."""
    image_sets: NotRequired[ImageSets]
    """Names and labels of the images behind `images`."""
    collapsed: NotRequired[dict[str, Collapse]]
    """Models that predict almost always the same class."""
    calibration: CalibrationScores
    reliability: NotRequired[ReliabilityBins]
    """Bins of the reliability diagrams; absent in results of older releases."""
    checks: AttackChecks
    agreement: NotRequired[dict[str, Count]]
    """By model in bfloat16: the number of clean images whose prediction equals the one in float32."""
    not_measured: dict[str, str]
    """Known or requested suites that were not measured -> the reason."""
    examples: list[dict[str, Any]]
    """Images on which the models differ: file (PNG next to results.json), suite, cell, label, answers (prediction by
    model); of corrupted images also clean (PNG) and clean_answers."""
    training: NotRequired[TrainingFacts]
    inputs: NotRequired[dict[str, str]]
    """The rows of the summary that was logged before the start: label -> text."""


def known_calibration(results: Results) -> CalibrationScores:
    """Return the calibration scores without those that may be wrong.

    Releases that recorded no predictions for each image took the probabilities of ONNX files and callables for logits.
    """
    images = results.get("images", {})
    return {
        model: {
            suite: scores
            for suite, scores in suites.items()
            if suite in images.get(model, {}) or results["models"][model]["normalization"] != "inside"
        }
        for model, suites in results["calibration"].items()
    }


def all_versions(measured_under: Sequence[VersionedCells]) -> dict[str, str]:
    """Return all versions of each package that cells were measured under, and a note if some cells have none."""
    versions = [entry["versions"] for entry in measured_under]
    packages = dict.fromkeys(package for entry in versions for package in entry)
    joined = {
        package: " and ".join(dict.fromkeys(entry[package] for entry in versions if package in entry))
        for package in packages
    }
    return joined if all(versions) else {**joined, "of some cells": "not recorded by an older release"}


def write_results(results: Results, path: Path) -> None:
    """Write `results.json` atomically. Raises StorageError."""
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")


def _inconsistency(results: Results) -> str:
    """Describe what contradicts itself in results, by key; empty if nothing does."""
    for model, facts in results["models"].items():
        if len(facts["size"]) != 2 or min(facts["size"]) < 1:
            return f"models.{model}.size must be height and width"
    for model, suites in results["cells"].items():
        for suite, cells in suites.items():
            place = f"{model}.{suite}"
            if model not in results["models"] or suite not in results["suites"].get(model, {}):
                return f"cells.{place} is missing in models or suites"
            for cell, count in cells.items():
                total = count["total"]
                if total < 1 or not all(0 <= number <= total for number in count.values()):  # type: ignore[operator]
                    return f"cells.{place}.{cell} must have a total above 0, and counts from 0 to the total"
    return ""


def read_results(path: Path) -> Results:
    """Load `results.json`. Raises MissingInputError, or CheckpointError for another file or a newer format."""
    if not path.exists():
        raise MissingInputError(f"no such results: {path}")
    results: Results = read_json(path, Results, "the results.json of an evaluation")
    if fault := _inconsistency(results):
        raise CheckpointError(f"{path} is not the results.json of an evaluation: {fault}.")
    if results["format"] > FORMAT or not results["cells"]:
        raise CheckpointError(f"{path} contains no cells, or has a newer format than {FORMAT}: update mae_dat.")
    return results
