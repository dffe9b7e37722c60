"""The charts of an evaluation's report: which numbers stand in which picture, and its words for who cannot see it."""

import base64
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mae_dat.robustness.corruptions import CATEGORIES, SEVERITIES
from mae_dat.robustness.report import charts, comparison, tables
from mae_dat.robustness.report.groups import Group, groups_of
from mae_dat.robustness.report.metrics import (
    Metric,
    Variant,
    kind_of,
    kinds_of,
    mean_of,
    metrics_of,
    scores_of,
    severity_means,
    variants,
)
from mae_dat.robustness.report.published import COLUMNS, published_rows
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    SeedStatistics,
    category_errors,
    cue_coverage,
    severity_errors,
    shape_bias,
    top1_accuracy,
    top1_error,
)
from mae_dat.robustness.scores.results import Results, TrainingCurve, TrainingFacts

CURVES = {
    "train_loss": "training loss",
    "test_acc1": "test accuracy (%)",
    "changed_words": "changed words (%)",
}


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the page; a chart's `png` is also written to figures/`name`."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture itself, as an address that needs no network."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def width(self) -> int:
        """Width in CSS pixels, from the PNG header: charts are drawn at twice the density."""
        pixels: int = struct.unpack(">I", self.png[16:20])[0]
        return round(pixels / charts.DENSITY)


def of_kind(results: Results, kind: str) -> list[Variant]:
    """The measurements of one kind: plain, shape, corruptions or words."""
    return [one for one in variants(results) if kind_of(results["cells"][one.models[0]][one.suite]) == kind]


def _said(values: Mapping[str, SeedStatistics | None], digits: int = 1) -> str:
    """Every arm's number in words: the text alternative of charts."""
    return ", ".join(f"{title} {stat.text(digits) if stat else tables.NOTHING}" for title, stat in values.items())


def gains_picture(results: Results) -> ReportFigure | None:
    """What every arm gains over the first on each suite, with its interval; None for a single one."""
    axes = metrics_of(results)
    first, *others = groups_of(results)
    judged = [(other, [axis for axis, _ in comparison.judged_axes(axes, other, first)]) for other in others]
    rows = [axis for axis in axes if any(axis in own for _, own in judged)]
    if not rows:
        return None
    series = [
        charts.Series(other.title, other.style, tuple(_gain(axis, other, first, rows.index(axis)) for axis in own))
        for other, own in judged
        if own
    ]
    names = [_short(axis) for axis in rows]
    who = series[0].label if len(series) == 1 else "each network"
    caption = (
        f"What {who} gains over {first.title} (zero), in points of the table below, shape bias in hundredths. "
        "Right of zero is better. Bars: 95 % intervals."
    )
    alt = f"Dot plot of the differences to {first.title} with their intervals; the table below holds the numbers."
    png = charts.dot_plot(names, series, f"gain over {first.title}", zero=True)
    return ReportFigure("gains.png", png, alt, caption)


def arms_picture(results: Results, axes: Mapping[str, Metric]) -> ReportFigure | None:
    """What many arms gain over the first, a row each, on clean and on corrupted pictures; None without intervals."""
    first, *others = groups_of(results)
    series: list[charts.Series] = []
    for title in ("clean", "corruption error"):
        points = [
            (other, _gain(axes[title], other, first, row))
            for row, other in enumerate(others)
            if title in axes and comparison.verdict(axes[title], other, first) is not None
        ]
        if points:
            label = "clean pictures" if title == "clean" else "corrupted pictures"
            series.append(charts.Series(label, len(series), tuple(point for _, point in points)))
    if not series:
        return None
    caption = (
        f"Points of accuracy that every arm gains over {first.title} (zero), of the same seed. Right of zero is "
        "better. Bars: 95 % intervals."
    )
    alt = f"Dot plot of the differences to {first.title} with their intervals; the tables below hold the numbers."
    names = [other.title for other in others]
    png = charts.dot_plot(names, series, f"points gained over {first.title}", zero=True)
    return ReportFigure("arms.png", png, alt, caption)


def _short(axis: Metric) -> str:
    """An axis's title where there is little room."""
    title = re.sub(r" \((?:%|0–1)\)$", "", axis.title)
    return title.replace("mean corruption error", "mean error").replace(" of the words", "")


def published_picture(results: Results) -> ReportFigure | None:
    """Every network among the published rows; None where none of them may stand there."""
    axes = [axis for axis in metrics_of(results) if axis.published in COLUMNS]
    columns = [key for key in COLUMNS if any(axis.published == key for axis in axes)]
    if not columns:
        return None
    series = [
        series_of(arm, [(columns.index(a.published), _value(a, arm)) for a in axes], flat=True)
        for arm in groups_of(results)
    ]
    others = tuple(
        (value, float(number), 0.0)
        for number, key in enumerate(columns)
        for row in published_rows()
        if not row.more_data and (value := row.number(key)) is not None
    )
    shown = [*(one for one in series if one.points), charts.Series("published", 6, others)]
    names = [re.sub(r" \(%\)(?= [↑↓])", "", COLUMNS[key]) for key in columns]
    return ReportFigure(
        "published.png",
        charts.dot_plot(names, shown, "% (mCE: in units of AlexNet's error)"),
        "Dot plot of the networks among the published rows; the table of published rows holds the numbers.",
        "The networks among published ones of ImageNet-1k alone; only whole official benchmarks have a row. ↑ more is "
        "better, ↓ less is.",
    )


def _gain(axis: Metric, new: Group, old: Group, row: int) -> charts.Point:
    """The difference in points, more is better; the longer half of its interval."""
    found = comparison.difference(axis, new, old)
    assert found is not None, "judged axes have one"
    assert found.ends is not None
    scale = 100 if axis.key.endswith("/bias") else 1
    low, high = found.ends
    return axis.better * scale * found.gap, float(row), scale * max(high - found.gap, found.gap - low)


def _value(axis: Metric, arm: Group) -> SeedStatistics | None:
    return arm.stat(lambda name: axis.numbers[name].value if name in axis.numbers else None)


def series_of(arm: Group, points: Iterable[tuple[float, SeedStatistics | None]], flat: bool = False) -> charts.Series:
    """(position, statistic) pairs as a line of means with error bars; `flat`: positions are rows, values go across."""
    known = [(at, stat) for at, stat in points if stat is not None]
    found = ((s.mean, float(at), s.spread) if flat else (float(at), s.mean, s.spread) for at, s in known)
    return charts.Series(arm.title, arm.style, tuple(found))


def overview(results: Results, variant: Variant, number: int) -> list[ReportFigure]:
    """Dots by category, and lines over severities: of all corruptions, and of each category."""
    arms = groups_of(results, variant.models)
    scores = {model: scores_of(results, model, variant.suite) for model in variant.models}
    rows = {model: {"mean of all": mean_of(own), **category_errors(own)} for model, own in scores.items()}
    kinds = [kind for kind in ("mean of all", *CATEGORIES) if any(kind in found for found in rows.values())]
    means = {arm.title: arm.stat(lambda name: rows[name].get("mean of all")) for arm in arms}
    said = f"Mean corruption error in percent: {_said(means)}."

    def kind_at(kind: str) -> Callable[[str], float | None]:
        return lambda name: rows[name].get(kind)

    dots = [series_of(arm, [(i, arm.stat(kind_at(kind))) for i, kind in enumerate(kinds)], flat=True) for arm in arms]
    panels = {"mean of the corruptions": [_over_severities(arm, scores, None) for arm in arms]}
    label = "severity (0 = clean)" if any(own["clean"]["total"] for own in scores.values()) else "severity"
    found = [
        ReportFigure(
            f"{number}-categories.png",
            charts.dot_plot(kinds, dots, "error (%)"),
            f"Dot plot of the error by kind of corruption. {said}",
            "Error by kind of corruption, each averaged over severities. Further left is better.",
        ),
        ReportFigure(
            f"{number}-severity.png",
            charts.severity_plot(panels, label),
            f"Line plot of the error against severity. {said}",
            "Error against severity, averaged over corruptions.",
        ),
    ]
    if len(kinds) > 2:
        panels = {kind: [_over_severities(arm, scores, kind) for arm in arms] for kind in kinds[1:]}
        alt = "Line plots of the error against severity by kind of corruption; the table below holds the numbers."
        png = charts.severity_plot(panels, label)
        found.append(ReportFigure(f"{number}-severity-kinds.png", png, alt, "The same by kind of corruption."))
    return found


def _over_severities(arm: Group, scores: Mapping[str, CorruptionCounts], kind: str | None) -> charts.Series:
    """Error against severity over all corruptions, or one kind; at 0 that of as many clean pictures."""
    own = {name: scores[name] for name in arm.members.values()}
    lines = {name: severity_errors(one, CATEGORIES[kind]) if kind else severity_means(one) for name, one in own.items()}
    clean = SeedStatistics.of(top1_error(one["clean"]) for one in own.values() if one["clean"]["total"])
    every = sorted({severity for line in lines.values() for severity in line})
    points = [(severity, SeedStatistics.of(line.get(severity) for line in lines.values())) for severity in every]
    return series_of(arm, [(0, clean), *points])


Grid = list[list[float | None]]


def heat_maps(results: Results, variant: Variant, number: int) -> list[ReportFigure]:
    """A map of each arm, the mean of its seeds, and of what each differs by from the first."""
    maps = {arm.title: grid_of(results, variant, arm) for arm in groups_of(results, variant.models)}
    names, breaks = rows_of(results, variant)
    first, *others = maps
    columns = [str(severity) for severity in SEVERITIES]
    found: list[ReportFigure] = []
    for title, values in maps.items():
        png = charts.heat_map(names, columns, values, breaks)
        alt = f"Heat map of the error of {title} by corruption and severity; report.csv holds the counts."
        caption = f"{title}: error in percent. Darker is worse."
        found.append(ReportFigure(f"{number}-heat-{len(found) + 1}.png", png, alt, caption))
    for at, title in enumerate(others, 2):
        png = charts.heat_map(names, columns, differences(maps[title], maps[first]), breaks, difference=True)
        what = f"{title} − {first}: difference of errors in points"
        caption = f"{what}. Green: {title} is better; brown: {first}."
        found.append(ReportFigure(f"{number}-difference-{at}.png", png, f"Heat map. {what}.", caption))
    return found


def rows_of(results: Results, variant: Variant) -> tuple[list[str], list[int]]:
    """The corruptions of a suite, and at which of them another kind begins."""
    names = tables.corruption_names({model: scores_of(results, model, variant.suite) for model in variant.models})
    kinds = kinds_of(names)
    return names, [i for i in range(1, len(names)) if kinds[names[i]] != kinds[names[i - 1]]]


def grid_of(results: Results, variant: Variant, arm: Group) -> Grid:
    """The error in percent by corruption and severity, mean of an arm's seeds."""
    names, _ = rows_of(results, variant)
    cells = [results["cells"][model][variant.suite] for model in arm.members.values()]

    def mean(name: str, severity: int) -> float | None:
        stat = SeedStatistics.of(top1_error(own[f"{name}/{severity}"]) for own in cells if f"{name}/{severity}" in own)
        return None if stat is None else stat.mean

    return [[mean(name, severity) for severity in SEVERITIES] for name in names]


def differences(new: Grid, old: Grid) -> Grid:
    """Cell by cell; None where either is."""
    rows = (zip(row, base, strict=True) for row, base in zip(new, old, strict=True))
    return [[None if one is None or other is None else one - other for one, other in row] for row in rows]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]


def shape_pictures(results: Results) -> list[ReportFigure]:
    """Shape bias, a picture a suite that tells it."""
    found = []
    for number, variant in enumerate(of_kind(results, "shape"), 1):
        cues = {model: results["cells"][model][variant.suite][""] for model in variant.models}
        series, notes, said = [], [], {}
        for arm in groups_of(results, variant.models):
            own = [cues[name] for name in arm.members.values()]
            bias, covered = (
                SeedStatistics.of(map(shape_bias, own)),
                SeedStatistics.of(100 * cue_coverage(one) for one in own),
            )
            if bias is not None and covered is not None:
                series.append(series_of(arm, [(0, bias)], flat=True))
                notes.append(f"coverage {covered.mean:.0f} %")
                said[arm.title] = bias
        if series:
            alt = f"Shape bias from 0 (texture) to 1 (shape): {_said(said, 2)}."
            caption = (
                f"{variant.title}: pictures whose shape and texture belong to different classes. Shape answers among "
                "shape and texture answers; coverage is the share of pictures answered with either."
            )
            found.append(ReportFigure(f"shape-bias-{number}.png", charts.shape_plot(series, notes), alt, caption))
    return found


def words_picture(results: Results) -> ReportFigure:
    """Accuracy against the share of changed words, a panel a kind of attack."""
    panels = {}
    for variant in of_kind(results, "words"):
        cells = {model: results["cells"][model][variant.suite] for model in variant.models}
        shares = sorted({share for own in cells.values() for share in own}, key=float)
        panels[variant.title] = [
            series_of(
                arm,
                [
                    (
                        100 * float(share),
                        SeedStatistics.of(top1_accuracy(cells[name][share]) for name in arm.members.values()),
                    )
                    for share in shares
                ],
            )
            for arm in groups_of(results, variant.models)
        ]
    last = ", ".join(f"{one.label}, {title} {one.points[-1][1]:.1f}" for title, own in panels.items() for one in own)
    return ReportFigure(
        "words.png",
        charts.severity_plot(panels, "visual words changed, up to (%)", "accuracy (%)"),
        f"Line plots of the accuracy against the share of changed words. At the largest, in percent: {last}.",
        "Accuracy when up to so many of a picture's visual words are changed. Higher is better.",
    )


def curve_pictures(training: TrainingFacts, arms: Sequence[Group]) -> list[ReportFigure]:
    """Pretraining's curves, then one chart a curve of the trainings, all arms and seeds in it."""
    first = {key: [charts.Series("pretraining", 6, _points(c, key))] for key, c in training["pretraining"].items()}
    runs, found = training["runs"], []
    keys = dict.fromkeys(key for run in runs.values() for key in run["curves"])
    every = [(arm, runs[name]["curves"]) for arm in arms for name in arm.members.values()]
    later = {
        key: [charts.Series(arm.title, arm.style, _points(c.get(key, []), key)) for arm, c in every] for key in keys
    }
    for stage, curves in (("Pretraining", first), ("Fine-tuning", later)):
        for key, lines in curves.items():
            if series := [one for one in lines if one.points]:
                title = f"{stage}: {CURVES.get(key, key)}"
                png = charts.curve_plot(series, CURVES.get(key, key))
                caption = title + ("." if len(series) == 1 else "; one line for each seed.")
                found.append(
                    ReportFigure(f"{_slug(f'{stage} {key}')}.png", png, f"Line plot over epochs. {title}.", caption)
                )
    return found


def _points(curve: TrainingCurve, key: str) -> tuple[charts.Point, ...]:
    scale = 100 if key == "changed_words" else 1
    return tuple((epoch, scale * value, 0.0) for epoch, value in curve if epoch is not None and value is not None)
