"""The numbers that requirements are about, with their 95 % intervals."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mae_dat.config.errors import ConfigError, DataError, listing, suggest
from mae_dat.config.requirements import REQUIRED_METRICS, NoWorse, Requirement
from mae_dat.robustness.report.groups import groups_of
from mae_dat.robustness.report.intervals import share_difference, wilson
from mae_dat.robustness.report.measurements import measurements_of, suite_kind
from mae_dat.robustness.report.metrics import MetricValue, metrics_of
from mae_dat.robustness.report.paired import ImageScores, compare_hits, compare_images, compare_pair, known_bits
from mae_dat.robustness.report.shift_table import paired_change
from mae_dat.robustness.scores.accuracy import Count, top1_accuracy
from mae_dat.robustness.scores.class_counts import ClassScores, hits_and_totals
from mae_dat.robustness.scores.results import CLEAN_SUITES, GROUP_PREFIX, Results
from mae_dat.robustness.scores.worst import worst_share
from mae_dat.training.class_scores import balanced_interval, exact_interval


@dataclasses.dataclass(frozen=True)
class GateValue:
    """A number with its 95 % interval, None where there is none."""

    value: float
    ends: tuple[float, float] | None = None
    digits: int = 2

    def __str__(self) -> str:
        if self.ends is None:
            return f"{self.value:.{self.digits}f} (no interval)"
        return f"{self.value:.{self.digits}f} [{self.ends[0]:.{self.digits}f}, {self.ends[1]:.{self.digits}f}]"


def value_of(results: Results, model: str, requirement: Requirement) -> GateValue:
    """Return the number of a requirement. Raises ConfigError, with what was measured, for another one."""
    name, arguments = requirement.metric, requirement.arguments
    try:
        match name:
            case "accuracy":
                return _accuracy(_count(results, model, *_suite_and_cell(results, model, arguments)))
            case "drop":
                return _drop(results, model, arguments)
            case "worst_group_accuracy":
                return _worst_group(results, model, arguments[0])
            case "worst_class_recall" | "balanced_accuracy":
                return _by_class(results, model, name, arguments)
            case "calibration_error":
                return _calibration_error(results, model, arguments)
            case _:
                return _corruption_error(results, model, name, arguments)
    except _NotMeasuredError as error:
        raise ConfigError(
            f"the requirement {requirement.text!r} is about {error}; {REQUIRED_METRICS[name]}."
        ) from error


class _NotMeasuredError(Exception):
    """A number that the results do not have, in words."""


# ---- suites and cells ----


def _clean_suite(results: Results, model: str) -> str:
    for name in CLEAN_SUITES:
        if name in results["cells"][model]:
            return name
    raise _NotMeasuredError("clean images, which were not measured")


def _suite(results: Results, model: str, arguments: Sequence[str]) -> str:
    """Return the suite that the first argument names, the clean one without arguments."""
    if not arguments:
        return _clean_suite(results, model)
    suites = list(results["cells"][model])
    if arguments[0] not in suites:
        raise _NotMeasuredError(f"{arguments[0]}, which was not measured: {suggest(arguments[0], suites)}")
    return arguments[0]


def _suite_and_cell(results: Results, model: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Return the suite and cell of arguments: SUITE; SUITE, GROUP; SUITE, CORRUPTION, SEVERITY; or a corruption and its
    severity alone where one suite has it."""
    cells = results["cells"][model]
    if len(arguments) == 2 and arguments[1].isdigit() and arguments[0] not in cells:
        cell = f"{arguments[0]}/{arguments[1]}"
        suites = [suite for suite, counts in cells.items() if cell in counts]
        if len(suites) != 1:
            known = sorted({name.split("/")[0] for counts in cells.values() for name in counts if "/" in name})
            fault = f"in {listing(suites)}: name the suite too" if suites else "which was not measured"
            hint = "" if suites else f": {suggest(arguments[0], known)}" if known else ""
            raise _NotMeasuredError(f"{cell}, {fault}{hint}")
        return suites[0], cell
    suite = _suite(results, model, arguments)
    rest = list(arguments[1:])
    cell = "/".join(rest) if len(rest) != 1 or rest[0] in cells[suite] else f"{GROUP_PREFIX}{rest[0]}"
    if rest and cell not in cells[suite]:
        names = [name.removeprefix(GROUP_PREFIX) for name in cells[suite]]
        raise _NotMeasuredError(f"{', '.join(rest)} of {suite}, which was not measured: {suggest(rest[0], names)}")
    return suite, cell


def _count(results: Results, model: str, suite: str, cell: str) -> Count:
    """Return the count of a cell; of all groups together if none is named."""
    counts = results["cells"][model][suite]
    if cell in counts:
        return counts[cell]
    if suite_kind(counts) != "groups":
        raise _NotMeasuredError(f"{suite}, which has several cells: name one, such as {next(iter(counts))}")
    return {
        "correct": sum(count["correct"] for count in counts.values()),
        "total": sum(count["total"] for count in counts.values()),
    }


# ---- numbers ----


def _accuracy(count: Count) -> GateValue:
    low, high = exact_interval(count["correct"], count["total"])
    return GateValue(top1_accuracy(count), (100 * low, 100 * high))


def _drop(results: Results, model: str, arguments: Sequence[str]) -> GateValue:
    """Return the points lost from clean images, paired where the same images were measured."""
    suite, cell = _suite_and_cell(results, model, arguments)
    clean_suite = _clean_suite(results, model)
    paired = results.get("paired", {}).get(model, {}).get(suite, {})
    if cell in paired:
        change = paired_change(paired[cell])
        return GateValue(-change.gap, (-change.ends[1], -change.ends[0]))
    clean, count = results["cells"][model][clean_suite][""], _count(results, model, suite, cell)
    scores = [_scores(results, model, clean_suite, ""), _scores(results, model, suite, cell)]
    orders = {_order(results, model, clean_suite, ""), _order(results, model, suite, cell)}
    if scores[0] is not None and scores[1] is not None and len(orders) == 1:
        change = compare_hits(scores[0], scores[1])
        return GateValue(change.gap, change.ends)
    low, high = share_difference(clean, count)
    return GateValue(top1_accuracy(clean) - top1_accuracy(count), (100 * low, 100 * high))


def _scores(results: Results, model: str, suite: str, cell: str) -> ImageScores | None:
    images = results.get("images", {}).get(model, {}).get(suite, {}).get(cell)
    count = results["cells"][model][suite].get(cell)
    if images is None or count is None:
        return None
    bits = known_bits(images["correct"], count["correct"], count["total"])
    return None if bits is None else ImageScores(100.0 * bits.astype(np.float64), step=100.0)


def _order(results: Results, model: str, suite: str, cell: str) -> str | None:
    images = results.get("images", {}).get(model, {}).get(suite, {}).get(cell)
    return None if images is None else images["order"]


def _worst_group(results: Results, model: str, suite: str) -> GateValue:
    worst = worst_share(results["cells"][model][_suite(results, model, [suite])])
    if worst is None:
        raise _NotMeasuredError(f"{suite}, which has no images")
    return GateValue(100 * worst.share, (100 * worst.low, 100 * worst.high))


def _by_class(results: Results, model: str, name: str, arguments: Sequence[str]) -> GateValue:
    suite = _suite(results, model, arguments)
    scores: ClassScores | None = results.get("classes", {}).get(model, {}).get(suite)
    if scores is None:
        raise _NotMeasuredError(f"the classes of {suite}, whose predictions were not counted by class")
    hits, totals = hits_and_totals(scores)
    if name == "balanced_accuracy":
        return GateValue(scores["balanced_accuracy"], balanced_interval(hits, totals))
    counts = {
        label: Count(correct=hit, total=total)
        for label, hit, total in zip(scores["confusion"], hits, totals, strict=True)
    }
    worst = worst_share(counts)
    assert worst is not None
    return GateValue(worst.share, (worst.low, worst.high), digits=3)


def _calibration_error(results: Results, model: str, arguments: Sequence[str]) -> GateValue:
    suite = _suite(results, model, arguments)
    ece = results["calibration"].get(model, {}).get(suite, {}).get("ece")
    if ece is None:
        raise _NotMeasuredError(f"the calibration on {suite}, which was not measured")
    return GateValue(100 * ece)


def _corruption_error(results: Results, model: str, name: str, arguments: Sequence[str]) -> GateValue:
    """Return the mean corruption error of a suite, or the mCE of ImageNet-C."""
    key = {"corruption_error": "mean", "mce": "mce"}[name]
    values = _metric_values(results, model)
    found = {metric.removesuffix(f"/{key}"): value for metric, value in values.items() if metric.endswith(f"/{key}")}
    if arguments:
        found = {suite: value for suite, value in found.items() if suite == _suite(results, model, arguments)}
    if len(found) != 1:
        fault = (
            f"one of {listing(list(found))}: name it in brackets" if found else "corruptions, which were not measured"
        )
        raise _NotMeasuredError(fault)
    (value,) = found.values()
    return GateValue(value.value, interval_of(value))


def _metric_values(results: Results, model: str) -> dict[str, MetricValue]:
    """Return the metrics of one model by their keys."""
    groups = groups_of(results)
    metrics = metrics_of(measurements_of(results, groups), results["calibration"], results["checks"])
    return {metric.key: metric.values[model] for metric in metrics if model in metric.values}


def interval_of(value: MetricValue) -> tuple[float, float] | None:
    """Return the 95 % interval of one model's number; None if there is none.

    Exact for an accuracy (Clopper & Pearson), else a bootstrap over images, with all versions of an image together;
    without predictions for each image, the sum of Wilson's intervals, which is the widest possible.
    """
    scores = value.scores
    if len(value.terms) == 1 and value.terms[0].weight == 100:
        count = value.terms[0].count
        low, high = exact_interval(count["correct"], count["total"])
        return 100 * low, 100 * high
    if scores is not None and scores.weights is None:
        level = ImageScores(np.full(len(scores.scores), scores.value), step=scores.step, most=scores.most)
        low, high = compare_images(scores, level).ends
        return value.value + low, value.value + high
    if not value.terms:
        return None
    low = high = 0.0
    for term in value.terms:
        share = term.count["correct"] / term.count["total"]
        ends = [term.weight * (end - share) for end in wilson(term.count)]
        low, high = low + min(ends), high + max(ends)
    return value.value + low, value.value + high


# ---- no worse than an earlier evaluation ----


def differences_to(results: Results, model: str, earlier: Results, entry: NoWorse) -> Iterator[tuple[str, GateValue]]:
    """Yield, for the main number of every suite that both evaluations have, by how much it improved, with a paired
    interval. Raises ConfigError for an unknown model, DataError for other images or another protocol."""
    old_model = _earlier_model(model, earlier, entry)
    suites = [suite for suite in results["cells"][model] if suite in earlier["cells"][old_model]]
    if not suites:
        raise DataError(f"{entry.file} has none of the suites {listing(list(results['cells'][model]))}.")
    for suite in suites:
        new_facts, old_facts = results["suites"][model][suite], earlier["suites"][old_model][suite]
        if new_facts["fingerprint"] != old_facts["fingerprint"]:
            raise DataError(
                f"{entry.file} was measured on other images of {suite} ({old_facts['images']:,} images, now "
                f"{new_facts['images']:,}; the names, labels or contents differ): measure both on the same ones."
            )
        if changed := _changed_protocol(new_facts["protocol"], old_facts["protocol"]):
            raise DataError(f"{entry.file} was measured in another way on {suite}: {changed}.")
    new_values, old_values = _metrics_by_suite(results, model), _metrics_by_suite(earlier, old_model)
    for suite in suites:
        if suite in new_values and suite in old_values:
            (key, better, new), (_, _, old) = new_values[suite], old_values[suite]
            yield key, _difference(new, old, better)


def _earlier_model(model: str, earlier: Results, entry: NoWorse) -> str:
    models = list(earlier["models"])
    wanted = entry.model or (model if model in models else models[0] if len(models) == 1 else model)
    if wanted not in models:
        raise ConfigError(f"{entry.file} has no model {wanted!r}: {suggest(wanted, models)} Name it: model: NAME.")
    return wanted


def _changed_protocol(new: dict[str, str], old: dict[str, str]) -> str:
    return ", ".join(
        f"{key} {old.get(key, 'none')!r}, now {new.get(key, 'none')!r}"
        for key in sorted({*new, *old})
        if new.get(key) != old.get(key) and key not in ("folder", "preprocessing")
    )


def _metrics_by_suite(results: Results, model: str) -> dict[str, tuple[str, int, MetricValue]]:
    """Return the first metric of every suite, for which more or less is better."""
    metrics = metrics_of(measurements_of(results, groups_of(results)), results["calibration"], results["checks"])
    found: dict[str, tuple[str, int, MetricValue]] = {}
    for metric in metrics:
        if model in metric.values and metric.better:
            found.setdefault(metric.suite, (metric.key, metric.better, metric.values[model]))
    return found


def _difference(new: MetricValue, old: MetricValue, better: int) -> GateValue:
    """Return the improvement from old to new, positive if it is one, with its interval."""
    gap = better * (new.value - old.value)
    if new.scores is not None and old.scores is not None and len(new.scores.scores) == len(old.scores.scores):
        low, high = compare_pair(new.scores, old.scores).ends
    else:
        new_ends, old_ends = interval_of(new), interval_of(old)
        if new_ends is None or old_ends is None:
            return GateValue(gap)
        low, high = new_ends[0] - old_ends[1], new_ends[1] - old_ends[0]
    return GateValue(gap, (low, high) if better > 0 else (-high, -low))
