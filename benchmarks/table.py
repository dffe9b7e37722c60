"""Rows of the benchmark as a table on the console and in Markdown, and as JSON."""

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Row

COLUMNS = (
    "what",
    "batch",
    "ours",
    "baseline",
    "ratio (middle half)",
    "goal",
    "",
    "of matrix rate",
    "GB",
    "GB baseline",
)


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    what = f"{row.name}, against {row.against}" if row.against else row.name
    if row.rounds == 0:
        return [what, str(row.batch), *[""] * 3, goal_of(row), f"not run: {row.note}", "", "", ""]
    ratio = (
        "" if row.ratio is None or row.spread is None else f"{row.ratio:.2f} ({row.spread[0]:.2f}-{row.spread[1]:.2f})"
    )
    mark = {True: "met", False: "MISSED", None: ""}[row.met]
    share = "" if row.share is None else f"{row.share:.0%}"
    speeds = [speed(row.ours, row.unit), speed(row.baseline, row.unit)]
    return [
        what,
        str(row.batch),
        *speeds,
        ratio,
        goal_of(row),
        mark,
        share,
        size(row.memory),
        size(row.memory_baseline),
    ]


def goal_of(row: Row) -> str:
    """The goals as text, with their row of the table of goals."""
    parts = [f">= {row.at_least:g}x"] if row.at_least else []
    parts += [f"<= {row.at_most:g}x"] if row.at_most else []
    parts += [f">= {row.share_at_least:.0%}"] if row.share_at_least else []
    return (f"{row.goal}: " if row.goal and parts else "") + ", ".join(parts)


def speed(value: float | None, unit: str) -> str:
    """Three digits, and the unit where it is not images a second."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}" + ("" if unit == "images/s" else f" {unit}")


def size(value: float | None) -> str:
    """Gigabytes."""
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def print_rows(rows: list[Row], console: Console) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number in (0, 6) else "right", no_wrap=number > 0)
    for row in rows:
        style = {True: "green", False: "bold red", None: ""}[row.met]
        texts = cells(row)
        table.add_row(*texts[:6], f"[{style}]{texts[6]}[/]" if style else texts[6], *texts[7:])
    console.print(table)
    console.print(
        "ours and baseline in images/s where no unit is given; medians of rounds taken in turns", highlight=False
    )


def markdown(rows: list[Row]) -> str:
    """The same as Markdown."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(row: Row) -> dict[str, Any]:
    """A row's numbers and whether its goals are met; what is not a number becomes null."""
    facts = {**dataclasses.asdict(row), "met": row.met}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in facts.items()}
