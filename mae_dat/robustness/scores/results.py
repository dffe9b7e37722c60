"""What an evaluation leaves: integer counts of every cell, and all that tells one number from another of the same name.

`results.json` holds a `Results`; every percentage in a report is computed from it, and can be again, offline.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.storage.files import atomic_write

FORMAT = 1


class ModelFacts(TypedDict):
    """A network that was evaluated; all of it is part of its results' key."""

    title: str
    source: str
    """What was given: a path, a released or timm's name, "callable"."""
    sha256: str | None
    """Of its weights file and, of an ONNX graph, those beside it; of a network's weights from Python."""
    architecture: str
    parameters: int
    size: list[int]
    """Input height and width in pixels."""
    normalization: str
    """Inside the network: mean and deviation in words."""
    interpolation: str
    crop: NotRequired[float]
    """The crop's side over the resized picture's, where it is not the usual one: of timm's weights, timm's crop_pct."""
    precision: str
    """fp32 or bf16."""
    averaged: bool | None
    """Whether the weights are an exponential moving average; None where nothing says."""


class SuiteFacts(TypedDict):
    """How a benchmark was measured."""

    title: str
    protocol: dict[str, str]
    """Reading of the logits, preprocessing, folder, subset, seed, strength: part of a result's key."""
    official: bool
    """Whether the pictures are the published files; generated ones are labelled apart."""
    images: int
    """In each cell; in the fullest, where a partial folder's cells differ."""
    left_out: int
    """Of each cell."""
    missing: list[str]
    """What a partial folder lacks in any cell; such rows are marked."""
    fingerprint: str
    """sha256 of names, labels and some of the bytes of the pictures of all cells."""


TrainingCurve = list[list[float | None]]
"""[epoch, value] pairs; None where the value was not finite."""


class TrainingRun(TypedDict):
    """How a network came about; those of one arm differ in their seed alone."""

    arm: str
    label: str
    seed: int
    seconds: float
    """Of the training, by the clock."""
    cpu_seconds: NotRequired[float]
    """The same in processor time, over all threads and ranks; loader workers are not in it."""
    curves: dict[str, TrainingCurve]
    """train_loss, test_acc1 (%), changed_words (share, 0 to 1)."""


class TrainingGallery(TypedDict):
    """Pictures drawn in training; `file` is a PNG, relative to the results."""

    title: str
    caption: str
    file: str


class TrainingFacts(TypedDict):
    """What a comparison of trainings knows beside its counts."""

    runs: dict[str, TrainingRun]
    """By model."""
    pretraining: dict[str, TrainingCurve]
    """Its curves."""
    seconds: float
    """Of the pretraining."""
    cpu_seconds: NotRequired[dict[str, float]]
    """Processor time of each pretraining, by its title."""
    settings: dict[str, dict[str, Any]]
    """Stage -> setting -> value."""
    galleries: list[TrainingGallery]


class VersionedCells(TypedDict):
    """What was measured under some versions."""

    versions: dict[str, str]
    """Empty where an older release, which did not record them, stored the counts."""
    cells: dict[str, dict[str, list[str]]]
    """By model and suite."""


class Results(TypedDict):
    """Everything that an evaluation found."""

    format: int
    title: str
    command: str
    created: str
    """UTC, ISO 8601."""
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    """All that any number was measured under."""
    measured_under: NotRequired[list[VersionedCells]]
    """Which number under which versions: stored ones may be of others than the run that wrote these results."""
    models: dict[str, ModelFacts]
    """By the name that cells use, in the order of the command line."""
    suites: dict[str, dict[str, SuiteFacts]]
    """By model (its size and interpolation are part of the protocol) and suite: imagenet-v2, imagenet-c, generated,
    cue-conflict, pgd-5-1/255, words-symbolic, ..."""
    cells: dict[str, dict[str, dict[str, Count]]]
    """By model and suite, then by cell: "" for a whole suite, "fog/3" for a corruption and severity, "0.05" for a share
    of changed words."""
    calibration: dict[str, dict[str, dict[str, float | None]]]
    """By model and suite: ece, rms, rms_compat, nll (None where it is infinite), brier."""
    checks: dict[str, dict[str, list[dict[str, Any]]]]
    """By model and attack: whether the attack can be believed (`pixel_attacks.attack_checks`)."""
    agreement: NotRequired[dict[str, Count]]
    """By model in bfloat16: for how many clean pictures its answer is the one that it gives in float32."""
    not_measured: dict[str, str]
    """Suites that were asked for or known, and why there is no number."""
    examples: list[dict[str, Any]]
    """Pictures on which the models differ: file (PNG beside results.json), suite, cell, label, answers by model."""
    training: NotRequired[TrainingFacts]


def all_versions(under: Sequence[VersionedCells]) -> dict[str, str]:
    """The versions of each package that occur, and whether there are cells without any."""
    every = [one["versions"] for one in under]
    names = dict.fromkeys(name for one in every for name in one)
    found = {name: " and ".join(dict.fromkeys(one[name] for one in every if name in one)) for name in names}
    return found if all(every) else {**found, "of some cells": "not recorded by an older release"}


def write_results(results: Results, path: Path) -> None:
    """Writes `results.json`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")


def read_results(path: Path) -> Results:
    """Reads `results.json`. Raises MissingInputError, CheckpointError for another file or a newer format."""
    try:
        found: Results = json.loads(path.read_text(), parse_constant=lambda infinity: None)  # of older releases
        newest = found["format"] <= FORMAT and bool(found["cells"])
    except FileNotFoundError as error:
        raise MissingInputError(f"no such results: {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no results.json of an evaluation ({error}).") from error
    if not newest:
        raise CheckpointError(f"{path} holds no cells, or has a newer format than {FORMAT}: update mae_dat.")
    return found
