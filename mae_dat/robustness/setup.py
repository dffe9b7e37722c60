"""Where and how an evaluation runs."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mae_dat.config.commands.evaluate import SuiteConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DATA_VARIABLE
from mae_dat.data.class_names import read_class_names
from mae_dat.data.open import image_root
from mae_dat.robustness.cache import MeasurementCache
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.robustness.suites.shifts import Shift, parse_shifts
from mae_dat.robustness.suites.specs import SUITES
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import InputSummary
from mae_dat.runtime.world import World


@dataclasses.dataclass(frozen=True)
class EvaluationSetup:
    """Where and how an evaluation runs; nothing here changes a count."""

    options: EvalOptions
    folder: Path | None
    """Where results, report and the cache are written; None to write nothing."""
    console: Console
    world: World = World()  # noqa: RUF009 - immutable
    batch_size: int = 64
    num_workers: int = 0
    command: str = "evaluate"
    """The verb, for the summary of the inputs."""
    inputs: InputSummary | None = None
    """The summary that was reported already, for a whole comparison; None for one of this evaluation."""
    call: str | None = None
    """What was called, for the report (default: this process's command line)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigError(
                f"--batch_size {self.batch_size} --num_workers {self.num_workers}: give at least 1 image, and 0 or "
                "more workers."
            )

    @functools.cached_property
    def cache(self) -> MeasurementCache:
        """The measurements of earlier calls."""
        return MeasurementCache(self.folder / "cells" if self.folder else None)


def suite_settings(
    config: SuiteConfig, device: torch.device, batch_size: int, shifts: Sequence[Shift] = ()
) -> SuiteSettings:
    """Return the settings of the suites that the flags describe, with further `shifts` from Python.

    Without --data_path, a shift's folder takes the place of the folder of images. Raises ConfigError,
    MissingInputError.
    """
    if config.shifts and not (config.data_path or os.environ.get(DATA_VARIABLE)):
        first = parse_shifts(config.shifts, tuple(SUITES))[0].source
        assert isinstance(first, Path)
        root = first if first.is_dir() else first.parent
    else:
        root = image_root(config.data_path)
    return SuiteSettings(
        root=root,
        partial=config.partial,
        restrict_classes=config.restrict_classes,
        classes=tuple(read_class_names(config.classes)) if config.classes else None,
        class_order=config.class_order,
        subset=Path(config.subset) if config.subset else None,
        limit=config.limit,
        limit_corrupted=config.limit_corrupted,
        seed=config.seed,
        extra_corruptions=config.held_out,
        tokenizer=config.tokenizer,
        rescore=config.rescore,
        batch_size=batch_size,
        device=device,
        shifts=(*parse_shifts(config.shifts, tuple(SUITES)), *shifts),
        data_path=config.data_path,
    )
