"""The file of requirements of `--require`: which number of an evaluation must be how large. Needs no torch."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_dat.config.errors import ConfigError, MissingInputError, suggest

REQUIRED_METRICS: dict[str, str] = {
    "accuracy": "accuracy in percent on the clean images; accuracy[SUITE], accuracy[SUITE, GROUP or CORRUPTION, N]",
    "balanced_accuracy": "mean recall over classes in percent, on the clean images or balanced_accuracy[SUITE]",
    "worst_class_recall": "lowest recall of a class, 0 to 1, on the clean images or worst_class_recall[SUITE]",
    "worst_group_accuracy": "accuracy of the worst group in percent: worst_group_accuracy[SUITE]",
    "corruption_error": "mean error over corruptions and severities in percent: the only such suite, or [SUITE]",
    "mce": "mean corruption error of the official ImageNet-C, divided by AlexNet's",
    "drop": "points of accuracy lost from the clean images: drop[fog, 3], drop[SUITE], drop[SUITE, GROUP]",
    "calibration_error": "expected calibration error (ECE) in percent, on the clean images or calibration_error[SUITE]",
}
"""Metrics by name."""
NO_WORSE = "no_worse_than"
SHARES = ("worst_class_recall",)
"""Metrics from 0 to 1; all others are in percent or points."""
_CONDITION = re.compile(r"(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*(%?)")
_NAME = re.compile(r"(\w+)\s*(?:\[([^\[\]]*)\])?")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One line of the file: a metric with its arguments, and the condition that it must meet."""

    text: str
    """As in the file."""
    metric: str
    arguments: tuple[str, ...]
    operator: str
    bound: float


@dataclasses.dataclass(frozen=True)
class NoWorse:
    """The requirement that nothing is worse than in an earlier evaluation by more than `by`."""

    text: str
    file: Path
    by: float
    model: str | None = None
    """Model of the earlier evaluation (default: that of the same name, or the only one)."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """The content of a file of requirements."""

    path: Path
    entries: tuple[Requirement | NoWorse, ...]


def read_requirements(path: str | Path) -> Requirements:
    """Read a file of requirements: `METRIC: "<= NUMBER"` lines, and `no_worse_than: {file: results.json, by: 0.5}`.

    Raises MissingInputError, and ConfigError, which names file, line and value, and suggests the nearest metric.
    """
    import yaml

    path = Path(path)
    try:
        loader = yaml.SafeLoader(path.read_text())
    except FileNotFoundError as error:
        raise MissingInputError(f"--require: there is no file {path}.") from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--require {path} is not valid YAML: {error}") from error
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise ConfigError(f'{path}: the file must contain lines such as accuracy: ">= 80".')
        entries: dict[str, Requirement | NoWorse] = {}
        for key_node, value_node in node.value:
            place = f"{path}, line {key_node.start_mark.line + 1}"
            key = str(key_node.value)
            if key in entries:
                raise ConfigError(f"{place}: {key} is given twice: remove one.")
            value = loader.construct_object(value_node, deep=True)
            entries[key] = _no_worse(key, value, path, place) if key == NO_WORSE else _requirement(key, value, place)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--require {path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return Requirements(path, tuple(entries.values()))


def _requirement(key: str, value: Any, place: str) -> Requirement:
    match = _NAME.fullmatch(key.strip())
    name = match[1] if match else key
    if match is None or name not in REQUIRED_METRICS:
        hint = suggest(name, [*REQUIRED_METRICS, NO_WORSE])
        raise ConfigError(f"{place}: unknown metric {key!r}: {hint}")
    arguments = tuple(word.strip() for word in match[2].split(",")) if match[2] else ()
    if name in ("drop", "worst_group_accuracy") and not arguments:
        raise ConfigError(f"{place}: {name} needs brackets: {REQUIRED_METRICS[name]}.")
    condition = _CONDITION.fullmatch(value.strip()) if isinstance(value, str) else None
    if condition is None:
        raise ConfigError(f'{place}: {key} must be a condition such as "<= 38" or ">= 0.6" in quotes, got {value!r}.')
    bound = float(condition[2]) / (100 if condition[3] and name in SHARES else 1)
    if name in SHARES and not 0 <= bound <= 1:
        raise ConfigError(f"{place}: {name} is a share from 0 to 1, got {value!r}: 60 % is 0.6.")
    return Requirement(f"{key}: {value.strip()}", name, arguments, condition[1], bound)


def _no_worse(key: str, value: Any, path: Path, place: str) -> NoWorse:
    known = ("file", "by", "model")
    if not isinstance(value, Mapping) or "file" not in value:
        raise ConfigError(f"{place}: {key} must be {{file: results.json, by: 0.5}}, got {value!r}.")
    if unknown := [str(name) for name in value if name not in known]:
        raise ConfigError(f"{place}: {key} has no {unknown[0]!r}: {suggest(unknown[0], known)}")
    by = value.get("by", 0.0)
    if isinstance(by, bool) or not isinstance(by, int | float) or not (math.isfinite(by) and by >= 0):
        raise ConfigError(f"{place}: by must be a number of points of 0 or more, got {by!r}.")
    file = Path(str(value["file"])).expanduser()
    file = file if file.is_absolute() else path.parent / file
    if not file.is_file():
        raise MissingInputError(f"{place}: there is no file {file}.")
    model = value.get("model")
    return NoWorse(f"{key}: {value['file']} by {by:g}", file, float(by), None if model is None else str(model))
