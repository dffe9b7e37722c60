"""The table of a suite of corruptions: error, CE and relative CE of every corruption, category and severity."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.tables import NOTHING, Table, mean_text
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    averaged_corruptions,
    category_errors,
    severity_errors,
    suite_mean_error,
    unnormalized_ce,
)
from mae_dat.robustness.scores.corruption_error import corruption_errors, mce, severity_mce

Score = Callable[[CorruptionCounts], float]
_ERROR_NOTE = "Error averaged over severities. Held-out corruptions never count in a mean."
_CE_NOTE = "CE: error over AlexNet's, in percent (Hendrycks & Dietterich 2019); their mean over the 15 is the mCE."
_RELATIVE_CE_NOTE = (
    "Relative CE: the same of what the error is above that on clean images, of both models; their mean is "
    "the relative mCE."
)


class _Row(NamedTuple):
    """A row of the table: up to three scores, of which the later ones need ImageNet-C's files."""

    title: str
    kind: str
    """Category of the corruption."""
    section: str
    """Lines are drawn between sections."""
    scores: tuple[Score, ...]
    """Error, CE and relative CE, all in percent."""


def corruption_table(measurement: Measurement) -> Table:
    """Return the error in percent of each corruption over severities, and for the official files its AlexNet-normalized
    CE, also relative to the clean error."""
    groups, counts = measurement.groups, measurement.corruptions
    official = measurement.official_imagenet_c
    clean = official and any(model_counts["clean"]["total"] for model_counts in counts.values())
    columns = ("error %", *(("CE",) if official else ()), *(("relative CE",) if clean else ()))
    by_group = [[counts[model] for model in group.members.values()] for group in groups]
    rows, sections = [], []
    for row in _all_rows(corruption_names(counts)):
        texts = [[_score_text(score, members) for members in by_group] for score in row.scores[: len(columns)]]
        texts += [[NOTHING] * len(groups)] * (len(columns) - len(texts))
        if any(text != NOTHING for text in texts[0]):
            rows.append((row.title, row.kind, *itertools.chain(*texts)))
            sections.append(row.section)
    notes = [_ERROR_NOTE, *([_CE_NOTE] if official else []), *([_RELATIVE_CE_NOTE] if clean else [])]
    return Table(
        key=re.sub(r"[^a-z0-9]+", "-", f"corruptions {measurement.title}".lower()).strip("-"),
        title=measurement.title,
        head=("corruption", "kind", *(f"{group.title}, {column}" for column in columns for group in groups)),
        rows=tuple(rows),
        notes=tuple(notes),
        words=2,
        breaks=frozenset(section_starts(sections)),
    )


def corruption_names(counts: Mapping[str, CorruptionCounts]) -> list[str]:
    """Return the corruptions that any model has, in the usual order."""
    measured = dict.fromkeys(name for model_counts in counts.values() for name in model_counts["corruptions"])
    usual = [name for name in CORRUPTIONS + EXTRA if name in measured]
    return usual + [name for name in measured if name not in usual]


def corruption_categories(names: Iterable[str]) -> dict[str, str]:
    """Return the category of each corruption: "held out" for the four that never count, "" for those of another
    suite."""
    category_of = {name: category for category, members in CATEGORIES.items() for name in members}
    names = list(names)
    other = "held out" if any(name in category_of for name in names) else ""
    return {name: category_of.get(name, other) for name in names}


def section_starts(sections: Sequence[str]) -> list[int]:
    """Return the positions, but the first, where another section begins."""
    return [i for i in range(1, len(sections)) if sections[i] != sections[i - 1]]


def mean_errors_by_severity(counts: CorruptionCounts) -> dict[int, float]:
    """Return the error in percent at each severity, over the same corruptions as `suite_mean_error`."""
    return severity_errors(counts, averaged_corruptions(counts))


def _all_rows(names: Sequence[str]) -> list[_Row]:
    categories = corruption_categories(names)
    rows = [
        _Row(
            title=name.replace("_", " "),
            kind=categories[name],
            section=categories[name],
            scores=(partial(_error, name), partial(_ce, name), partial(_ce, name, relative=True)),
        )
        for name in names
    ]
    for category, members in CATEGORIES.items() if any(name in CORRUPTIONS for name in names) else ():
        ce = partial(mce, names=members)
        error = partial(_category_error, category)
        rows.append(_Row(f"mean of {category}", "", "means", (error, ce, partial(ce, relative=True))))
    for severity in SEVERITIES:
        scores = (partial(_severity_error, severity), partial(_severity_ce, severity))
        rows.append(_Row(f"severity {severity}", "", "", scores))
    rows.append(_Row("mean", "", "means", (suite_mean_error, mce, partial(mce, relative=True))))
    return rows


def _score_text(score: Score, members: Sequence[CorruptionCounts]) -> str:
    """Format the mean over seeds with one decimal; a dash if not everything that the score needs was measured."""
    try:
        return mean_text(map(score, members), 1)
    except (KeyError, ValueError):
        return NOTHING


def _error(name: str, counts: CorruptionCounts) -> float:
    return unnormalized_ce(counts["corruptions"][name])


def _ce(name: str, counts: CorruptionCounts, relative: bool = False) -> float:
    # Of this corruption alone: `corruption_errors` raises if any of its corruptions lacks a severity.
    alone: CorruptionCounts = {**counts, "corruptions": {name: counts["corruptions"][name]}}
    return corruption_errors(alone, relative=relative)[name]


def _category_error(category: str, counts: CorruptionCounts) -> float:
    return category_errors(counts)[category]


def _severity_error(severity: int, counts: CorruptionCounts) -> float:
    return mean_errors_by_severity(counts)[severity]


def _severity_ce(severity: int, counts: CorruptionCounts) -> float:
    return severity_mce(counts)[severity]
