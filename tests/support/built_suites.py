"""Suites built as an evaluation builds them."""

from pathlib import Path
from typing import Any

from mae_dat.robustness.suites.base import NetworkInput, Suite, SuiteSettings
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.robustness.suites.specs import build_suite


def open_sources(root: Path, outputs: int = 10, **settings: Any) -> SuiteSources:
    """Return the image sets below `root`, for networks with so many outputs."""
    return SuiteSources(SuiteSettings(root, **{"rescore": 0, **settings}), outputs)


def suite_from(sources: SuiteSources, name: str, side: int = 32) -> Suite:
    """Return a suite for square inputs of `side` pixels."""
    return build_suite(name, sources, NetworkInput((side, side)))
