"""The headline of an evaluation as text for a console."""

from collections.abc import Sequence

from mae_dat.config.protocols import protocol_text
from mae_dat.robustness.report.comparison import headline_table
from mae_dat.robustness.report.findings import collapse_warnings
from mae_dat.robustness.report.gate_values import interval_of
from mae_dat.robustness.report.shift_table import shift_table
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import Table, precision_text


def headline_text(report: ReportData) -> str:
    """Return the headline numbers in aligned columns, with a first line if they are not of whole benchmarks."""
    protocols = dict.fromkeys(facts.get("protocol", "native") for facts in report.models.values())
    lines = [f"Protocol {protocol_text(name)}." for name in protocols if name != "native"]
    lines += collapse_warnings(report)
    if report.image_subset and report.subset_of_all:
        lines.append(f"Not the whole benchmarks: {report.image_subset} of every suite.")
    table = headline_table(report)
    lines += _aligned([table.head, *table.rows])
    lines += _interval_lines(report)
    if shifts := shift_table(report):
        lines += ["", f"{shifts.title}:", *_aligned([shifts.head, *shifts.rows], shifts.words)]
    for model, title in report.model_titles.items():
        if model in report.agreement:
            lines.append(f"{title}: {precision_text(report.models[model], report.agreement[model])}")
    return "\n".join(lines)


def _interval_lines(report: ReportData) -> list[str]:
    """Return the intervals of the numbers of each single model where only some of the images were measured."""
    lines = []
    for group in report.groups if report.image_subset else ():
        if len(group.members) > 1 or report.groups_are_rows:
            continue
        (model,) = group.members.values()
        values = {metric: metric.values[model] for metric in report.metrics if model in metric.values}
        ends = {metric: interval for metric, value in values.items() if (interval := interval_of(value))}
        parts = [
            f"{metric.key} {low:.{metric.digits}f} to {high:.{metric.digits}f}" for metric, (low, high) in ends.items()
        ]
        lines += [f"{group.title}, 95 % intervals over images: {', '.join(parts)}"] if parts else []
    return lines


def _aligned(rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Return rows as lines whose columns are aligned: the first `words` to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def aligned_text(table: Table) -> str:
    """Return the head and rows of a table in aligned columns."""
    return "\n".join(_aligned([table.head, *table.rows], table.words))
