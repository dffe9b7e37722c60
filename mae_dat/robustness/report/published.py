"""Published results to compare an evaluation with, each with its source, from `published.yaml`, and their tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mae_dat.robustness.report.comparison import value_text
from mae_dat.robustness.report.measurements import size_text
from mae_dat.robustness.report.metrics import Metric
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING, Table
from mae_dat.robustness.scores.results import ModelFacts

PUBLISHED_COLUMNS = {
    "imagenet": "ImageNet (%) ↑",
    "imagenet-v2": "V2 (%) ↑",
    "imagenet-a": "A (%) ↑",
    "imagenet-r": "R (%) ↑",
    "imagenet-sketch": "Sketch (%) ↑",
    "objnet-113": "ObjectNet (113 classes) (%) ↑",
    "imagenet-c/mce": "ImageNet-C, mCE ↓",
    "imagenet-c-5000/mce": "ImageNet-C, 5,000 images, mCE ↓",
    "autoattack-4/255-5000": "AutoAttack 4/255, 5,000 images (%) ↑",
}
NEAREST = 2  # of the published rows of a column, this many of the best and of the nearest to each model are not folded
UNSURE = "§"


@dataclass(frozen=True)
class PublishedRow:
    """A row as its source prints it."""

    model: str
    size: str
    """Input size in pixels; empty if the source does not give it."""
    source: str
    values: dict[str, str]
    """By key of `PUBLISHED_COLUMNS`, as text, because 83.6 is not 83.60. Ends with `UNSURE` if the protocol may
    differ."""
    more_data: bool
    """Whether the model, or its teacher, was trained on more than ImageNet-1k."""
    reference: bool
    """Whether every table shows it."""
    protocol: str
    """The `--protocol` that its figures belong to; empty if the source does not state it."""

    def number(self, key: str) -> float | None:
        """Return the value of a column; None if there is none, or its protocol may differ."""
        text = self.values.get(key, UNSURE)
        return None if text.endswith(UNSURE) else float(text)


def published_rows() -> list[PublishedRow]:
    """Load all published rows in the order of the file."""
    content = _load_file()
    return [
        PublishedRow(
            model=row["model"],
            size=row.get("px", ""),
            source=content["sources"][row["source"]],
            values=row["values"],
            more_data=row.get("data") == "more",
            reference=row.get("reference") == "true",
            protocol=content["protocols"].get(row["source"], ""),
        )
        for row in content["rows"]
    ]


def _load_file() -> dict[str, Any]:
    text = (Path(__file__).parent / "published.yaml").read_text()
    return dict(yaml.load(text, Loader=yaml.BaseLoader))  # BaseLoader keeps numbers as they are written


def published_columns(metrics: Sequence[Metric]) -> list[str]:
    """Return the columns of the published table that any of the metrics belongs to."""
    return [key for key in PUBLISHED_COLUMNS if any(metric.published == key for metric in metrics)]


def published_tables(report: ReportData) -> list[Table]:
    """Return published rows beside the groups' measurements of whole, official benchmarks; empty if there are none.

    Rows of another protocol than that of the evaluation are left out. References, the best rows and the nearest ones of
    its protocol are shown; the others, and rows whose source does not state a protocol, are folded.
    """
    metrics = [metric for metric in report.metrics if metric.published in PUBLISHED_COLUMNS]
    columns = published_columns(metrics)
    if not columns:
        return []
    candidates = comparable_rows(report, columns)
    near = _near_rows([row for row in candidates if row.protocol], columns, metrics)
    first = sorted((row for row in candidates if row in near), key=lambda row: row.more_data)
    folded = sorted((row for row in candidates if row not in near), key=lambda row: row.more_data)
    measured = _rows_of_groups(report, columns, metrics)
    head = ("", "px", *(PUBLISHED_COLUMNS[key] for key in columns), "source")
    table = Table(
        key="published",
        title="Beside published rows",
        head=head,
        rows=(*measured, *_rows_as_text(first, columns)),
        notes=_notes(first, columns),
        breaks=frozenset({len(measured)}),
    )
    if not folded:
        return [table]
    more = Table(
        key="published-more",
        title=f"{len(folded)} further published rows",
        head=head,
        rows=tuple(_rows_as_text(folded, columns)),
        notes=(
            "¶ the source does not state its protocol, so that the figure may not be comparable.",
            *_notes(folded, columns),
        ),
        folded=True,
    )
    return [table, more]


def comparable_rows(report: ReportData, columns: Sequence[str]) -> list[PublishedRow]:
    """Return the published rows of these columns, without those of another protocol than that of the models."""
    protocols = {facts.get("protocol", "native") for facts in report.models.values()} | {""}
    return [row for row in published_rows() if row.protocol in protocols and any(key in row.values for key in columns)]


def _rows_of_groups(report: ReportData, columns: Sequence[str], metrics: Sequence[Metric]) -> list[tuple[str, ...]]:
    rows = []
    for group in report.groups:
        model = next(iter(group.members.values()))
        by_column = {metric.published: metric for metric in metrics if model in metric.values}
        if by_column:
            values = (value_text(by_column[key], group) if key in by_column else NOTHING for key in columns)
            rows.append(
                (group.title, size_text(report.models[model]["size"]), *values, _own_source(report.models[model]))
            )
    return rows


def _own_source(facts: ModelFacts) -> str:
    return f"this report, protocol {facts.get('protocol', 'native')}"


def _near_rows(rows: Sequence[PublishedRow], columns: Sequence[str], metrics: Sequence[Metric]) -> list[PublishedRow]:
    """Return the references, the best rows of each column, and those nearest to each model."""
    near = [row for row in rows if row.reference]
    for key in columns:
        candidates = [(number, row) for row in rows if not row.more_data and (number := row.number(key)) is not None]
        best = 0.0 if PUBLISHED_COLUMNS[key].endswith("↓") else 100.0
        measured = [value.value for metric in metrics if metric.published == key for value in metric.values.values()]
        for target in (best, *measured):
            by_distance = sorted(candidates, key=lambda candidate: abs(candidate[0] - target))
            near += [row for _, row in by_distance[:NEAREST]]
    return near


def _source_numbers(rows: Sequence[PublishedRow]) -> dict[str, int]:
    """Return the number of each source, in the order of the rows."""
    return {source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows), 1)}


def _rows_as_text(rows: Sequence[PublishedRow], columns: Sequence[str]) -> list[tuple[str, ...]]:
    numbers = _source_numbers(rows)
    texts = []
    for row in rows:
        source = f"[{numbers[row.source]}]" + ("" if row.protocol else " ¶") + (", more data" if row.more_data else "")
        texts.append((row.model, row.size or NOTHING, *(row.values.get(key, NOTHING) for key in columns), source))
    return texts


def _notes(rows: Sequence[PublishedRow], columns: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "Published rows are of models trained on ImageNet-1k alone, but where they say more data; as printed, none "
        "measured by us."
    ]
    if any(text.endswith(UNSURE) for row in _rows_as_text(rows, columns) for text in row):
        notes.append(str(_load_file()["unsure"]))
    notes.append(" ".join(f"[{number}] {source}." for source, number in _source_numbers(rows).items()))
    return tuple(notes)
