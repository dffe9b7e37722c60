"""Flags of `mae-dat report`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig


@dataclasses.dataclass(frozen=True)
class ReportConfig(CommandConfig):
    """Make the report of an evaluation again from its results.json, and print the main numbers.

    All numbers come from the stored counts; nothing is measured again. Writes report.html, report.md, report.tex and
    report.csv.
    """

    verb = "report"
    results: str = dataclasses.field(metadata={"positional": "OUT"})
    """Output folder of an evaluation, or its results.json."""
    output_dir: str | None = None
    """Folder for the report (default: the folder of results.json)."""
    require: str | None = None
    """YAML file of requirements, such as `accuracy: ">= 80"`; if one is not met, the exit code is 79. Writes
    requirements.xml (JUnit) and requirements.json."""
    undecided: Literal["fail", "pass"] = "fail"
    """What a requirement does whose bound lies inside of the 95 % interval."""
