"""The table of a user's own shifted images: the accuracy of each group, and the change from clean images of the same
names."""

from collections.abc import Iterator, Mapping

import numpy as np

from mae_dat.robustness.report.charts import signed
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.paired import Comparison, ImageScores, compare_hits
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING, Table
from mae_dat.robustness.scores.accuracy import Count, top1_accuracy
from mae_dat.robustness.scores.results import GROUP_PREFIX, PairedCounts
from mae_dat.robustness.scores.worst import worst_share
from mae_dat.training.class_scores import exact_interval

_NOTES = (
    "Exact intervals (Clopper & Pearson). The interval of the worst group allows for choosing it among the groups "
    "(Bonferroni). Change: from the clean images with the same CLASS/NAME, in points, with Bonett & Price's paired "
    "interval, no narrower than McNemar's exact one.",
)


def shift_table(report: ReportData) -> Table | None:
    """Return the table; None without groups and without images that exist among the clean ones too."""
    rows = [row for measurement in report.measurements for row in _rows(report, measurement)]
    if not rows:
        return None
    return Table(
        key="shifts",
        title="Your own shifts",
        head=("suite", "group", "model", "images", "accuracy (%) [95 %]", "change from clean [95 %]", "pairs"),
        rows=tuple(rows),
        notes=_NOTES,
        words=3,
    )


def _rows(report: ReportData, measurement: Measurement) -> Iterator[tuple[str, ...]]:
    """Yield a row for the worst group, then for every group, of each model."""
    is_own = any(measurement.suite in report.paired.get(model, {}) for model in measurement.models)
    if measurement.kind not in ("groups", "plain") or not (is_own or measurement.kind == "groups"):
        return
    for model in measurement.models:
        counts = measurement.counts[model]
        paired = report.paired.get(model, {}).get(measurement.suite, {})
        title = report.model_titles[model]
        worst = worst_share(counts) if len(counts) > 1 else None
        if worst:
            name = worst.name.removeprefix(GROUP_PREFIX)
            accuracy = _with_interval(100 * worst.share, 100 * worst.low, 100 * worst.high)
            count = counts[worst.name]
            yield (
                measurement.title,
                f"worst: {name}",
                title,
                f"{count['total']:,}",
                accuracy,
                *_change(paired, worst.name),
            )
        for cell, count in counts.items():
            group = cell.removeprefix(GROUP_PREFIX) or "all"
            yield measurement.title, group, title, f"{count['total']:,}", _accuracy(count), *_change(paired, cell)


def _accuracy(count: Count) -> str:
    low, high = exact_interval(count["correct"], count["total"])
    return _with_interval(top1_accuracy(count), 100 * low, 100 * high)


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _change(paired: Mapping[str, PairedCounts], cell: str) -> tuple[str, str]:
    """Return the change from clean images in words, and the number of pairs."""
    if cell not in paired:
        return NOTHING, "0"
    change = paired_change(paired[cell])
    low, high = change.ends
    text = f"{signed(change.gap, 1)} [{signed(low, 1)}, {signed(high, 1)}]"
    return text, f"{sum(paired[cell].values()):,}"  # type: ignore[arg-type]


def paired_change(counts: PairedCounts) -> Comparison:
    """Return the change of the accuracy in percent from clean to shifted images, with its paired interval."""
    cells = ("both", "only_clean", "only_shifted", "neither")
    times = [counts[cell] for cell in cells]  # type: ignore[literal-required]
    clean = np.repeat([100.0, 100.0, 0.0, 0.0], times)
    shifted = np.repeat([100.0, 0.0, 100.0, 0.0], times)
    return compare_hits(ImageScores(shifted, step=100.0), ImageScores(clean, step=100.0))
