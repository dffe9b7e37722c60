"""The latest numbers, kept beside their document: docs/performance/cpu.json and cuda.json, and a table of each.

A run of some cases replaces their rows and leaves the others, as long as machine and versions are the same; each row
knows the run that it is of.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.table import as_json, markdown
from benchmarks.timing import Case, Row

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
SURROUNDINGS = ("machine", "versions", "precision")
OF_RUN = ("matrix_rates", "load")
Key = tuple[str, str, int]


def key_of(row: Row | Case) -> Key:
    """What makes two rows the same measurement."""
    return row.name, row.against, row.batch


def keep(facts: dict[str, Any], rows: list[Row], cases: list[Case], document: Path = DOCUMENT) -> Path:
    """Puts a run's rows into the file of its kind of device and renews the document's table; returns the file.

    `cases` are all that there are: the rows' order, and what is forgotten when a case is gone.
    """
    path = document.with_suffix("") / f"{facts['device'].partition(':')[0]}.json"
    path.parent.mkdir(exist_ok=True)
    kept = merged(json.loads(path.read_text()) if path.exists() else {}, facts, rows, [key_of(case) for case in cases])
    path.write_text(json.dumps(kept, indent=1) + "\n")
    document.write_text(renewed(document.read_text(), path.stem, kept))
    return path


def merged(kept: dict[str, Any], facts: dict[str, Any], rows: list[Row], order: list[Key]) -> dict[str, Any]:
    """What was kept, with the rows of a new run; nothing of another machine or other versions stays."""
    same = all(kept.get(name) == facts[name] for name in SURROUNDINGS)
    old = {key_of(row_of(row)): row for row in kept["rows"]} if same else {}
    found = {**old, **{key_of(row): {**as_json(row), "run": facts["time"]} for row in rows}}
    ordered = [found[key] for key in dict.fromkeys(order) if key in found]
    runs = {**(kept["runs"] if same else {}), facts["time"]: {name: facts[name] for name in OF_RUN}}
    used = {row["run"] for row in ordered}
    return {
        **{name: facts[name] for name in SURROUNDINGS},
        "runs": {time: run for time, run in runs.items() if time in used},
        "rows": ordered,
    }


def row_of(told: dict[str, Any]) -> Row:
    """A row from its JSON."""
    return Row(**{name: value for name, value in told.items() if name not in ("met", "run")})


def renewed(text: str, device: str, kept: dict[str, Any]) -> str:
    """The document with a new table between its marks. ValueError if it has none for this kind of device."""
    begin, end = f"<!-- table: {device} -->", f"<!-- end of table: {device} -->"
    before, found, rest = text.partition(begin)
    _, ends, after = rest.partition(end)
    if not (found and ends):
        raise ValueError(f"no place for a table between {begin} and {end}")
    lines = [", ".join(f"{name} {value}" for name, value in kept[part].items()) for part in ("machine", "versions")]
    counts = Counter(row["run"] for row in kept["rows"] if row["rounds"])
    for time, run in kept["runs"].items():
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in run["matrix_rates"].items())
        busy = "not recorded" if run["load"] is None else f"{run['load']:.1f}"
        run_of = f"run of {time}: {counts[time]} rows; matrix rates {rates} TFLOP/s"
        lines.append(f"{run_of}; processors busy with other programs at its start: {busy}")
    table = markdown([row_of(row) for row in kept["rows"]])
    return "\n\n".join([before + begin, "  \n".join([*lines, f"ours in {kept['precision']}"]), table, end + after])
