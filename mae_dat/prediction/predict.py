"""Predict new images with any model: `mae-dat predict`, and `mae_dat.predict` from Python.

The flags become a `run`: `inputs` finds the images, `predictors` opens the model and passes them through it
(`batches`). `results` collects `predictions` in memory, and writes them with `result_files` and `box_files`. Loader,
transform and arithmetic are those of an evaluation.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mae_dat.config.commands.predict import PredictConfig
from mae_dat.config.errors import DataError
from mae_dat.prediction.predictions import Predictions
from mae_dat.prediction.results import Collector, Tally
from mae_dat.prediction.run import PredictionRun, open_run
from mae_dat.runtime.console import Console, console_for_command, format_duration
from mae_dat.storage.files import require_file

logger = logging.getLogger(__name__)

_SHOWN = 10  # predictions that the command prints


def predict(  # noqa: PLR0913 - one keyword per flag
    checkpoint: Any,
    images: Any,
    *,
    output_dir: str | Path | None = None,
    top_k: int = 5,
    classes: Sequence[str] | None = None,
    model: str | None = None,
    pretrained: bool = False,
    temperature: float = 1.0,
    calibrate: str | Path | None = None,
    abstain_below: float | None = None,
    score_threshold: float = 0.5,
    draw: int = 100,
    logits: bool = False,
    input_size: int | Sequence[int] | None = None,
    interpolation: str | None = None,
    crop: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    console: Console | None = None,
) -> Predictions:
    """Predict the classes of images with their probabilities, or boxes with a detector: the command, from Python.

    `checkpoint` is what `--checkpoint` takes, a loaded model, or any callable from float images (B, 3, H, W) in [0, 1]
    to logits (B, K); None with `model` and `pretrained` for timm's weights. `images` is a path (file, folder of any
    depth, shards), a PIL image, an array (H, W, 3) or (B, H, W, 3) of uint8 or float in [0, 1], a tensor (3, H, W) or
    (B, 3, H, W), or a list of these. The others are flags of `mae-dat predict`, but `classes` are the names themselves,
    `logits` keeps the logits, and `num_workers` and `precision` have the defaults of `evaluate`. Files are written only
    with `output_dir`. Raises UserError for wrong images or models, before anything is predicted; DataError if no image
    can be read; NumericsError for NaN or infinite logits.

    >>> import mae_dat, numpy
    >>> predictions = mae_dat.predict("mae_dat_demo", numpy.zeros((64, 64, 3)))
    >>> predictions.probabilities.shape
    (1, 10)
    >>> predictions.labels()
    ['star']
    """
    config = PredictConfig.from_flags(
        images=(), model=model, pretrained=pretrained, top_k=top_k, temperature=temperature, calibrate=calibrate,
        abstain_below=abstain_below, score_threshold=score_threshold, draw=draw, interpolation=interpolation, crop=crop,
        input_size=() if input_size is None else input_size, batch_size=batch_size, num_workers=num_workers,
        device=str(device), precision=precision,
    )  # fmt: skip
    folder = None if output_dir is None else Path(output_dir)
    run = open_run(checkpoint, images, classes, config, folder, console or Console())
    collected = Collector(run.empty, keep_logits=logits)
    run.predict(collected.add)
    return collected.predictions()


# ---- the command ----


def main(config: PredictConfig) -> None:
    """Run the command."""
    console, folder, start = console_for_command(), Path(config.output_dir), time.monotonic()
    names = config.probabilities.classes
    classes = None if names is None else read_class_names(Path(names))
    run = open_run(config.checkpoint, list(config.images), classes, config, folder, console)
    first, tally = Collector(run.empty, limit=_SHOWN), Tally()
    run.predict(first.add, tally.add)
    if tally.unreadable:
        logger.warning("%s images are unreadable: %s lists them", f"{tally.unreadable:,}", folder / "unreadable.txt")
    if run.empty.boxes is not None and not tally.boxes:
        logger.warning("no box has a score of %g or more: lower --score_threshold.", config.boxes.score_threshold)
    print(dataclasses.replace(first.predictions(), unreadable={}))
    print(f"{_summary(tally, run)} in {format_duration(time.monotonic() - start)}: {folder / 'predictions.csv'}")


def _summary(tally: Tally, run: PredictionRun) -> str:
    parts = [f"{_count(tally.predicted, 'image', 'images')} predicted"]
    if run.empty.boxes is not None:
        parts.append(f"{_count(tally.boxes, 'box', 'boxes')} of score {run.config.boxes.score_threshold:g} or more")
    if run.config.probabilities.abstain_below is not None:
        parts.append(f"{tally.abstained:,} abstained")
    return ", ".join([*parts, f"{tally.unreadable:,} unreadable"])


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def read_class_names(path: Path) -> list[str]:
    """Read the names of the classes, one a line. Raises MissingInputError, DataError for an empty line or none."""
    names = require_file(path, "--classes").read_text(encoding="utf-8").splitlines()
    if not names or not all(name.strip() for name in names):
        raise DataError(f"--classes {path}: give one name a line, without empty lines.")
    return names
