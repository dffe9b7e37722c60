"""Measure networks on every robustness benchmark in a folder, and write results.json and a report.

`mae-dat evaluate --checkpoint A B --suite all --data ROOT --output OUT` runs every benchmark found in ROOT
and lists the ones that are missing: ImageNet's benchmarks in folders of their usual names, or ROOT/val/CLASS/*.jpg for
other classes. Several networks become columns side by side. To resume an interrupted evaluation, run the same command
again. `--recompute OUT/results.json` prints the numbers again from the counts alone.
"""

# `evaluation.run_evaluation` does the work. Its docstring lists the modules below it in order.

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mae_dat.config.commands.evaluate import EvaluateConfig, SuiteConfig
from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.groups import LaunchConfig, RunConfig, image_size
from mae_dat.data.open import image_root
from mae_dat.robustness.evaluation import print_headline, run_evaluation
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import open_callable, open_network, open_networks
from mae_dat.robustness.scores.results import Results
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.world import World, world_from_environment
from mae_dat.storage.files import prepare_output_folder
from mae_dat.training.context import run_context

logger = logging.getLogger(__name__)


# ---- from Python ----


def evaluate(  # noqa: PLR0913 - one keyword per flag
    models: Any,
    suite: str | Sequence[str] = "all",
    data_path: str | Path | None = None,
    *,
    output_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    crop: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    title: str = "Robustness",
    console: Console | None = None,
    **settings: Any,
) -> Results:
    """Measure a network, or several by name, and return integer counts: the command, from Python.

    A network is any callable from float images (B, 3, H, W) in [0, 1] to logits (B, K), or what `--checkpoint` takes.
    `classes` are the names of a callable's outputs in order, `size` its input's in pixels (224); `interpolation` and
    `crop` as in `EvaluateConfig`. `settings` are those of `SuiteConfig`: partial, subset, limit, seed, held_out,
    tokenizer. With `output_dir`, results.json and the report are written, and an interrupted call can be repeated to
    resume. In a process group all ranks call it and get the same.

    Raises UserError for wrong images or networks, before anything is measured; NumericsError for NaN or infinite
    logits.
    """
    torch_device = pick_device(str(device))
    size_HW = (size, size) if isinstance(size, int) else size
    options = EvalOptions(
        torch_device, amp_dtype(precision, torch_device), size=size_HW, interpolation=interpolation, crop=crop
    )
    networks = _open_all(models, options, classes)
    suite_config = SuiteConfig(data_path=None if data_path is None else str(data_path), **settings)
    suites = suite_settings(suite_config, torch_device, batch_size)
    requested = (suite,) if isinstance(suite, str) else tuple(suite)
    setup = _setup_in_python(options, output_dir, console, batch_size, num_workers=num_workers)
    return run_evaluation(networks, suites, requested, setup, title=title)


def _setup_in_python(
    options: EvalOptions, output: str | Path | None, console: Console | None, batch_size: int, *, num_workers: int
) -> EvaluationSetup:
    """Return the setup of a call from Python, whose process may be part of a process group."""
    return EvaluationSetup(
        options,
        None if output is None else on_main_rank(lambda: prepare_output_folder(Path(output))),
        console=console or Console(quiet=True),
        world=World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(),
        batch_size=batch_size,
        num_workers=num_workers,
    )


def _open_all(models: Any, options: EvalOptions, classes: Sequence[str] | None) -> list[EvaluatedNetwork]:
    """Open a model or a mapping from names to models: each a callable, or what `--checkpoint` takes."""
    named_models = models if isinstance(models, Mapping) else {_title_of(models): models}
    return [
        open_network(str(model), None, name, options)
        if isinstance(model, str | Path)
        else open_callable(model, name, options, classes)
        for name, model in named_models.items()
    ]


def _title_of(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


# ---- the command ----


def suite_settings(config: SuiteConfig, device: torch.device, batch_size: int) -> SuiteSettings:
    """Return the settings of the suites that the flags describe."""
    return SuiteSettings(
        root=image_root(config.data_path),
        partial=config.partial,
        subset=Path(config.subset) if config.subset else None,
        limit=config.limit,
        seed=config.seed,
        extra_corruptions=config.held_out,
        tokenizer=config.tokenizer,
        batch_size=batch_size,
        device=device,
    )


def _evaluate_from_flags(config: EvaluateConfig, console: Console) -> Results:
    """Open the networks, measure them and write the report. Raises UserError."""
    run_config = RunConfig(
        output_dir=config.output_dir, device=config.device, precision=config.precision, hang_minutes=config.hang_minutes
    )
    with run_context(run_config, LaunchConfig(), console, training=False) as context:
        size_HW = image_size(config.input_size) if config.input_size else None
        options = EvalOptions(
            context.device,
            context.precision,
            size=size_HW,
            interpolation=config.interpolation,
            crop=config.crop,
        )
        networks = on_all_ranks(
            lambda: open_networks(
                config.checkpoint, config.model, pretrained=config.pretrained, names=config.names, options=options
            )
        )
        setup = EvaluationSetup(
            options,
            context.output,
            console=console,
            world=context.world,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
        )
        return run_evaluation(
            _baseline_first(networks, config.baseline),
            suite_settings(config.suites, context.device, config.batch_size),
            requested=config.suites.suite,
            setup=setup,
            title=config.title,
        )


def _baseline_first(networks: Sequence[EvaluatedNetwork], baseline: str | None) -> list[EvaluatedNetwork]:
    """Return the networks, the baseline before the others. Raises ConfigError for an unknown name."""
    names = [network.name for network in networks]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: {suggest(baseline, names)}")
    return sorted(networks, key=lambda network: network.name != (baseline or names[0]))


def main(config: EvaluateConfig) -> None:
    """Run the command."""
    results = _evaluate_from_flags(config, console_for_command())
    if world_from_environment().main:
        print_headline(results)
