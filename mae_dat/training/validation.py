"""The scores by class at the end of a fine-tuning: a table in the log, and `validation.json`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_dat.runtime.collectives import on_main_rank
from mae_dat.storage.files import atomic_write
from mae_dat.training.accuracy import ValidationScores
from mae_dat.training.class_scores import SHOWN_CLASSES, balanced_interval, confusion_lines, recalls

logger = logging.getLogger(__name__)
VALIDATION_FILE = "validation.json"
VALIDATION_FORMAT = 1


def report_classes(validation: ValidationScores, classes: Sequence[str], folder: Path | None) -> None:
    """Log the confusion matrix of the validation images and, with a folder, write it with the recall of each class to
    `validation.json` there. Does nothing with more classes than a confusion matrix is made for. Collective.

    Raises StorageError.
    """
    if (confusion := validation.confusion) is None:
        return
    names = [*classes, *(f"output {number}" for number in range(len(classes), len(confusion)))]
    content = validation_content(validation, names)

    def report() -> None:
        heading = "confusion matrix" if len(names) <= SHOWN_CLASSES else "most frequent errors"
        logger.info("%s of the validation images:\n%s", heading, "\n".join(confusion_lines(confusion, names)))
        if folder:
            with atomic_write(folder / VALIDATION_FILE) as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")

    on_main_rank(report)


def validation_content(validation: ValidationScores, names: Sequence[str]) -> dict[str, Any]:
    """Return the content of `validation.json`: scores, the recall of each class with its exact 95 % interval, and the
    confusion matrix by label and prediction, without zeros."""
    confusion = validation.confusion
    assert confusion is not None
    hits, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    rows = {
        names[row]: {names[column]: count for column, count in enumerate(counts) if count}
        for row, counts in enumerate(confusion.tolist())
        if any(counts)
    }
    return {
        "format": VALIDATION_FORMAT,
        **validation.scores,
        "balanced_interval": balanced_interval(hits, totals),
        "recall": recalls(hits, totals, names),
        "confusion": rows,
    }
