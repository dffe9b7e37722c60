"""Rendering of a report: tables as Markdown and LaTeX, counts as CSV, and the page from a template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mae_dat.config.terminal import printable
from mae_dat.robustness.report.summarize import CellCounts, ReportData
from mae_dat.robustness.report.tables import Table
from mae_dat.storage.csv_files import csv_lines, safe_cell

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line's end it would be read as an option
    "]": "{]}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
}
_FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
CSV_COLUMNS = (
    "model", "title", "weights_sha256", "height", "width", "interpolation", "precision", "averaged", "suite", "cell",
    "corruption", "severity", "correct", "total", "top5", "shape", "texture", "official", "partial", "left_out",
    "subset", "fingerprint",
)  # fmt: skip


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def markdown_text(text: str) -> str:
    """Escape plain text for Markdown, so that nothing in it is markup or HTML."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return _one_line(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_table(table: Table, level: int = 2) -> str:
    """Return a table with its title as a heading of this level, and its notes."""
    rule = ["---"] * table.words + ["--:"] * (len(table.head) - table.words)
    rows = [
        [f"**{markdown_text(cell)}**" if (i, j) in table.best else markdown_text(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    grid = [f"| {' | '.join(line)} |" for line in (map(markdown_text, table.head), *rows)]
    grid.insert(1, f"|{'|'.join(rule)}|")
    parts = [f"{'#' * level} {markdown_text(table.title)}", "\n".join(grid), *map(markdown_text, table.notes)]
    return "\n\n".join(parts)


def markdown(report: ReportData, tables: Sequence[Table], findings: Sequence[str], not_measured: Sequence[str]) -> str:
    """Return the whole report without its figures. The command is indented, not fenced: it may hold any characters."""
    parts = [
        f"# {markdown_text(report.title)}",
        markdown_text(" ".join(findings)),
        *map(markdown_table, tables),
        "## What was not measured\n\n" + "\n".join(f"* {markdown_text(remark)}" for remark in not_measured),
        f"Made {markdown_text(report.created)} by",
        f"    {_one_line(report.command)}",
    ]
    return "\n\n".join(parts) + "\n"


def latex_text(text: str) -> str:
    """Escape plain text for LaTeX."""
    return _one_line("".join(_LATEX.get(sign, sign) for sign in text))


def latex_table(table: Table) -> str:
    """Return a `table` with booktabs rules, shrunk if it is wider than the text."""
    columns = "l" * table.words + "r" * (len(table.head) - table.words)
    lines = [r"\begin{table}", r"\centering", r"\small"]
    title = table.title if table.title.endswith(("?", ".")) else f"{table.title}."
    lines += [f"\\caption{{{latex_text(' '.join([title, *table.notes]))}}}"]
    lines += [f"\\label{{tab:{table.key}}}", _FIT, f"\\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(latex_text, table.head)) + r" \\", r"\midrule"]
    for number, row in enumerate(table.rows):
        lines += [r"\midrule"] if number in table.breaks else []
        cells = [latex_text(cell) for cell in row]
        cells = [f"\\textbf{{{cell}}}" if (number, i) in table.best else cell for i, cell in enumerate(cells)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"])


def latex(report: ReportData, tables: Sequence[Table]) -> str:
    """Return the tables for a document that says \\usepackage{booktabs,graphicx}."""
    head = [
        f"% {_one_line(report.title)}",
        f"% {_one_line(report.command)}",
        r"% needs \usepackage{booktabs,graphicx}",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(map(latex_table, tables)) + "\n"


def counts_csv(report: ReportData) -> str:
    """Return the counts with a row for each model and cell, and all facts that they depend on."""
    rows = [_csv_row(cell) for cell in report.cells]
    cells = [[safe_cell(row.get(column)) for column in CSV_COLUMNS] for row in rows]
    return csv_lines([CSV_COLUMNS, *cells]).decode()


def _csv_row(cell: CellCounts) -> dict[str, Any]:
    model, suite = cell.model_facts, cell.suite_facts
    corruption, severity = cell.cell.split("/") if "/" in cell.cell else ("", "")
    return {
        "model": cell.model,
        "title": model["title"],
        "weights_sha256": model["sha256"] or "",
        "height": model["size"][0],
        "width": model["size"][1],
        "interpolation": model["interpolation"],
        "precision": model["precision"],
        "averaged": "" if model["averaged"] is None else str(model["averaged"]),
        "suite": cell.suite,
        "cell": cell.cell,
        "corruption": corruption,
        "severity": severity,
        **cell.count,
        "official": str(suite["official"]),
        "partial": str(bool(suite["missing"])),
        "left_out": suite["left_out"],
        "subset": suite["protocol"].get("subset", ""),
        "fingerprint": suite["fingerprint"],
    }


def html_page(template: Path, **values: Any) -> str:
    """Fill in a template, which may use the macros of templates/page.html.j2. HTML in a value is shown as text."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
