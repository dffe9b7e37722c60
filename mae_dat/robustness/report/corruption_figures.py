"""The figures of a suite of corruptions: error by category, against severity, and as heat maps."""

from collections.abc import Mapping, Sequence
from typing import Any

from mae_dat.robustness.corruptions import CATEGORIES, SEVERITIES
from mae_dat.robustness.report import charts, interactive
from mae_dat.robustness.report.corruption_table import corruption_categories, corruption_names, section_starts
from mae_dat.robustness.report.figures import ReportFigure, estimate_fields, estimate_series, in_words
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.metrics import accuracy_values, clean_error_values, error_values
from mae_dat.robustness.report.paired import compare_pair
from mae_dat.robustness.report.value_intervals import Estimate, estimate_of
from mae_dat.robustness.scores.accuracy import SeedStatistics, averaged_corruptions, suite_mean_error, top1_error

MEAN_OF_ALL = "mean of all"
_BARS = "Bars: 95 % intervals."
Cells = dict[str, list[str]]
"""By corruption, the cells that a mean is over."""


def corruption_figures(measurement: Measurement, number: int) -> list[ReportFigure]:
    """Draw dots by category, and lines over severities: of all corruptions, and of each category."""
    groups = measurement.groups
    parts = _parts(measurement)
    estimates = {
        group: {part: estimate_of(error_values(measurement, group, cells)) for part, cells in parts.items()}
        for group in groups
    }
    names = list(parts)
    dots = [
        estimate_series(group, ((row, estimates[group][part]) for row, part in enumerate(names)), across=True)
        for group in groups
    ]
    rows = [
        {"name": part, "group": group.title, **estimate_fields(one)}
        for part in names
        for group in groups
        if (one := estimates[group][part]) is not None
    ]
    means = in_words({
        group.title: SeedStatistics.of(
            suite_mean_error(measurement.corruptions[model]) for model in group.members.values()
        )
        for group in groups
    })  # fmt: skip
    summary = f"Mean corruption error in percent: {means}."
    titles = [group.title for group in groups]
    categories = ReportFigure(
        name=f"{number}-categories.png",
        png=charts.dot_plot(names, dots, "error (%)"),
        spec=interactive.interval_dots(rows, titles, "error (%)"),
        alt=f"Dot plot of the error by kind of corruption. {summary}",
        caption=f"Error by kind of corruption, each averaged over severities. Further left is better. {_BARS}",
    )
    return [categories, *_severity_figures(measurement, parts, number, summary)]


def _severity_figures(
    measurement: Measurement, parts: Mapping[str, Cells], number: int, summary: str
) -> list[ReportFigure]:
    groups = measurement.groups
    lines = {
        part: [estimate_series(group, _errors_by_severity(measurement, group, cells)) for group in groups]
        for part, cells in parts.items()
    }
    singles = {
        name.replace("_", " "): {name: [f"{name}/{severity}" for severity in SEVERITIES]}
        for name in corruption_names(measurement.corruptions)
    }
    choices = {**parts, **singles}
    rows = [
        {"choice": choice, "group": group.title, "position": severity, **estimate_fields(estimate)}
        for choice, cells in choices.items()
        for group in groups
        for severity, estimate in _errors_by_severity(measurement, group, cells)
        if estimate is not None
    ]
    axes = (_severity_label(measurement), "error (%)")
    chosen = list(dict.fromkeys(row["choice"] for row in rows))
    figures = [
        ReportFigure(
            name=f"{number}-severity.png",
            png=charts.severity_plot({"mean of the corruptions": lines[MEAN_OF_ALL]}, *axes),
            spec=interactive.interval_lines(rows, [group.title for group in groups], axes, chosen),
            alt=f"Line plot of the error against severity. {summary}",
            caption=f"Error against severity, averaged over corruptions. {_BARS}",
        )
    ]
    by_category = {part: series for part, series in lines.items() if part != MEAN_OF_ALL}
    if len(by_category) > 1:
        figure = ReportFigure(
            name=f"{number}-severity-kinds.png",
            png=charts.severity_plot(by_category, *axes),
            alt="Line plots of the error against severity by kind of corruption; the table below holds the numbers.",
            caption="The same by kind of corruption.",
            replaced=True,
        )
        figures.append(figure)
    return figures


def _parts(measurement: Measurement) -> dict[str, Cells]:
    """Return the cells of the suite's mean and of the mean of each category that any model has."""
    counts = next(iter(measurement.corruptions.values()))
    measured = counts["corruptions"]
    parts = {MEAN_OF_ALL: averaged_corruptions(counts)}
    parts |= {category: [name for name in names if name in measured] for category, names in CATEGORIES.items()}
    return {
        part: {name: [f"{name}/{severity}" for severity in measured[name]] for name in names}
        for part, names in parts.items()
        if names
    }


def _errors_by_severity(
    measurement: Measurement, group: Group, cells: Mapping[str, Sequence[str]]
) -> list[tuple[float, Estimate | None]]:
    """Return the error at each severity; at 0 that on as many clean images."""
    points: list[tuple[float, Estimate | None]] = [(0, _clean_error(measurement, group))]
    for severity in SEVERITIES:
        at_severity = {name: [cell for cell in names if cell.endswith(f"/{severity}")] for name, names in cells.items()}
        measured = {name: names for name, names in at_severity.items() if names}
        points.append((severity, estimate_of(error_values(measurement, group, measured))))
    return points


def _clean_error(measurement: Measurement, group: Group) -> Estimate | None:
    return estimate_of(clean_error_values(measurement, group))


def _severity_label(measurement: Measurement) -> str:
    any_clean = any(counts["clean"]["total"] for counts in measurement.corruptions.values())
    return "severity (0 = clean)" if any_clean else "severity"


ErrorGrid = list[list[float | None]]
"""Error in percent by corruption and severity, None where it was not measured."""


def heat_map_figures(measurement: Measurement, number: int) -> list[ReportFigure]:
    """Draw a heat map of each group, the mean of its seeds, and of its differences to the first."""
    first, *others = measurement.groups
    grids = {group: error_grid(measurement, group) for group in measurement.groups}
    names, breaks = corruption_rows(measurement)
    severities = [str(severity) for severity in SEVERITIES]
    errors = _error_spec(measurement, names, grids)
    figures = []
    for position, group in enumerate(measurement.groups, 1):
        figure = ReportFigure(
            name=f"{number}-heat-{position}.png",
            png=charts.heat_map(names, severities, grids[group], breaks),
            alt=f"Heat map of the error of {group.title} by corruption and severity; report.csv holds the counts.",
            caption=f"{group.title}: error in percent. Darker is worse.",
            spec=errors if position == 1 else None,
            replaced=position > 1,
        )
        figures.append(figure)
    differences = {group: grid_difference(grids[group], grids[first]) for group in others}
    for position, group in enumerate(others, 2):
        what = f"{group.title} − {first.title}: difference of errors in points"
        figure = ReportFigure(
            name=f"{number}-difference-{position}.png",
            png=charts.heat_map(names, severities, differences[group], breaks, difference=True),
            alt=f"Heat map. {what}.",
            caption=f"{what}. Green: {group.title} is better; brown: {first.title}.",
            spec=_difference_spec(measurement, names, differences) if position == 2 else None,
            replaced=position > 2,
        )
        figures.append(figure)
    return figures


def _error_spec(measurement: Measurement, names: Sequence[str], grids: Mapping[Group, ErrorGrid]) -> interactive.Spec:
    def text(group: Group, cell: str) -> str:
        estimate = estimate_of(error_values(measurement, group, {"": [cell]}))
        return "" if estimate is None else f"{estimate_fields(estimate)['text']} %"

    rows = [
        {**row, "choice": group.title, "label": f"{row['value']:.1f}", "text": text(group, row["cell"])}
        for group, grid in grids.items()
        for row in _heat_rows(names, grid)
    ]
    return interactive.heat_cells(rows, [group.title for group in grids], ("corruption", "severity"))


def _difference_spec(
    measurement: Measurement, names: Sequence[str], differences: Mapping[Group, ErrorGrid]
) -> interactive.Spec:
    first = measurement.groups[0]
    titles = {group: f"{group.title} − {first.title}" for group in differences}
    rows = []
    for group, grid in differences.items():
        for row in _heat_rows(names, grid):
            text = f"{charts.signed(row['value'], 1)}{_difference_interval(measurement, group, row['cell'])} points"
            rows.append({**row, "choice": titles[group], "label": charts.signed(row["value"], 1), "text": text})
    largest = max([abs(row["value"]) for row in rows] + [1.0])
    return interactive.heat_cells(rows, list(titles.values()), ("corruption", "severity"), difference=largest)


def _difference_interval(measurement: Measurement, group: Group, cell: str) -> str:
    """Return the paired interval of the difference of errors of single runs as ' [−1.0, +2.0]'; empty if unknown."""
    first = measurement.groups[0]
    new, old = accuracy_values(measurement, group, cell), accuracy_values(measurement, first, cell)
    if len(new) != 1 or len(old) != 1 or new[0].scores is None or old[0].scores is None:
        return ""
    low, high = compare_pair(old[0].scores, new[0].scores).ends
    return f" [{charts.signed(low, 1)}, {charts.signed(high, 1)}]"


def _heat_rows(names: Sequence[str], grid: ErrorGrid) -> list[dict[str, Any]]:
    """Return the measured cells as rows of `interactive.heat_cells`, without what depends on the group."""
    alphabetical = sorted(names)
    rows = []
    for usual, (name, values) in enumerate(zip(names, grid, strict=True)):
        known = [value for value in values if value is not None]
        for severity, value in zip(SEVERITIES, values, strict=True):
            if value is not None:
                row = {
                    "name": name.replace("_", " "),
                    "column": str(severity),
                    "cell": f"{name}/{severity}",
                    "value": round(value, 3),
                    "mean": round(sum(known) / len(known), 4),
                    "usual": usual,
                    "alphabetical": alphabetical.index(name),
                }
                rows.append(row)
    return rows


def corruption_rows(measurement: Measurement) -> tuple[list[str], list[int]]:
    """Return the corruptions of a suite, and the positions where another category begins."""
    names = corruption_names(measurement.corruptions)
    return names, section_starts(list(corruption_categories(names).values()))


def error_grid(measurement: Measurement, group: Group) -> ErrorGrid:
    """Compute the error in percent by corruption and severity, the mean over a group's seeds."""
    names, _ = corruption_rows(measurement)
    counts = [measurement.counts[model] for model in group.members.values()]

    def mean(cell: str) -> float | None:
        statistics = SeedStatistics.of(top1_error(member[cell]) for member in counts if cell in member)
        return None if statistics is None else statistics.mean

    return [[mean(f"{name}/{severity}") for severity in SEVERITIES] for name in names]


def grid_difference(new: ErrorGrid, old: ErrorGrid) -> ErrorGrid:
    """Compute new - old for every cell; None where either is."""
    return [
        [None if value is None or base is None else value - base for value, base in zip(row, old_row, strict=True)]
        for row, old_row in zip(new, old, strict=True)
    ]
