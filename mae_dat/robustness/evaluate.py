"""Evaluate models from Python: `mae_dat.evaluate`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch.distributed as dist
from torch import nn

from mae_dat.config.commands.evaluate import EvaluateConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import expand_home, flat_values
from mae_dat.config.groups import image_size
from mae_dat.config.requirements import read_requirements
from mae_dat.config.signature import check_flag_names, takes_flags
from mae_dat.data.class_names import read_class_names
from mae_dat.models.adapters import is_transformers_model
from mae_dat.robustness.evaluation import run_evaluation
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import (
    TIMM_PREFIXES,
    baseline_first,
    distinct_names,
    open_callable,
    open_network,
    open_timm,
)
from mae_dat.robustness.report.gate import gate_lines, require_met
from mae_dat.robustness.setup import EvaluationSetup, suite_settings
from mae_dat.robustness.suites.functions import image_function
from mae_dat.robustness.suites.shifts import Shift, check_shifts
from mae_dat.robustness.suites.specs import SUITES
from mae_dat.robustness.summary import Evaluation
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console, console_for_python
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.world import World
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.released import released_weights

_LEFT_OUT = ("checkpoint", "model", "pretrained", "names", "classes", "hang_minutes")


@takes_flags(EvaluateConfig, _LEFT_OUT)
def evaluate(
    models: Any,
    suite: str | Sequence[str] | None = None,
    data_path: str | Path | None = None,
    *,
    suites: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    classes: Sequence[str] | str | Path | None = None,
    progress: bool = True,
    **flags: Any,
) -> Evaluation:
    """Evaluate a model, or several side by side, on robustness benchmarks: `mae-dat evaluate`, from Python.

    Args:
        models: a model, a list of models, or a mapping from titles to models. A model is the output folder of a
            fine-tuning, a weights file, an ONNX file or a released name; the name of a timm model, or a timm module; a
            classifier of Hugging Face transformers (module, pair of module and image processor, pipeline, or folder);
            or any callable from float images (B, 3, H, W) in [0, 1] to logits (B, K). Modules of timm and transformers
            normalize as their own settings say; any other callable must normalize itself.
        suite: `all` (every suite whose images are found; the default), or names such as clean, generated, imagenet-c,
            pgd-5-1/255 or words-symbolic. With `suites`, the default is the clean images alone.
        data_path: folder that contains the folders of the benchmarks, or val/CLASS; `demo` for generated images
            (default: the environment variable MAE_DAT_DATA).
        suites: shifts of your own by name. A function changes one image: a float tensor (3, H, W) in [0, 1], or what
            the type of its parameter says: torch.Tensor, numpy.ndarray (uint8, (H, W, 3)) or PIL.Image.Image; or a
            pair (function, "tensor", "array" or "pil"). It returns the same type and size. Or a folder
            (GROUP/CLASS/*, CLASS/*, CORRUPTION/SEVERITY/CLASS/*) or CSV file (file, class, group).
        output_dir: folder for results.json and the report. To resume an interrupted call, repeat it. By default
            nothing is written.
        classes: names of the outputs in order, or a text file of them, in place of those that the models record.
        progress: whether to show a progress bar and the log.
        flags: the other flags of `mae-dat evaluate`, listed below.

    Returns:
        An `Evaluation`: prints as a table; `.scores` are its numbers, `.results` all counts, and `.report(DIR)` writes
        the report. In a process group all ranks call `evaluate` and get the same.

    Raises:
        UserError: the images, models or settings cannot be used (before anything is measured), or a model gives NaN or
            infinite logits. RequirementError: a requirement of `require` is not met; all files are written before.

    Examples:
        >>> import mae_dat, torch
        >>> def brightness(images):  # two classes: bright and dark
        ...     mean = images.mean((1, 2, 3))
        ...     return torch.stack([mean - 0.44, 0.44 - mean], 1)
        >>> evaluation = mae_dat.evaluate(brightness, "clean", "photos", input_size=32, progress=False)
        >>> print(evaluation)
                                                           brightness
        Clean (%) ↑ (chance 50.0, most common class 50.0)       100.0
        Clean: calibration error, ECE (%) ↓                      47.1
        >>> sorted(evaluation.scores)
        ['clean', 'clean/ece']
    """
    check_flag_names(EvaluateConfig, flags, _LEFT_OUT, "evaluate")
    shifts = _own_shifts(suites or {}, flags)
    suite = suite if suite is not None else ("all" if not shifts and not flags.get("shifts") else ())
    config = EvaluateConfig.from_flags(suite=suite, data_path=data_path, **flags)
    folder = None if output_dir is None else Path(expand_home(output_dir))
    return _evaluate_from_config(config, models, classes, shifts, folder, progress=progress)


def _evaluate_from_config(
    config: EvaluateConfig,
    models: Any,
    classes: Sequence[str] | str | Path | None,
    shifts: Sequence[Shift],
    folder: Path | None,
    *,
    progress: bool,
) -> Evaluation:
    """Measure the models, then judge the requirements. Raises UserError."""
    requirements = read_requirements(config.require) if config.require else None
    options = evaluation_options(config)
    names = read_class_names(classes) if isinstance(classes, str | Path) else classes
    networks = baseline_first(open_models(models, options, names), config.baseline)
    with console_for_python(progress) as console:
        setup = _setup_in_python(options, folder, console, config, _describe_call(networks, config))
        settings = suite_settings(config.suites, options.device, config.batch_size, shifts)
        settings = dataclasses.replace(settings, classes=tuple(names) if names else None)
        results = run_evaluation(networks, settings, config.suites.suite, setup, config.title)
    if requirements:
        places = (folder / "results.json", folder) if folder and setup.world.main else (None, None)
        require_met(gate_lines(results, requirements, config.undecided, *places), config.undecided)
    return Evaluation(results, folder)


def _own_shifts(suites: Mapping[str, Any], flags: dict[str, Any]) -> list[Shift]:
    """Return the functions among the user's own suites; folders and CSV files are added to the flag `shifts`.

    Raises ConfigError.
    """
    folders = {name: source for name, source in suites.items() if isinstance(source, str | Path)}
    if folders:
        given = flags.get("shifts", ())
        others = [given] if isinstance(given, str) else [*given]
        flags["shifts"] = [*others, *(f"{name}={source}" for name, source in folders.items())]
    shifts = [Shift(name, image_function(name, given)) for name, given in suites.items() if name not in folders]
    check_shifts(shifts, (*SUITES, *folders))
    return shifts


def evaluation_options(config: EvaluateConfig) -> EvalOptions:
    """Return how the flags feed images to the models. Raises ConfigError."""
    device = pick_device(config.device)
    return EvalOptions(
        device,
        amp_dtype(config.precision, device),
        size=image_size(config.input_size) if config.input_size else None,
        interpolation=config.interpolation,
        crop=config.crop,
        protocol=config.protocol,
    )


def _setup_in_python(
    options: EvalOptions, folder: Path | None, console: Console, config: EvaluateConfig, call: str
) -> EvaluationSetup:
    """Return the setup of a call from Python, whose process may be part of a process group."""
    return EvaluationSetup(
        options,
        None if folder is None else on_main_rank(lambda: prepare_output_folder(folder)),
        console=console,
        world=World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        call=call,
    )


def _describe_call(networks: Sequence[EvaluatedNetwork], config: EvaluateConfig) -> str:
    """Return the call for the report. A model may be any object, so its title stands for it."""
    values, defaults = flat_values(config), flat_values(EvaluateConfig())
    changed = [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
    return f"mae_dat.evaluate({', '.join([str([network.name for network in networks]), *changed])})"


# ---- models ----


def open_models(models: Any, options: EvalOptions, classes: Sequence[str] | None = None) -> list[EvaluatedNetwork]:
    """Open what `evaluate` takes as models. Raises UserError."""
    return [open_any(model, name, options, classes) for name, model in _named(models).items()]


def _named(models: Any) -> dict[str, Any]:
    """Return the models by title. Raises ConfigError for none, or for two of one title."""
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    elif isinstance(models, list):
        titles = [_title_of(model) for model in models]
        if all(isinstance(model, str | Path) for model in models) and models:
            titles = distinct_names([*map(str, models)])
        if len(set(titles)) < len(titles):
            raise ConfigError(f"two models have the same title ({', '.join(titles)}): give a mapping from titles.")
        named = dict(zip(titles, models, strict=True))
    else:
        named = {_title_of(models): models}
    if not named:
        raise ConfigError("no models to evaluate: give a model, a list of them, or a mapping from titles to models.")
    return named


def _title_of(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    if isinstance(model, tuple) and model:
        model = model[0]
    if is_transformers_model(getattr(model, "model", None)):  # of a pipeline
        model = model.model
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)


def open_any(model: Any, name: str, options: EvalOptions, classes: Sequence[str] | None = None) -> EvaluatedNetwork:
    """Open one model under a title: a path, a name, or anything that `open_callable` takes. Raises UserError."""
    if not isinstance(model, str | Path):
        return open_callable(model, name, options, classes)
    source = expand_home(model)
    if is_timm_name(source):
        return open_timm(timm_place(source), name, options)
    return open_network(source, None, name, options)


def timm_place(source: str) -> str:
    """Return the name under which timm finds a model: that of a repository timm/NAME has the prefix hf-hub."""
    return f"hf-hub:{source}" if source.startswith("timm/") else source


def is_timm_name(source: str) -> bool:
    """Return whether a source names a timm model; a file, folder or released weights of that name take precedence."""
    if Path(source).exists() or source in released_weights():
        return False
    return source.startswith(TIMM_PREFIXES) or timm.is_model(source)
