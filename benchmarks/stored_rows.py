"""Store the latest numbers in docs/performance/cpu.json and cuda.json, and a table of each in the page about them.

A run of some cases replaces their rows and leaves the others, as long as machine and versions are the same; each row
records the run it comes from.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.table import as_json, markdown
from benchmarks.timing import Case, Row

DOCS = Path(__file__).parents[1] / "docs"
DOCUMENT, NUMBERS = DOCS / "explanation" / "performance.md", DOCS / "performance"
ENVIRONMENT = ("machine", "versions", "precision")
OF_RUN = ("matrix_rates", "load")
Key = tuple[str, str, int]


def row_key(row: Row | Case) -> Key:
    """Return what identifies a measurement."""
    return row.name, row.against, row.batch


def store_rows(
    facts: dict[str, Any], rows: list[Row], cases: list[Case], document: Path = DOCUMENT, numbers: Path = NUMBERS
) -> Path:
    """Store a run's rows in `numbers`, in the file of its kind of device; update the document's table; return the file.

    `cases` are all existing cases: they define the order of the rows, and rows of others are removed.
    """
    path = numbers / f"{facts['device'].partition(':')[0]}.json"
    numbers.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    stored = merge_rows(earlier, facts, rows, [row_key(case) for case in cases])
    path.write_text(json.dumps(stored, indent=1) + "\n")
    document.write_text(replace_table(document.read_text(), path.stem, stored))
    return path


def merge_rows(stored: dict[str, Any], facts: dict[str, Any], rows: list[Row], order: list[Key]) -> dict[str, Any]:
    """Merge the rows of a new run into the stored ones; rows of another machine or of other versions are removed."""
    same = all(stored.get(name) == facts[name] for name in ENVIRONMENT)
    old = {row_key(row_from_json(row)): row for row in stored["rows"]} if same else {}
    merged = {**old, **{row_key(row): {**as_json(row), "run": facts["time"]} for row in rows}}
    ordered = [merged[key] for key in dict.fromkeys(order) if key in merged]
    runs = {**(stored["runs"] if same else {}), facts["time"]: {name: facts[name] for name in OF_RUN}}
    used = {row["run"] for row in ordered}
    return {
        **{name: facts[name] for name in ENVIRONMENT},
        "runs": {time: run for time, run in runs.items() if time in used},
        "rows": ordered,
    }


def row_from_json(values: dict[str, Any]) -> Row:
    """Return a row from its JSON."""
    return Row(**{name: value for name, value in values.items() if name not in ("met", "run")})


def replace_table(text: str, device: str, stored: dict[str, Any]) -> str:
    """Replace the table between its marks in the document. Raises ValueError where the marks are missing."""
    begin, end = f"<!-- table: {device} -->", f"<!-- end of table: {device} -->"
    before, begin_mark, rest = text.partition(begin)
    _, end_mark, after = rest.partition(end)
    if not (begin_mark and end_mark):
        raise ValueError(f"no place for a table between {begin} and {end}")
    lines = [", ".join(f"{name} {value}" for name, value in stored[part].items()) for part in ("machine", "versions")]
    counts = Counter(row["run"] for row in stored["rows"] if row["rounds"])
    for time, run in stored["runs"].items():
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in run["matrix_rates"].items())
        busy = "not recorded" if run["load"] is None else f"{run['load']:.1f}"
        run_of = f"run of {time}: {counts[time]} rows; matrix rates {rates} TFLOP/s"
        lines.append(f"{run_of}; processors busy with other programs at its start: {busy}")
    table = markdown([row_from_json(row) for row in stored["rows"]])
    return "\n\n".join([before + begin, "  \n".join([*lines, f"ours in {stored['precision']}"]), table, end + after])
