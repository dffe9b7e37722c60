"""A report's tables as Markdown and LaTeX, its counts as CSV, and its page from a template."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mae_dat.robustness.report.tables import Table
from mae_dat.robustness.scores.results import Results

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
COUNTS = (
    "model", "title", "weights_sha256", "height", "width", "interpolation", "precision", "averaged", "suite", "cell",
    "corruption", "severity", "correct", "total", "top5", "shape", "texture", "official", "partial", "left_out",
    "subset", "fingerprint",
)  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(text.split())


def markdown_text(text: str) -> str:
    """Plain text for Markdown: nothing in it is markup or HTML."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return _one_line(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def markdown_table(table: Table, level: int = 2) -> str:
    """The table with its title, a heading of this level, and its notes."""
    rule = ["---"] * table.words + ["--:"] * (len(table.head) - table.words)
    rows = [
        [f"**{markdown_text(cell)}**" if (i, j) in table.best else markdown_text(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    grid = [f"| {' | '.join(line)} |" for line in (map(markdown_text, table.head), *rows)]
    grid.insert(1, f"|{'|'.join(rule)}|")
    parts = [f"{'#' * level} {markdown_text(table.title)}", "\n".join(grid), *map(markdown_text, table.notes)]
    return "\n\n".join(parts)


def markdown(results: Results, said: Sequence[str], tables: Sequence[Table], lacking: Sequence[str]) -> str:
    """The whole report without its pictures. The command may hold anything, so that it is indented, not fenced."""
    return (
        "\n\n".join(
            [
                f"# {markdown_text(results['title'])}",
                markdown_text(" ".join(said)),
                *map(markdown_table, tables),
                "## What was not measured\n\n" + "\n".join(f"* {markdown_text(one)}" for one in lacking),
                f"Made {markdown_text(results['created'])} by",
                f"    {_one_line(results['command'])}",
            ]
        )
        + "\n"
    )


def latex_text(text: str) -> str:
    """Plain text for LaTeX."""
    return _one_line("".join(_LATEX.get(sign, sign) for sign in text))


def latex_table(table: Table) -> str:
    """A `table` with booktabs rules, shrunk where it is wider than the text."""
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


def latex(results: Results, tables: Sequence[Table]) -> str:
    """The tables for a document that says \\usepackage{booktabs,graphicx}."""
    head = [
        f"% {_one_line(results['title'])}",
        f"% {_one_line(results['command'])}",
        r"% needs \usepackage{booktabs,graphicx}",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(map(latex_table, tables)) + "\n"


def counts_csv(results: Results) -> str:
    """One row a network and cell, with all that tells it from another of the same name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COUNTS, restval="", lineterminator="\n")
    writer.writeheader()
    for model, suites in results["cells"].items():
        facts = results["models"][model]
        for suite, cells in suites.items():
            own = results["suites"][model][suite]
            for cell, count in cells.items():
                corruption, severity = cell.split("/") if "/" in cell else ("", "")
                writer.writerow(
                    {
                        **{"model": model, "title": facts["title"], "weights_sha256": facts["sha256"] or ""},
                        **{"height": facts["size"][0], "width": facts["size"][1]},
                        **{key: facts[key] for key in ("interpolation", "precision")},
                        "averaged": "" if facts["averaged"] is None else facts["averaged"],
                        **{"suite": suite, "cell": cell, "corruption": corruption, "severity": severity},
                        **count,
                        **{"official": own["official"], "partial": bool(own["missing"]), "left_out": own["left_out"]},
                        **{"subset": own["protocol"].get("subset", ""), "fingerprint": own["fingerprint"]},
                    }
                )
    return text.getvalue()


def html_page(template: str, **values: Any) -> str:
    """A template of this package filled in; what a value holds of HTML is shown as text."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([folder / "templates" for folder in (here, here.parents[1] / "analysis")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
