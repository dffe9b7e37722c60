"""Predict new images with any model: `mae-dat predict`, and `mae_dat.predict` from Python.

The flags become a `run`: `data.inputs` finds the images, `predictors` opens the model and passes them through it
(`batches`). `results` collects `predictions` in memory, and writes them with `result_files` and `box_files`. Loader,
transform and arithmetic are those of an evaluation.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_dat.config.commands.predict import PredictConfig
from mae_dat.config.flags import expand_home
from mae_dat.config.signature import check_flag_names, takes_flags
from mae_dat.config.terminal import print_text
from mae_dat.data.class_names import read_class_names
from mae_dat.prediction.predictions import Predictions
from mae_dat.prediction.results import Collector, Tally
from mae_dat.prediction.run import PredictionRun, open_run
from mae_dat.robustness.evaluate import is_timm_name, timm_place
from mae_dat.runtime.console import console_for_command, console_for_python, format_duration

logger = logging.getLogger(__name__)

_SHOWN = 10  # predictions that the command prints


_LEFT_OUT = ("images", "checkpoint", "classes", "output_dir", "no_draw")


@takes_flags(PredictConfig, _LEFT_OUT)
def predict(
    checkpoint: Any,
    images: Any,
    *,
    output_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    logits: bool = False,
    progress: bool = True,
    **flags: Any,
) -> Predictions:
    """Predict the classes of images with their probabilities, or boxes with a detector: `mae-dat predict`, from Python.

    Args:
        checkpoint: a model, as `evaluate` takes: an output folder, a weights file, an ONNX file, a released or timm
            name, a model from `load_model` (also a detector), a module of timm or transformers, or any callable from
            float images (B, 3, H, W) in [0, 1] to logits (B, K). None with `model` and `pretrained` for timm's weights.
        images: a path (file, folder of any depth, shards), a PIL image, an array (H, W, 3) or (B, H, W, 3) of uint8 or
            float in [0, 1], a tensor (3, H, W) or (B, 3, H, W), or a list of these.
        output_dir: folder for the files that `mae-dat predict` writes. By default nothing is written.
        classes: the names of the model's outputs in order (default: those that the checkpoint records; ImageNet's for
            1000 outputs; else numbers).
        logits: whether to keep the logits.
        progress: whether to show a progress bar and the log.
        flags: the other flags of `mae-dat predict`, listed below.

    Returns:
        `Predictions`: `.files`, `.classes`, `.probabilities` (n, K), `.labels()`; prints as a table.

    Raises:
        UserError: the images or the model cannot be used (before anything is predicted), no image can be read, or the
            model gives NaN or infinite logits.

    Examples:
        >>> import mae_dat, numpy
        >>> predictions = mae_dat.predict("mae_dat_demo", numpy.zeros((64, 64, 3)), progress=False)
        >>> predictions.probabilities.shape
        (1, 10)
        >>> predictions.labels()
        ['star']
    """
    check_flag_names(PredictConfig, flags, _LEFT_OUT, "predict")
    if isinstance(checkpoint, str | Path) and is_timm_name(str(checkpoint)):
        flags |= {"model": timm_place(str(checkpoint)), "pretrained": True}
        checkpoint = None
    config = PredictConfig.from_flags(images=(), **flags)
    with console_for_python(progress) as console:
        folder = None if output_dir is None else Path(expand_home(output_dir))
        run = open_run(checkpoint, images, classes, config, folder, console)
        collected = Collector(run.empty, keep_logits=logits)
        run.predict(collected.add)
    return collected.predictions()


# ---- the command ----


def main(config: PredictConfig) -> None:
    """Run the command."""
    console, folder, start = console_for_command(), Path(config.output_dir), time.monotonic()
    names = config.probabilities.classes
    classes = None if names is None else read_class_names(names)
    run = open_run(config.checkpoint, list(config.images), classes, config, folder, console)
    first, tally = Collector(run.empty, limit=_SHOWN), Tally()
    run.predict(first.add, tally.add)
    if tally.unreadable:
        logger.warning("%s images are unreadable: %s lists them", f"{tally.unreadable:,}", folder / "unreadable.txt")
    if run.empty.boxes is not None and not tally.boxes:
        logger.warning("no box has a score of %g or more: lower --score_threshold.", config.boxes.score_threshold)
    print_text(dataclasses.replace(first.predictions(), unreadable={}))
    print_text(f"{_summary(tally, run)} in {format_duration(time.monotonic() - start)}: {folder / 'predictions.csv'}")


def _summary(tally: Tally, run: PredictionRun) -> str:
    parts = [f"{_count(tally.predicted, 'image', 'images')} predicted"]
    if run.empty.boxes is not None:
        parts.append(f"{_count(tally.boxes, 'box', 'boxes')} of score {run.config.boxes.score_threshold:g} or more")
    if run.config.probabilities.abstain_below is not None:
        parts.append(f"{tally.abstained:,} abstained")
    return ", ".join([*parts, f"{tally.unreadable:,} unreadable"])


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"
