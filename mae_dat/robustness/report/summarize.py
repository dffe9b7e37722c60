"""From results to the data of a report: groups, metrics and differences, each computed here alone.

Tables, charts and sentences are made from `ReportData` alone and never see `Results`.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mae_dat.robustness.report.differences import (
    Difference,
    Differences,
    best_group,
    compare_groups,
    decide,
    measurement_of,
)
from mae_dat.robustness.report.groups import Group, groups_of, model_titles
from mae_dat.robustness.report.measurements import (
    Measurement,
    measurements_of,
    shared_size,
    shared_subset,
    subset_of_all,
    suites_of,
)
from mae_dat.robustness.report.metrics import Metric, columns_of, metrics_of
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.class_counts import ClassScores
from mae_dat.robustness.scores.predictions import ImageSets
from mae_dat.robustness.scores.reliability import ReliabilityBins
from mae_dat.robustness.scores.results import (
    AttackChecks,
    CalibrationScores,
    Collapse,
    ModelFacts,
    PairedCounts,
    Results,
    SuiteFacts,
    TrainingFacts,
    VersionedCells,
    known_calibration,
)

MAX_COLUMNS = 4
"""Groups that fit into a table as columns, beside their differences; more groups have a row each."""


@dataclass(frozen=True)
class CellCounts:
    """The counts of one cell and all that they depend on: a row of report.csv."""

    model: str
    model_facts: ModelFacts
    suite: str
    suite_facts: SuiteFacts
    cell: str
    count: Count


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows."""

    title: str
    command: str
    created: str
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    measured_under: list[VersionedCells]
    models: dict[str, ModelFacts]
    model_titles: dict[str, str]
    groups: list[Group]
    suites: list[str]
    """Those that any model was measured on, in the order of a report."""
    skipped: dict[str, str]
    """Suites that were not measured -> the reason."""
    measurements: list[Measurement]
    metrics: list[Metric]
    columns: dict[str, Metric]
    """Metrics by short title, and the errors by category: the columns of a table with a row for every group."""
    differences: Differences
    """By metric or column, new group and old group, where a seed has a value in both."""
    best: dict[Metric, Group]
    """The group that is better than every other beyond chance, where there is one."""
    image_subset: str
    """The choice of images that was measured, in words, if all suites share it; empty otherwise."""
    subset_of_all: bool
    """Whether that is also true of clean and cue-conflict images."""
    image_size: str
    """Input size of all models, if it is not the usual one; empty otherwise."""
    cells: list[CellCounts]
    classes: dict[str, dict[str, ClassScores]]
    """Predictions by class, by model and suite of unchanged images; empty for results of older releases."""
    paired: dict[str, dict[str, dict[str, PairedCounts]]]
    """By model, suite of the user's own images and cell: the comparison with clean images of the same names."""
    collapsed: dict[str, Collapse]
    """Models that have collapsed, and what shows it."""
    calibration: CalibrationScores
    reliability: ReliabilityBins
    """Bins of the reliability diagrams; empty for results of older releases."""
    image_sets: ImageSets
    """Names and labels of the images; empty for results of older releases."""
    checks: AttackChecks
    agreement: dict[str, Count]
    """By model in bfloat16: images with the same prediction in float32."""
    examples: list[dict[str, Any]]
    training: TrainingFacts | None
    inputs: dict[str, str]
    """What the evaluation read, label -> text; empty for results of older releases."""

    @property
    def groups_are_rows(self) -> bool:
        """Whether there are too many groups for a column each."""
        return len(self.groups) > MAX_COLUMNS

    def of_kind(self, kind: str) -> list[Measurement]:
        """Return the measurements of one kind: plain, shape, corruptions or words."""
        return [measurement for measurement in self.measurements if measurement.kind == kind]

    def difference(self, metric: Metric, new: Group, old: Group) -> Difference | None:
        """Return the difference of two groups; None if no seed has a value in both."""
        return self.differences.get((metric, new, old))

    def verdict(self, metric: Metric, new: Group, old: Group) -> int | None:
        """Return `Difference.verdict`; None if no seed has a value in both groups."""
        difference = self.difference(metric, new, old)
        return None if difference is None else difference.verdict

    def is_comparable(self, metric: Metric, new: Group, old: Group) -> bool:
        """Return whether the difference of two groups has an interval that can be believed, with a verdict or not."""
        difference = self.difference(metric, new, old)
        return difference is not None and difference.believable and difference.ends is not None

    def verdicts(self, new: Group, old: Group) -> dict[Metric, int | None]:
        """Return the verdict for every measurement that two groups share: that of its first metric with an interval.

        None where there are too few seeds.
        """
        verdicts: dict[tuple[str, tuple[str, ...]], tuple[Metric, int | None]] = {}
        for metric in self.metrics:
            if measurement_of(metric) not in verdicts and self.is_comparable(metric, new, old):
                verdicts[measurement_of(metric)] = metric, self.verdict(metric, new, old)
        return dict(verdicts.values())


def summarize(results: Results) -> ReportData:
    """Compute everything that a report shows."""
    results = _with_current_words(results)
    groups = groups_of(results)
    measurements = measurements_of(results, groups)
    calibration = known_calibration(results)
    metrics = metrics_of(measurements, calibration, results["checks"])
    columns = columns_of(metrics, measurements)
    differences = decide(_differences(dict.fromkeys([*metrics, *columns.values()]), groups))
    best = {metric: best_group(metric, groups, differences) for metric in metrics}
    return ReportData(
        title=results["title"],
        command=results["command"],
        created=results["created"],
        seconds=results["seconds"],
        machine=results["machine"],
        versions=results["versions"],
        measured_under=results.get("measured_under", []),
        models=results["models"],
        model_titles=model_titles(results),
        groups=groups,
        suites=suites_of(results),
        skipped=results["not_measured"],
        measurements=measurements,
        metrics=metrics,
        columns=columns,
        differences=differences,
        best={metric: group for metric, group in best.items() if group is not None},
        image_subset=shared_subset(results),
        subset_of_all=bool(subset_of_all(results)),
        image_size=shared_size(results),
        cells=list(_cells(results)),
        classes=results.get("classes", {}),
        paired=results.get("paired", {}),
        collapsed=results.get("collapsed", {}),
        calibration=calibration,
        reliability=results.get("reliability", {}),
        image_sets=results.get("image_sets", {}),
        checks=results["checks"],
        agreement=results.get("agreement", {}),
        examples=results["examples"],
        training=results.get("training"),
        inputs={label: text for label, text in results.get("inputs", {}).items() if label != "output"},
    )


def _with_current_words(results: Results) -> Results:
    """Return the results with "image" for "picture" in the descriptions of suites, which are part of cache keys and
    therefore keep their old word there."""
    suites = {
        model: {
            suite: {
                **facts,
                "protocol": {**facts["protocol"], "subset": _current_words(facts["protocol"].get("subset", ""))},
                "missing": [_current_words(text) for text in facts["missing"]],
            }
            for suite, facts in by_suite.items()
        }
        for model, by_suite in results["suites"].items()
    }
    not_measured = {suite: _current_words(reason) for suite, reason in results["not_measured"].items()}
    return {**results, "suites": suites, "not_measured": not_measured}  # type: ignore[typeddict-item]


def _current_words(text: str) -> str:
    return re.sub(r"\bpicture", "image", text, count=1)  # a later one may belong to the name of a class


def _differences(metrics: dict[Metric, None], groups: list[Group]) -> Differences:
    differences: Differences = {}
    for metric, (old, new) in itertools.product(metrics, itertools.combinations(groups, 2)):
        difference = compare_groups(metric, new, old)
        if difference is not None:
            differences[metric, new, old] = difference
            differences[metric, old, new] = difference.reversed()
    return differences


def _cells(results: Results) -> Iterator[CellCounts]:
    for model, suites in results["cells"].items():
        for suite, counts in suites.items():
            for cell, count in counts.items():
                yield CellCounts(
                    model=model,
                    model_facts=results["models"][model],
                    suite=suite,
                    suite_facts=results["suites"][model][suite],
                    cell=cell,
                    count=count,
                )
