"""From trained classifiers to results and a report: `main_finetune.py --eval --resume OUT [--suite corruptions]`, or
`--suite` with names of its suites."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.groups import DataConfig, RunConfig
from mae_dat.config.runs import FinetuneConfig, load_finetune_config
from mae_dat.data.open import image_root
from mae_dat.models.classifier import Classifier
from mae_dat.models.weights.load import load_weights
from mae_dat.models.weights.open import read_export
from mae_dat.robustness.evaluation import EvaluationSetup, print_headline, run_evaluation
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_network
from mae_dat.robustness.suites.choose import CLEAN, CONFLICT, GENERATED, SuiteSettings
from mae_dat.runtime.collectives import on_all_ranks
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.training.accuracy import evaluate_accuracy
from mae_dat.training.context import run_context
from mae_dat.training.finetune import (
    build_configured_classifier,
    finetune,
    held_out_images,
    held_out_loader,
    source_grid,
)

logger = logging.getLogger(__name__)


def evaluate_checkpoint(config: FinetuneConfig, console: Console) -> None:
    """Measures one classifier on the validation images; with a suite other than `clean` it writes a report.

    The report goes into --output_dir, or a folder `evaluation` beside the weights where none was named.

    Raises ConfigError without --resume, CheckpointError when the checkpoint's head does not fit the data.
    """
    if not config.run.resume:
        raise ConfigError("--eval needs --resume: the output folder of a fine-tuning, or a weights file.")
    source, suite = Path(config.run.resume), config.evaluation.suite
    config, classes = evaluated_config(source, config)
    if suite != (CLEAN,):
        if config.run.output_dir == RunConfig().output_dir:
            folder = (source if source.is_dir() else source.parent) / "evaluation"
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder)))
        evaluate_suites(config, console)
        return
    with run_context(config.run, config.launch, console, training=False) as context:
        images = held_out_images(config.data, classes)
        model = load_classifier(source, config, images.classes).to(context.device)
        loader = held_out_loader(images, 2 * config.optim.batch_size, config.data, context)
        final = evaluate_accuracy(model, loader, context.device, context.precision)
        logger.info("accuracy %.2f %% top-1, %.2f %% top-5 on %s", final["test_acc1"], final["test_acc5"], images.root)


def evaluate_suites(config: FinetuneConfig, console: Console) -> None:
    """Measure the suites, for the classifier of --resume on the benchmarks of --data_path; `corruptions`
    are the corrupted pictures, all clean ones, and conflicting ones where there are some."""
    require_color(config)
    source, suite = str(config.run.resume), config.evaluation.suite
    with run_context(config.run, config.launch, console, training=False) as context:
        view = EvalOptions(context.device, context.precision, config.data.image_size)
        contender = on_all_ranks(lambda: open_network(source, config.classifier.model, Path(source).stem, view))
        batch_size, root = 2 * config.optim.batch_size, image_root(config.data.data_path)
        if "corruptions" in suite:
            made = (CLEAN, GENERATED, *([CONFLICT] if (root / CONFLICT).is_dir() else []))
            suite = (*made, *(name for name in suite if name not in (*made, "corruptions")))
        choice = SuiteSettings(
            root, limit=config.evaluation.limit, whole_clean=True, seed=config.run.seed,
            tokenizer=config.dat.tokenizer, batch_size=batch_size, device=context.device,
        )  # fmt: skip
        setting = EvaluationSetup(view, context.output, console, context.world, batch_size, config.data.num_workers)
        results = run_evaluation([contender], choice, suite, setting, f"Robustness of {contender.name}")
        if context.world.main:
            print_headline(results)


def require_color(config: FinetuneConfig) -> None:
    """Raises ConfigError for a classifier of grey pictures: the corruptions are defined for colour."""
    if config.data.in_chans != 3:
        raise ConfigError(f"corruptions are defined for colour pictures, not for --in_chans {config.data.in_chans}.")


def main(arguments: Sequence[str]) -> None:
    """Run `main_finetune.py` with its arguments: fine-tune, or evaluate with `--eval`."""
    console = console_for_command()
    config = load_finetune_config(arguments)
    if config.evaluation.eval:
        evaluate_checkpoint(config, console)
        return
    final = finetune(config, console)
    logger.info("accuracy %.2f %% top-1, %.2f %% top-5", final["test_acc1"], final["test_acc5"])


def evaluated_config(path: Path, config: FinetuneConfig) -> tuple[FinetuneConfig, list[str] | None]:
    """The settings to evaluate an output folder or file with, and its classes in the order of its head, if known.

    What a file of ours says about itself replaces the flags; the pictures' size only where none was asked for. Raises
    MissingInputError, CheckpointError.
    """
    _, facts = read_export(path)
    if facts.get("kind") == "mae" or "mask_ratio" in facts:
        raise CheckpointError(
            f"--resume {path} is a pretraining, which has no classes yet: fine-tune it first, with --finetune {path}."
        )
    data, own = config.data, config.classifier
    asked = data.input_size != DataConfig().input_size
    size = data.input_size if asked else tuple(facts.get("input_size", data.input_size))
    pooled = facts.get("global_pool", own.mean_pool) and not facts.get("cls_token", False)
    classifier = dataclasses.replace(
        own,
        model=facts.get("model", own.model),
        nb_classes=own.nb_classes or facts.get("nb_classes"),
        global_pool=pooled,
        cls_token=not pooled,
        drop_path=0.0,
    )
    data = dataclasses.replace(data, input_size=size, in_chans=facts.get("in_chans", data.in_chans))
    return dataclasses.replace(config, classifier=classifier, data=data), facts.get("classes")


def load_classifier(path: Path, config: FinetuneConfig, classes: list[str]) -> Classifier:
    """A fine-tuned classifier from an output folder or file, built by settings such as `evaluated_config` gives.

    Raises CheckpointError when its head has another number of classes than the data.
    """
    weights, facts = read_export(path)
    model = build_configured_classifier(config.classifier, config.data, config.classifier.nb_classes or len(classes))
    load_weights(model, weights, source_grid(model, facts))
    return model
