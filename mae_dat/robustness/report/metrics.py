"""Metrics: the rows of a report, such as the accuracy, mCE or shape bias of every model that shares a measurement."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.intervals import WeightedCount
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.paired import ImageScores, cue_bits, weighted_scores
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    Count,
    averaged_corruptions,
    category_errors,
    cue_coverage,
    shape_bias,
    suite_mean_error,
    top1_accuracy,
    top1_error,
)
from mae_dat.robustness.scores.corruption_error import ALEXNET, mce
from mae_dat.robustness.scores.image_bits import Bits, CellImages
from mae_dat.robustness.scores.results import CLEAN_SUITES, GROUP_PREFIX, AttackChecks, CalibrationScores

ROBUSTBENCH_SUBSET = "5,000 images of a list"  # the subset of a protocol that used RobustBench's list
GRADIENT_CHECKS = "gradient attacks"  # key of the checks that FGSM, PGD and AutoAttack share
HEADLINE_SHARE = 0.05  # of changed words; a table of its own has all shares
MAX_GROUP_ROWS = 12
"""Of more groups, only the worst has a row among the numbers."""
MANY_IMAGES = 5_000  # from here on, accuracies have two decimals


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric for one model."""

    value: float
    terms: tuple[WeightedCount, ...] = ()
    """The value is their weighted sum plus a constant; empty if it is not such a sum and has no interval."""
    doubtful: bool = False
    """Whether a sanity check of the attack failed, so that the model may be less robust than the value."""
    scores: ImageScores | None = field(default=None, compare=False, repr=False)
    """The same for each image, up to a constant; None if unknown."""

    @property
    def images(self) -> int:
        """Number of images in a cell, 0 if unknown."""
        return self.terms[0].count["total"] if self.terms else 0


@dataclass(frozen=True, eq=False)
class Metric:
    """One number of every model that shares a measurement."""

    key: str
    """imagenet-a, imagenet-c/mce, generated/mean, words-symbolic/0.05, ..."""
    suite: str
    title: str
    better: int
    """+1 if more is better, -1 if less is better, 0 if neither."""
    values: dict[str, MetricValue]
    """By model, in the order of the results."""
    published: str = ""
    """Column of the published table that it belongs to, if all official images were measured."""
    digits: int = 1


def metrics_of(
    measurements: Sequence[Measurement], calibration: CalibrationScores, checks: AttackChecks
) -> list[Metric]:
    """Compute every metric in the order of the report. Metrics without any value are left out."""
    metrics = [
        metric for measurement in measurements for metric in _metrics_of_measurement(measurement, calibration, checks)
    ]
    return [metric for metric in metrics if metric.values]


def _metrics_of_measurement(
    measurement: Measurement, calibration: CalibrationScores, checks: AttackChecks
) -> Iterator[Metric]:
    match measurement.kind:
        case "plain":
            return _plain_metrics(measurement, calibration, checks)
        case "shape":
            return _shape_metrics(measurement)
        case "words":
            return _word_metrics(measurement, checks)
        case "groups":
            return _group_metrics(measurement, checks)
        case _:
            return _corruption_metrics(measurement)


def _metric(
    measurement: Measurement,
    key: str,
    title: str,
    *,
    better: int,
    value: Callable[[str], MetricValue | None],
    published: str = "",
) -> Metric:
    """Return a metric of the models for which `value(model)` is not None."""
    values = {model: number for model in measurement.models if (number := value(model)) is not None}
    images = min((number.images for number in values.values()), default=0)
    return Metric(
        key=key,
        suite=measurement.suite,
        title=f"{measurement.title}{title}",
        better=better,
        values=values,
        published=published if measurement.complete else "",
        digits=2 if images >= MANY_IMAGES else 1,
    )


def _published_suffix(measurement: Measurement) -> str:
    """Return '-5000' for RobustBench's list, which has published rows of its own; '-part' for any other subset."""
    subset = measurement.facts["protocol"].get("subset", "")
    return {"": "", ROBUSTBENCH_SUBSET: "-5000"}.get(subset, "-part")


def attack_check_failed(checks: AttackChecks, model: str, suite: str) -> bool:
    """Return whether a sanity check of an attack failed; attacks that use gradients share one check of these."""
    shared = GRADIENT_CHECKS if suite.startswith(("fgsm", "pgd", "autoattack")) else suite
    return not all(check["passed"] for name in {suite, shared} for check in checks.get(model, {}).get(name, []))


def _accuracy_value(measurement: Measurement, checks: AttackChecks, cell: str, model: str) -> MetricValue:
    count = measurement.counts[model][cell]
    doubtful = attack_check_failed(checks, model, measurement.suite)
    terms = (WeightedCount(100.0, count, measurement.images[model].get(cell)),)
    return MetricValue(top1_accuracy(count), terms, doubtful, weighted_scores(terms))


def accuracy_values(measurement: Measurement, group: Group, cell: str) -> list[MetricValue]:
    """Return the accuracy of a group's members on a cell, in percent, of those that were measured on it."""
    members = [model for model in group.members.values() if cell in measurement.counts.get(model, {})]
    return [_accuracy_value(measurement, {}, cell, model) for model in members]


def error_values(measurement: Measurement, group: Group, cells: Mapping[str, Sequence[str]]) -> list[MetricValue]:
    """Return the mean error of a group's members over cells, by corruption: over the cells of each corruption, then
    over corruptions. Members that lack a cell are left out."""
    values = []
    for model in group.members.values():
        counts, images = measurement.counts.get(model, {}), measurement.images.get(model, {})
        if not cells or not all(cell in counts for names in cells.values() for cell in names):
            continue
        terms = tuple(
            WeightedCount(-100 / len(cells) / len(names), counts[cell], images.get(cell))
            for names in cells.values()
            for cell in names
        )
        error = 100 + sum(term.weight * term.count["correct"] / term.count["total"] for term in terms)
        values.append(MetricValue(error, terms, scores=weighted_scores(terms)))
    return values


def clean_error_values(measurement: Measurement, group: Group) -> list[MetricValue]:
    """Return the error of a group's members on the clean images that a suite of corruptions is compared with."""
    values = []
    for model in group.members.values():
        count = measurement.corruptions[model]["clean"]
        if count["total"]:
            terms = (WeightedCount(-100.0, count, measurement.images[model].get("clean")),)
            values.append(MetricValue(top1_error(count), terms, scores=weighted_scores(terms)))
    return values


def _plain_metrics(measurement: Measurement, calibration: CalibrationScores, checks: AttackChecks) -> Iterator[Metric]:
    """Yield the accuracy, and on clean images the expected calibration error."""
    suite = measurement.suite

    def calibration_error(model: str) -> MetricValue | None:
        ece = calibration.get(model, {}).get(suite, {}).get("ece")
        return None if ece is None else MetricValue(100 * ece)

    accuracy = functools.partial(_accuracy_value, measurement, checks, "")
    yield _metric(
        measurement, suite, " (%)", better=+1, value=accuracy, published=suite + _published_suffix(measurement)
    )
    if suite in CLEAN_SUITES:
        yield _metric(measurement, f"{suite}/ece", ": calibration error, ECE (%)", better=-1, value=calibration_error)


def _shape_metrics(measurement: Measurement) -> Iterator[Metric]:
    """Yield the shape bias on cue-conflict images and its coverage."""

    def cues(model: str) -> tuple[Bits, Bits] | None:
        count = measurement.counts[model][""]
        images = measurement.images[model].get("")
        return cue_bits(images, count["shape"], count["texture"], count["total"])

    def bias(model: str) -> MetricValue | None:
        count = measurement.counts[model][""]
        share = shape_bias(count)
        by_shape: Count = {"correct": count["shape"], "total": count["shape"] + count["texture"]}
        if share is None:
            return None
        bits = cues(model)
        scores = bits and ImageScores(bits[0].astype(np.float64), (bits[0] | bits[1]).astype(np.float64))
        return MetricValue(share, (WeightedCount(1.0, by_shape),), scores=scores)

    def coverage(model: str) -> MetricValue:
        count = measurement.counts[model][""]
        by_either: Count = {"correct": count["shape"] + count["texture"], "total": count["total"]}
        bits = cues(model)
        scores = bits and ImageScores(100 * (bits[0] | bits[1]).astype(np.float64), step=100.0)
        return MetricValue(100 * cue_coverage(count), (WeightedCount(100.0, by_either),), scores=scores)

    suite = measurement.suite
    yield replace(_metric(measurement, f"{suite}/bias", ": shape bias (0–1)", better=+1, value=bias), digits=3)
    yield _metric(measurement, f"{suite}/coverage", ": coverage (%)", better=0, value=coverage)


def _word_metrics(measurement: Measurement, checks: AttackChecks) -> Iterator[Metric]:
    """Yield the accuracy at the share of changed words that is nearest to `HEADLINE_SHARE`."""
    cells = measurement.counts[measurement.models[0]]
    shares = [cell for cell in cells if float(cell) > 0] or list(cells)
    share = min(shares, key=lambda cell: abs(float(cell) - HEADLINE_SHARE))
    accuracy = functools.partial(_accuracy_value, measurement, checks, share)
    title = f", {100 * float(share):g} % of the words (%)"
    yield _metric(measurement, f"{measurement.suite}/{share}", title, better=+1, value=accuracy)


def _group_metrics(measurement: Measurement, checks: AttackChecks) -> Iterator[Metric]:
    """Yield the accuracy over all images of a suite's groups, of the worst group, and of each group if they are few."""
    suite = measurement.suite
    cells = list(measurement.counts[measurement.models[0]])

    def overall(model: str) -> MetricValue:
        counts, images = measurement.counts[model], measurement.images[model]
        every = sum(count["total"] for count in counts.values())
        terms = tuple(
            WeightedCount(100 * count["total"] / every, count, images.get(cell)) for cell, count in counts.items()
        )
        return MetricValue(100 * sum(count["correct"] for count in counts.values()) / every, terms)

    def worst(model: str) -> MetricValue:
        return MetricValue(min(map(top1_accuracy, measurement.counts[model].values())))

    yield _metric(measurement, suite, ": all groups (%)", better=+1, value=overall)
    yield _metric(measurement, f"{suite}/worst", ": worst group (%)", better=+1, value=worst)
    for cell in cells if len(cells) <= MAX_GROUP_ROWS else ():
        group = cell.removeprefix(GROUP_PREFIX)
        accuracy = functools.partial(_accuracy_value, measurement, checks, cell)
        yield _metric(measurement, f"{suite}/{group}", f": {group} (%)", better=+1, value=accuracy)


def _corruption_metrics(measurement: Measurement) -> Iterator[Metric]:
    """Yield the mean error; for the official files also the mCEs of the literature, for others the mCE with the first
    group as the baseline."""
    suite, counts, groups = measurement.suite, measurement.corruptions, measurement.groups
    images = measurement.images

    def mce_of_first_group(model: str) -> MetricValue | None:
        seed = next(seed for group in groups for seed, member in group.members.items() if member == model)
        baseline = groups[0].members.get(seed)
        if len(groups) < 2 or baseline is None:
            return None
        return _mce_value(counts[model], counts[baseline])

    def alexnet_mce(model: str) -> MetricValue | None:
        return _alexnet_mce(counts[model], images[model])

    def alexnet_relative_mce(model: str) -> MetricValue | None:
        return _alexnet_mce(counts[model], images[model], relative=True)

    def mean_error(model: str) -> MetricValue:
        return _mean_error_value(counts[model], images[model])

    if measurement.official_imagenet_c:
        column = f"imagenet-c{_published_suffix(measurement)}/mce"
        yield _metric(measurement, f"{suite}/mce", ": mCE", better=-1, value=alexnet_mce, published=column)
        yield _metric(measurement, f"{suite}/rmce", ": relative mCE", better=-1, value=alexnet_relative_mce)
    yield _metric(measurement, f"{suite}/mean", ": mean corruption error (%)", better=-1, value=mean_error)
    if not measurement.facts["official"]:
        title = f": mCE, of {groups[0].title} 100"
        yield _metric(measurement, f"{suite}/mce-first", title, better=-1, value=mce_of_first_group)


ImagesOfCells = Mapping[str, CellImages]
"""By cell, such as fog/3, and "clean"."""


def _mean_error_value(counts: CorruptionCounts, images: ImagesOfCells) -> MetricValue:
    """Return the mean error over corruptions and severities, with the terms of its sum."""
    terms = _mean_error_terms(counts, averaged_corruptions(counts), images)
    return MetricValue(suite_mean_error(counts), terms, scores=weighted_scores(terms))


def _mean_error_terms(
    counts: CorruptionCounts, names: Sequence[str], images: ImagesOfCells
) -> tuple[WeightedCount, ...]:
    """Return the terms of the mean error in percent over some corruptions and their severities."""
    measured = counts["corruptions"]
    return tuple(
        WeightedCount(-100 / len(names) / len(measured[name]), count, images.get(f"{name}/{severity}"))
        for name in names
        for severity, count in measured[name].items()
    )


def _mce_value(counts: CorruptionCounts, baseline: CorruptionCounts, relative: bool = False) -> MetricValue | None:
    """Return the mCE without its terms; None if not everything that it needs was measured."""
    try:
        return MetricValue(mce(counts, baseline, relative))
    except ValueError:
        return None


def _alexnet_mce(counts: CorruptionCounts, images: ImagesOfCells, relative: bool = False) -> MetricValue | None:
    """Return the AlexNet-normalized mCE with the terms of its sum; None if not everything it needs was measured."""
    number = _mce_value(counts, ALEXNET, relative)
    if number is None:
        return None
    measured, baseline = counts["corruptions"], ALEXNET["corruptions"]
    clean_error = top1_error(ALEXNET["clean"]) if relative else 0.0
    divisors = {name: sum(top1_error(count) - clean_error for count in baseline[name].values()) for name in CORRUPTIONS}
    scale = 100 * 100 / len(CORRUPTIONS)
    terms = [
        WeightedCount(-scale / divisors[name], count, images.get(f"{name}/{severity}"))
        for name in CORRUPTIONS
        for severity, count in measured[name].items()
    ]
    if relative:
        weight = sum(scale * len(measured[name]) / divisors[name] for name in CORRUPTIONS)
        terms.append(WeightedCount(weight, counts["clean"], images.get("clean")))
    return replace(number, terms=tuple(terms), scores=weighted_scores(terms))


# ---- columns of a table with a row for every group ----


def columns_of(metrics: Sequence[Metric], measurements: Sequence[Measurement]) -> dict[str, Metric]:
    """Return every metric by a short title, or by its own where two would be equal, and the error of each category of
    corruptions after their mean.

    Only the mCE with the first group as the baseline is left out: the differences to this group say the same.
    """
    columns: dict[str, Metric] = {}
    for metric in metrics:
        if metric.key.endswith("/mce-first"):
            continue
        title = _short_title(metric)
        is_duplicate = title in columns
        columns[metric.title if is_duplicate else title] = metric
        if metric.key.endswith("/mean"):
            for category, error in _category_metrics(metric, measurements).items():
                columns[f"{metric.title}: {category}" if is_duplicate else category] = error
    return columns


def _short_title(metric: Metric) -> str:
    part = metric.key.removeprefix(metric.suite)
    if metric.suite in CLEAN_SUITES and part in ("", "/ece"):
        return "ECE" if part else "clean"
    if part in ("/mean", "/bias"):
        return {"/mean": "corruption error", "/bias": "shape bias"}[part]
    if metric.suite.startswith("words-"):
        return f"{metric.suite.removeprefix('words-')} words"
    return metric.title


def _category_metrics(mean: Metric, measurements: Sequence[Measurement]) -> dict[str, Metric]:
    """Return the error of each category for the models of a mean corruption error."""
    measurement = next(m for m in measurements if m.suite == mean.suite and set(m.models) >= set(mean.values))
    counts = measurement.corruptions
    metrics = {}
    for category, members in CATEGORIES.items():
        values = {}
        for model in mean.values:
            names = [name for name in members if counts[model]["corruptions"].get(name)]
            if names:
                terms = _mean_error_terms(counts[model], names, measurement.images[model])
                error = category_errors(counts[model])[category]
                values[model] = MetricValue(error, terms, scores=weighted_scores(terms))
        if values:
            key = f"{mean.suite}/{category}"
            metrics[category] = Metric(key, suite=mean.suite, title=category, better=-1, values=values)
    return metrics
