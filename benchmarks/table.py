"""Format rows of the benchmark as a table on the console and in Markdown, and as JSON."""

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Row

COLUMNS = ("what", "batch", "ours", "baseline", "ratio", "goal", "", "of rate", "waits", "GB", "GB base")
MARKS = {True: "met", False: "MISSED", None: ""}
LEGEND = (
    "ours and baseline: images/s where no unit is given, medians of rounds taken in turns. ratio: times as fast as the "
    "baseline (/: times as long as it takes), with the middle half of the rounds. goal: row of the table of goals, and "
    "what it asks for. of rate: FLOP/s as a share of the matrix rate. waits: share of the time without data. GB: peak "
    "memory."
)


def row_texts(row: Row) -> list[str]:
    """Return a row as text, in the order of COLUMNS."""
    what = f"{row.name} / {row.against}" if row.is_cost else f"{row.name}, against {row.against}"
    start = [what if row.against else row.name, str(row.batch)]
    if row.rounds == 0:
        return [*start, "", "", "", goal_of(row), row.note, *[""] * 4]
    speeds = [speed(row.ours, row.unit), speed(row.baseline, row.unit)]
    parts = [share(row.share), share(row.waiting), size(row.memory), size(row.memory_baseline)]
    return [*start, *speeds, ratio_of(row), goal_of(row), MARKS[row.met], *parts]


def ratio_of(row: Row) -> str:
    """Format the ratio and its spread."""
    if row.ratio is None or row.spread is None:
        return ""
    numbers = [speed(value, "images/s") for value in (row.ratio, *row.spread)]
    return f"{'/' if row.is_cost else ''}{numbers[0]} ({numbers[1]} to {numbers[2]})"


def goal_of(row: Row) -> str:
    """Format the goals, with their row of the table of goals."""
    parts = [f">= {row.at_least:g}x"] if row.at_least else []
    parts += [f"<= {row.at_most:g}x"] if row.at_most else []
    parts += [f"{row.share_at_least:.0%} of rate"] if row.share_at_least else []
    parts += [f"waits <= {row.waiting_at_most:.0%}"] if row.waiting_at_most else []
    return (f"{row.goal}: " if row.goal and parts else "") + ", ".join(parts)


def speed(value: float | None, unit: str) -> str:
    """Format three digits, and the unit where it is not images per second."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}" + ("" if unit == "images/s" else f" {unit}")


def share(value: float | None) -> str:
    """Format a share in percent."""
    return "" if value is None else f"{value:.1%}"


def size(value: float | None) -> str:
    """Format gigabytes."""
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def print_rows(rows: list[Row], console: Console) -> None:
    """Print the table, and below it the cases that were not run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number in (0, 6) else "right", no_wrap=number > 0)
    for row in (row for row in rows if row.rounds):
        style = {True: "green", False: "bold red", None: ""}[row.met]
        texts = row_texts(row)
        texts[0] = (
            f"{row.name}\n[dim]{'over' if row.is_cost else 'against'} {row.against}[/]" if row.against else row.name
        )
        table.add_row(*texts[:6], f"[{style}]{texts[6]}[/]" if style else texts[6], *texts[7:])
    if table.row_count:
        console.print(table)
    notes: dict[str, list[str]] = {}
    for row in (row for row in rows if not row.rounds):
        notes.setdefault(row.note, []).append(row.name)
    for note, names in notes.items():
        console.print(f"{note}: {', '.join(dict.fromkeys(names))}", highlight=False)
    console.print(LEGEND, highlight=False)


def markdown(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *map(row_texts, rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", LEGEND])


def as_json(row: Row) -> dict[str, Any]:
    """Return a row's numbers and whether its goals are met; nan becomes null."""
    facts = {**dataclasses.asdict(row), "met": row.met}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in facts.items()}
