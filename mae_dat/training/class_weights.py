"""Weights of the classes in the loss: `--class_weights balanced|FILE`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mae_dat.config.errors import DataError, MissingInputError, listing, suggest
from mae_dat.config.flags import expand_home
from mae_dat.data.image_set import ImageSet

BALANCED = "balanced"


def class_weights(source: str | None, images: ImageSet, outputs: int) -> Tensor | None:
    """Return the weight of every output in the loss, float32 (outputs,); None without a source.

    `balanced` divides by the number of images of the class, scaled so that the mean over the images is 1. A YAML or
    JSON file maps the name of each class to its weight. Outputs without a class have the weight 1. Raises
    MissingInputError, and DataError for a file with unknown classes, without some class, or with wrong weights.
    """
    if not source:
        return None
    weights, counts = torch.ones(outputs), images.class_counts()
    if source == BALANCED:
        present = sum(count > 0 for count in counts)
        values = [sum(counts) / (present * count) if count else 1.0 for count in counts]
    else:
        values = _read(Path(expand_home(source)), images.classes)
    weights[: len(values)] = torch.tensor(values)
    return weights


def _read(path: Path, classes: Sequence[str]) -> list[float]:
    """Return the weights in a file, in the order of the classes."""
    if not path.is_file():
        raise MissingInputError(
            f"--class_weights {path}: no such file; give {BALANCED} or a file with `class: weight`."
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"--class_weights {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"--class_weights {path} must contain `class: weight` lines.")
    given = {str(name): value for name, value in content.items()}
    unknown = [name for name in given if name not in classes]
    if unknown:
        hint = suggest(unknown[0], list(classes)[:20])
        raise DataError(f"--class_weights {path} has unknown classes: {listing(unknown)}; {hint}")
    missing = [name for name in classes if name not in given]
    if missing:
        raise DataError(
            f"--class_weights {path} has no weight for {listing(missing)}: add them, such as `{missing[0]}: 1`."
        )
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise DataError(
                f"--class_weights {path}: the weight of {name} must be a number of 0 or more, got {value!r}."
            )
    if not any(given.values()):
        raise DataError(f"--class_weights {path}: all weights are 0.")
    return [float(given[name]) for name in classes]
