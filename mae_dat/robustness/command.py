"""Every robustness benchmark, exact, in one command: from checkpoints to results.json and a report.

`python -m mae_dat robustness --checkpoint A B --suite all --data ROOT --output OUT` measures what lies in ROOT and says
what does not: ImageNet's benchmarks in folders of their usual names, or ROOT/val/CLASS/*.jpg for other classes. Several
networks become columns side by side. Interrupted, the same command goes on where it stopped. `--recompute
OUT/results.json` prints the numbers again from the counts alone.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import LaunchConfig, RunConfig, image_size
from mae_dat.config.parse import load_config, suggest
from mae_dat.data.open import image_root
from mae_dat.robustness.evaluation import print_headline, run_evaluation
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import open_callable, open_network, open_networks
from mae_dat.robustness.scores.results import Results, read_results
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.world import World, world_from_environment
from mae_dat.storage.files import prepare_output_folder
from mae_dat.training.context import run_context

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """What is measured."""

    suite: tuple[str, ...] = ("all",)
    """all (what is there), or names: imagenet, imagenet-real, imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch,
    stylized, objnet-113, objnet-1000, imagenet-c, imagenet-c-bar, cue-conflict; clean (val/CLASS of other classes);
    conflict (conflict/**/SHAPE-TEXTURE-*.png or .jpg of two of those);
    generated (15 corruptions x 5 severities made from the clean pictures, labelled apart); fgsm-1/255, pgd-5-1/255,
    pgd-20-l2-0.5, autoattack-4/255; words-random, words-symbolic."""
    data: str | None = None
    """Folder that holds the benchmarks' folders, or val/CLASS; `demo` for generated pictures (default: the environment
    variable MAE_DAT_DATA)."""
    partial: bool = False
    """Measure folders that are not whole; their rows are marked."""
    subset: str | None = None
    """RobustBench's imagenet_test_image_ids.txt: of ImageNet and ImageNet-C, these 5,000 pictures alone."""
    limit: int | None = None
    """Pictures of each cell, drawn by --seed (default: all)."""
    seed: int = 0
    """Of everything that is drawn: generated corruptions, random starts, random words, --limit."""
    held_out: bool = False
    """Also the 4 held-out corruptions, where they are made here."""
    tokenizer: str = "embedded"
    """Of the words-* suites, as in training."""


@dataclasses.dataclass(frozen=True)
class RobustnessConfig:
    """Which networks, and where to."""

    checkpoint: tuple[str, ...] = ()
    """Output folders, weights files, released names (`python -m mae_dat fetch`) or .onnx files."""
    model: tuple[str, ...] = ()
    """Architecture where a file does not say: one for all, or one each. With --pretrained: timm's names,
    hf-hub:OWNER/NAME too."""
    pretrained: bool = False
    """Evaluate the networks of --model with timm's own weights."""
    names: tuple[str, ...] = ()
    """Titles of the columns (default: names of the folders or files)."""
    baseline: str | None = None
    """The column that others are held against, which comes first (default: the first given)."""
    suites: SuiteConfig = SuiteConfig()
    output: str = "output/robustness"
    """Folder of results.json, the report, and cells/, where an interrupted evaluation goes on."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: each network's own)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of resizing (default: each network's own)."""
    crop: float | None = None
    """The centre crop's side over the resized picture's (default: of --pretrained timm's crop_pct, by which its figures
    are published; else 7/8 up to 224 px, and all above)."""
    batch_size: int = 64
    num_workers: int = 8
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware has it; attacks always compute in float32."""
    hang_minutes: float = 30.0
    """Without a batch for so long, the run stops with code 75; 0 for never."""
    title: str = "Robustness"
    recompute: str | None = None
    """A results.json: print its numbers from the counts and measure nothing."""


# ---- from Python ----


def evaluate(
    models: Any,
    suite: str | Sequence[str] = "all",
    data: str | Path | None = None,
    *,
    output: str | Path | None = None,
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
    """Measures a network, or several by name, and returns integer counts: what the command does, from Python.

    A network is any callable float (B, 3, H, W) in [0, 1] -> logits (B, K), or what `--checkpoint` takes. `classes` are
    the names of a callable's outputs in order, `size` its input's in pixels (224), `interpolation` and `crop` as in
    `RobustnessConfig`. `settings` are those of `SuiteConfig`: partial, subset, limit, seed, held_out, tokenizer. With
    `output` an interrupted call goes on there, and results.json and the report are written. In a process group all
    ranks call it and get the same.

    Raises UserError: what is wrong with pictures or networks, before anything is measured; NumericsError for NaN or
    infinite logits.
    """
    where = pick_device(str(device))
    sizes = size if size is None or isinstance(size, tuple) else (size, size)
    view = EvalOptions(where, amp_dtype(precision, where), sizes, interpolation, crop)
    named = models if isinstance(models, Mapping) else {_title_of(models): models}
    contenders = [
        open_network(str(one), None, name, view)
        if isinstance(one, str | Path)
        else open_callable(one, name, view, classes)
        for name, one in named.items()
    ]
    wanted = SuiteConfig(data=None if data is None else str(data), **settings)
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    folder = None if output is None else on_main_rank(lambda: prepare_output_folder(Path(output)))
    setting = EvaluationSetup(view, folder, console or Console(quiet=True), world, batch_size, num_workers)
    asked = (suite,) if isinstance(suite, str) else tuple(suite)
    return run_evaluation(contenders, choice_of(wanted, where, batch_size), asked, setting, title)


def _title_of(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


# ---- the command ----


def choice_of(wanted: SuiteConfig, device: torch.device, batch_size: int) -> SuiteSettings:
    """The pictures that the flags mean."""
    return SuiteSettings(
        root=image_root(wanted.data),
        partial=wanted.partial,
        subset=Path(wanted.subset) if wanted.subset else None,
        limit=wanted.limit,
        seed=wanted.seed,
        held_out=wanted.held_out,
        tokenizer=wanted.tokenizer,
        batch_size=batch_size,
        device=device,
    )


def measure_all(config: RobustnessConfig, console: Console) -> Results:
    """What the command does, up to the report. Raises UserError."""
    settings = RunConfig(
        output_dir=config.output, device=config.device, precision=config.precision, hang_minutes=config.hang_minutes
    )
    with run_context(settings, LaunchConfig(), console, training=False) as context:
        size = image_size(config.input_size) if config.input_size else None
        view = EvalOptions(context.device, context.precision, size, config.interpolation, config.crop)
        contenders = on_all_ranks(
            lambda: open_networks(config.checkpoint, config.model, config.pretrained, config.names, view)
        )
        choice = choice_of(config.suites, context.device, config.batch_size)
        setting = EvaluationSetup(view, context.output, console, context.world, config.batch_size, config.num_workers)
        return run_evaluation(first(contenders, config.baseline), choice, config.suites.suite, setting, config.title)


def first(contenders: Sequence[EvaluatedNetwork], baseline: str | None) -> list[EvaluatedNetwork]:
    """The contenders, the baseline before the others. Raises ConfigError for a name that none has."""
    names = [one.name for one in contenders]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: {suggest(baseline, names)}")
    return sorted(contenders, key=lambda one: one.name != (baseline or names[0]))


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    config = load_config(RobustnessConfig, arguments, __doc__ or "")
    results = read_results(Path(config.recompute)) if config.recompute is not None else measure_all(config, console)
    if world_from_environment().main:
        print_headline(results)
