"""Flags of `mae-dat report`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ReportConfig(CommandConfig):
    """Make the report of an evaluation again from its results.json, or compare two evaluations image by image.

    All numbers come from the stored counts and predictions; nothing is measured again. Writes report.html, report.md,
    report.tex and report.csv, and prints the main numbers. With --compare, it also writes changes.csv: every image that
    only one of the two models predicts correctly.
    """

    verb = "report"
    results: str | None = dataclasses.field(default=None, metadata={"positional": "OUT"})
    """Output folder of an evaluation, or its results.json."""
    compare: tuple[str, ...] = ()
    """Compare two evaluations A and B, folders or results.json: images won and lost by B. Images, protocol and versions
    must be equal."""
    names: tuple[str, ...] = ()
    """With --compare: the model of A and the model of B, by the names in results.json (default: the only ones)."""
    output_dir: str | None = None
    """Folder for the report (default: the folder of results.json; with --compare, output/comparison)."""
    require: str | None = None
    """YAML file of requirements, such as `accuracy: ">= 80"`; if one is not met, the exit code is 79. Writes
    requirements.xml (JUnit) and requirements.json."""
    undecided: Literal["fail", "pass"] = "fail"
    """What a requirement does whose bound lies inside of the 95 % interval."""

    def __post_init__(self) -> None:
        if (self.results is None) == (not self.compare):
            raise ConfigError("give one evaluation (mae-dat report OUT), or two with --compare A B.")
        if self.names and not self.compare:
            raise ConfigError("--names chooses the models of --compare A B.")
        if self.require and self.compare:
            raise ConfigError("--require checks one evaluation, without --compare.")
