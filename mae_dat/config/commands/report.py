"""Flags of `mae-dat report`."""

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Make the report of an evaluation again from its results.json, and print the main numbers.

    Everything is computed from the stored counts; nothing is measured. Writes report.html, report.md, report.tex and
    report.csv.
    """

    results: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Output folder of an evaluation, or its results.json."""
    output_dir: str | None = None
    """Folder for the report (default: the folder of results.json)."""
