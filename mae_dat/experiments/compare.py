"""Compare ways to train, from images to a report: pretrain, fine-tune every variant with every seed, and measure all
networks on the same images.

`mae-dat compare --data_path DIR --output_dir OUT`. Every run has its own folder below OUT and resumes there:
to resume an interrupted comparison, run the same command again. Several processes can share the seeds (--seeds,
--no_measure) before a last one measures.

A *variant* is a way to train (variants.py): `--arms` and `--cross_arms` name variants of fine-tuning, `--pretrainings`
those of pretraining. A *group* is all fine-tunings of one variant after one pretraining, which differ in their seed
alone; results.json calls it `arm`.
"""

import dataclasses
import functools
import math
import shlex
from pathlib import Path
from typing import Any

import torch

from mae_dat.config.commands.compare import CompareConfig
from mae_dat.config.flags import flat_values
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.config.terminal import print_text
from mae_dat.config.variants import (
    FINETUNE_VARIANTS,
    IN_TIME,
    NONE,
    PLAIN,
    PRETRAIN_VARIANTS,
    group_label,
    pretraining_folder,
    pretraining_title,
    split_group_name,
)
from mae_dat.data.open import image_root, training_images
from mae_dat.experiments.describe import comparison_inputs
from mae_dat.experiments.parallel_runs import Stage, train_all
from mae_dat.robustness.corruptions import CORRUPTIONS, SEVERITIES
from mae_dat.robustness.evaluate_run import require_color
from mae_dat.robustness.evaluation import run_evaluation
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_network
from mae_dat.robustness.report.comparison import value_text
from mae_dat.robustness.report.findings import cautions
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.scores.results import Results, TrainingCurve, TrainingFacts, TrainingGallery, TrainingRun
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.attacks import WORD_SUITES
from mae_dat.robustness.suites.base import CLEAN, CONFLICT, GENERATED, SuiteSettings
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import pick_device
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.files import prepare_output_folder
from mae_dat.training.finetune import validation_images
from mae_dat.training.galleries import EARLIER_GALLERY_FOLDER, GALLERY_FOLDER

# Expected costs in units of a plain fine-tuning's; the remaining time alone depends on them.
_PRETRAIN_COST = 0.5
_MEASURE_COST, _CORRUPT_COST = 0.2, 1.0

Runs = dict[tuple[str, int], FinetuneConfig]
"""The settings of every fine-tuning, by group and seed."""


def compare(config: CompareConfig, console: Console) -> Results | None:
    """Train and measure what is still missing, and write results.json and the report into the output folder.

    Returns the results, None with --no_measure.
    """
    prepare_output_folder(Path(config.output_dir))
    pretraining = pretrain_config(config)
    runs = {
        (group, seed): finetune_config(config, group, seed)
        for seed in config.seeds
        for group in groups_to_train(config)
    }
    if config.measure:
        require_color(runs[config.arms[0], config.seeds[0]].data.in_chans)
    stages = _training_stages(config, runs)
    inputs, images = _report_inputs(config, pretraining, runs, console)
    console.plan = _stage_costs(config, pretraining.optim.epochs, runs, images)
    console.shows_inputs = False  # one summary stands for all trainings
    try:
        train_all(stages, config.jobs, console, config.threads)
    finally:
        console.shows_inputs = True
    if not config.measure:
        return None
    return _measure_and_report(config, pretraining, runs, console, inputs)


def _report_inputs(
    config: CompareConfig, pretraining: PretrainConfig, runs: Runs, console: Console
) -> tuple[InputSummary, int]:
    """Log and store the summary of what the comparison reads; return it and the number of training images."""
    fine_tuning = next(iter(runs.values()))
    images = training_images(fine_tuning.data, lambda image: torch.zeros(0), 0, labeled=True)
    validation = validation_images(fine_tuning.data, images.classes)
    output = Path(config.output_dir)
    folders = [pretraining_folder(output, name) for name in config.pretrainings_to_train()]
    folders += [Path(run.run.output_dir) for run in runs.values()]
    inputs = comparison_inputs(
        config,
        pretraining,
        fine_tuning,
        splits={"training": images, "validation": validation},
        suites=_suites(config),
        folders=folders,
    )
    console.report_inputs(inputs, output / INPUTS_FILE)
    return inputs, len(images)


def _suites(config: CompareConfig) -> tuple[str, ...]:
    """Return the suites to measure; by default conflict is one if its folder is there."""
    conflict = [CONFLICT] if (image_root(config.root) / CONFLICT).is_dir() else []
    return config.suite or (CLEAN, GENERATED, *conflict, *WORD_SUITES)


# ---- the trainings ----


def groups_to_train(config: CompareConfig) -> list[str]:
    """Return all groups, those after another pretraining as `PRETRAINING-VARIANT`."""
    others = [name for name in config.pretrainings if name != PLAIN]
    variants = config.cross_arms or config.arms
    return [*config.arms, *(f"{pretraining}-{variant}" for pretraining in others for variant in variants)]


def pretrain_config(config: CompareConfig, name: str = PLAIN) -> PretrainConfig:
    """Return the settings of a pretraining: the recipe, then the flags of its variant.

    `NAME_in_time` gets as many epochs as fit into plain's training time, by the seconds a step that plain and NAME
    took, and the same share of them for warm-up; both must have finished, since their logs are read.
    """
    output, base = Path(config.output_dir), name.removesuffix(IN_TIME)
    recipe = ["--config", config.pretrain_config, *shlex.split(config.pretrain_flags), "--data_path", config.root]
    variant_flags = shlex.split(PRETRAIN_VARIANTS[base].flags)
    flags = [*recipe, *variant_flags, "--output_dir", str(pretraining_folder(output, name))]
    settings = load_config(PretrainConfig, flags)
    if base == name:
        return settings
    speed = _seconds_per_step(pretraining_folder(output, PLAIN)) / _seconds_per_step(pretraining_folder(output, base))
    epochs = max(1, round(speed * settings.optim.epochs))
    warmup = settings.optim.warmup_epochs * epochs / settings.optim.epochs
    return load_config(PretrainConfig, [*flags, "--epochs", str(epochs), "--warmup_epochs", str(warmup)])


def finetune_config(config: CompareConfig, group: str, seed: int) -> FinetuneConfig:
    """Return the settings of one fine-tuning: the recipe, its paths and seed, then the flags of its variant."""
    output, (pretraining, variant) = Path(config.output_dir), split_group_name(group)
    paths = ["--data_path", config.root, "--output_dir", str(output / f"{group}-seed{seed}"), "--seed", str(seed)]
    start = [] if pretraining == NONE else ["--finetune", str(pretraining_folder(output, pretraining))]
    variant_flags = FINETUNE_VARIANTS[variant].flags.split()
    flags = [*shlex.split(config.finetune_flags), *paths, *start, *variant_flags]
    return load_config(FinetuneConfig, ["--config", config.finetune_config, *flags])


def _training_stages(config: CompareConfig, runs: Runs) -> list[Stage]:
    """Return all trainings with what they depend on, pretrainings first."""
    stages = []
    for name in config.pretrainings_to_train():
        needed = [PLAIN, name.removesuffix(IN_TIME)] if name.endswith(IN_TIME) else []
        settings = functools.partial(pretrain_config, config, name)
        stages.append(Stage(_pretraining_stage(name), settings, tuple(map(_pretraining_stage, needed))))
    for group, seed in runs:
        pretraining, _ = split_group_name(group)
        after = () if pretraining == NONE else (_pretraining_stage(pretraining),)
        stages.append(Stage(_run_title(group, seed), functools.partial(finetune_config, config, group, seed), after))
    return stages


def _run_title(group: str, seed: int) -> str:
    """Return the name of a fine-tuning, on the progress bar and in the report."""
    return f"{group_label(group)}, seed {seed}"


def _pretraining_stage(name: str) -> str:
    """Return the name of a pretraining, on the progress bar and in the report."""
    return "pretrain" if name == PLAIN else f"pretrain, {pretraining_title(name)}"


def _stage_costs(comparison: CompareConfig, pretrain_epochs: int, runs: Runs, images: int) -> dict[str, float]:
    """Return the expected relative times of the stages; the console turns them into seconds by the measured pace."""
    costs = {}
    for name in comparison.pretrainings_to_train():
        # `NAME_in_time` takes as long as plain, and words as a target cost little more than pixels.
        variant = FINETUNE_VARIANTS.get(name.removesuffix("_words"))
        cost = _PRETRAIN_COST * (variant.cost if variant else 1.0)
        costs[_pretraining_stage(name)] = cost * pretrain_epochs * images / 200
    for (group, seed), config in runs.items():
        cost = FINETUNE_VARIANTS[split_group_name(group)[1]].cost
        costs[_run_title(group, seed)] = cost * config.optim.epochs * images / 200
    if comparison.measure:
        limits = (comparison.limit, comparison.limit_corrupted)
        count = min((limit for limit in limits if limit), default=images // 4)
        passes = count * len(CORRUPTIONS) * len(SEVERITIES)
        costs["measure"] = passes * (_MEASURE_COST * len(runs) + _CORRUPT_COST) / 200
    return costs


# ---- the report ----


def _measure_and_report(
    comparison: CompareConfig, pretraining: PretrainConfig, runs: Runs, console: Console, inputs: InputSummary
) -> Results:
    """Measure all classifiers on the same images, except for what is stored already, and write the report."""
    any_config = next(iter(runs.values()))
    device = pick_device(any_config.run.device)
    options = EvalOptions(device, size=any_config.data.image_size, protocol=comparison.protocol)
    networks = [
        open_network(config.run.output_dir, config.classifier.model, _run_title(group, seed), options)
        for (group, seed), config in runs.items()
    ]
    root = image_root(comparison.root)
    # The first-order adversary, because exact losses would take longer than the trainings.
    suite_settings = SuiteSettings(
        root,
        restrict_classes=comparison.restrict_classes,
        limit=comparison.limit,
        limit_corrupted=comparison.limit_corrupted,
        tokenizer=any_config.dat.tokenizer,
        rescore=0,
        device=device,
    )
    setup = EvaluationSetup(
        options,
        Path(comparison.output_dir),
        console,
        batch_size=64,
        num_workers=any_config.data.num_workers,
        inputs=inputs,
    )
    training = _collect_training(comparison, pretraining, runs)
    return run_evaluation(
        networks, suite_settings, _suites(comparison), setup, title=comparison.title, training=training
    )


def _collect_training(comparison: CompareConfig, pretraining: PretrainConfig, runs: Runs) -> TrainingFacts:
    """Collect the settings, curves, times and galleries of all runs from their folders, for the report."""
    settings = {"comparison": dataclasses.asdict(comparison), "pretraining": flat_values(pretraining)}
    for name in comparison.pretrainings_to_train()[1:]:
        settings[f"pretraining with {pretraining_title(name)}"] = flat_values(pretrain_config(comparison, name))
    records: dict[str, TrainingRun] = {}
    for (group, seed), config in runs.items():
        folder, label = Path(config.run.output_dir), group_label(group)
        times = _training_times(folder)
        records[_run_title(group, seed)] = {
            "arm": group,
            "label": label,
            "seed": seed,
            "seconds": times["seconds"],
            "cpu_seconds": times["cpu_seconds"],
            "curves": _training_curves(folder),
        }
        if seed == comparison.seeds[0]:
            settings[f"fine-tuning, {label}"] = flat_values(config)
    plain, names = Path(pretraining.run.output_dir), comparison.pretrainings_to_train()
    folders = {_pretraining_stage(name): pretraining_folder(Path(comparison.output_dir), name) for name in names}
    return {
        "runs": records,
        "pretraining": _training_curves(plain),
        "seconds": _training_times(plain)["seconds"],
        "cpu_seconds": {name: _training_times(folder)["cpu_seconds"] for name, folder in folders.items()},
        "settings": {
            stage: {key: _json_value(value) for key, value in values.items()} for stage, values in settings.items()
        },
        "galleries": _training_galleries(comparison),
    }


def _json_value(value: Any) -> Any:
    """Return a setting as a type that JSON has."""
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _training_times(folder: Path) -> dict[str, float]:
    """Return the wall-clock `seconds` and `cpu_seconds` of a training, from its log.txt."""
    records = read_log(folder / "log.txt")
    return {key: sum(record.get(key, 0.0) for record in records) for key in ("seconds", "cpu_seconds")}


def _seconds_per_step(folder: Path) -> float:
    """Return the seconds of training per update in a finished run's log, without evaluating and saving."""
    records = read_log(folder / "log.txt")
    return sum(record["seconds"] for record in records) / records[-1]["step"]


def _training_curves(folder: Path) -> dict[str, TrainingCurve]:
    """Return the curves by epoch from log.txt; none where there is no log."""
    # DAT's training loss is a sum over views; only its clean part can be compared with a plain run's.
    keys_of_curve = {
        "train_loss": ("train_loss_clean", "train_loss"),
        "test_acc1": ("test_acc1",),
        "changed_words": ("train_changed_words",),
    }
    records = read_log(folder / "log.txt")
    curves: dict[str, TrainingCurve] = {}
    for name, keys in keys_of_curve.items():
        for record in records:
            key = next((key for key in keys if key in record), None)
            if key is not None:
                value = float(record[key])
                curves.setdefault(name, []).append([record["epoch"] + 1, value if math.isfinite(value) else None])
    return curves


def _gallery_file(output: Path, run: str, name: str) -> str:
    """Return the file of a gallery below `output`; runs of earlier versions have it in another folder."""
    earlier = f"{run}/{EARLIER_GALLERY_FOLDER}/{name}.png"
    file = f"{run}/{GALLERY_FOLDER}/{name}.png"
    return earlier if (output / earlier).is_file() and not (output / file).is_file() else file


def _training_galleries(config: CompareConfig) -> list[TrainingGallery]:
    """Return the galleries that the runs of the first seed drew after their last epoch."""
    output, seed = Path(config.output_dir), config.seeds[0]
    reconstruction: TrainingGallery = {
        "title": "What the masked autoencoder fills in",
        "caption": "Masked image, the prediction pasted into the visible patches, and the original, after "
        "the last epoch.",
        "file": _gallery_file(output, "pretrain", "reconstruction"),
    }
    adversaries: list[TrainingGallery] = [
        {
            "title": f"Visual words: {group_label(group)}",
            "caption": "A held-out image, the same decoded from its words, after the attack on the trained "
            "model, the difference it made (amplified), and the words that changed (dark).",
            "file": _gallery_file(output, f"{group}-seed{seed}", "adversary"),
        }
        for group in groups_to_train(config)
    ]
    return [gallery for gallery in [reconstruction, *adversaries] if (output / gallery["file"]).is_file()]


def print_numbers(results: Results, output: Path) -> None:
    """Print the report's path, and the main numbers of each group on one line."""
    report = summarize(results)
    print_text(
        "\n" + " ".join([f"Open {output / 'report.html'} (numbers: {output / 'results.json'}).", *cautions(report)])
    )
    metrics = [metric for metric in report.metrics if metric.key in ("clean", "generated/mean", "conflict/bias")]
    for group in report.groups:
        print_text(
            f"  {group.title:<16} " + "   ".join(f"{metric.title} {value_text(metric, group)}" for metric in metrics)
        )


def main(config: CompareConfig) -> None:
    """Run the command."""
    results = compare(config, console_for_command())
    if results is not None:
        print_numbers(results, Path(config.output_dir))
