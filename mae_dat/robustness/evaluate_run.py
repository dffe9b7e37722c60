"""Evaluate a fine-tuned classifier: `main_finetune.py --eval --resume OUT [--suite clean generated]`."""

import dataclasses
import logging
from pathlib import Path

import torch
from torch import nn

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.groups import DataConfig, ImageSize, RunConfig
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.class_names import GIVEN_NAMES, STORED_NAMES, given_class_names, read_class_names
from mae_dat.data.describe import add_images
from mae_dat.data.folders import find_evaluation_images
from mae_dat.data.image_set import ImageSet
from mae_dat.data.open import (
    decode_channels,
    image_root,
    open_images_of_model,
    warn_of_packed_size,
    with_channels,
)
from mae_dat.models.weights.describe import add_opened_models, describe_pixels
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.load import check_class_count
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.robustness.evaluation import print_headline, run_evaluation
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_network, options_of_weights
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import CLEAN, SuiteSettings
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.restriction import RestrictedNetwork
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import InputSummary
from mae_dat.training.accuracy import evaluate_classes
from mae_dat.training.context import RunContext, run_context
from mae_dat.training.describe import add_device, add_on_bad
from mae_dat.training.finetune import validation_loader
from mae_dat.training.normalization import warn_of_normalization
from mae_dat.training.validation import report_classes

logger = logging.getLogger(__name__)


def evaluate_checkpoint(config: FinetuneConfig, console: Console) -> None:
    """Log the accuracy of a fine-tuned classifier on the validation images; with a suite other than `clean`, write a
    report of the suites.

    The report is written to --output_dir, by default to a folder `evaluation` beside the weights.

    Raises ConfigError without --resume, CheckpointError if the checkpoint's head does not fit the data.
    """
    if not config.run.resume:
        raise ConfigError("--eval needs --resume: the output folder of a fine-tuning, or a weights file.")
    source = Path(config.run.resume)
    file = read_model_file(source)
    config = evaluated_config(file, config)
    if config.evaluation.suite == (CLEAN,):
        _log_accuracy(file, config, console)
        return
    if config.run.output_dir == RunConfig().output_dir:
        folder = (source if source.is_dir() else source.parent) / "evaluation"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder)))
    _report_on_suites(config, console)


def _log_accuracy(file: ModelFile, config: FinetuneConfig, console: Console) -> None:
    """Log the accuracy of the classifier in a file on the validation images. Raises CheckpointError."""
    with run_context(config.run, config.launch, console, training=False) as context:
        opened = open_model(file, config.classifier.model, evaluated_size(file, config), flag="--resume")
        model: nn.Module = opened.classifier().to(context.device)
        preprocessing = eval_preprocessing(opened, eval_options(config, context))
        images = evaluated_images(config, opened, preprocessing)
        if config.classifier.nb_classes:
            check_class_count(file.source, opened.plan.num_classes, config.classifier.nb_classes)
        inputs = _accuracy_inputs(config, opened, images, str(preprocessing), context)
        on_main_rank(lambda: context.console.report_inputs(inputs))
        if not (file.facts or file.statistics) and opened.plan.in_chans == 3:
            on_main_rank(lambda: warn_of_normalization(Path(file.source).name, model, images, context.device))
        loader = validation_loader(images, 2 * config.optim.batch_size, config.data, context)
        if config.evaluation.restrict_classes:
            present = torch.tensor(present_classes(images), device=context.device)
            model = RestrictedNetwork(model, opened.plan.num_classes, present)
        final = evaluate_classes(model, loader, context.device, context.precision)
        report_classes(final, images.classes, folder=None)
        accuracies = (final.scores[name] for name in ("test_acc1", "test_acc5", "test_balanced_acc"))
        message = "val acc1 %.2f %%, acc5 %.2f %%, balanced_acc %.2f %%, on %s"
        logger.info(message, *accuracies, images.root)


def evaluated_size(file: ModelFile, config: FinetuneConfig) -> ImageSize | None:
    """Return the size of `evaluated_config`; None, the model's own, for a file of another project without the flag."""
    given = config.data.input_size != DataConfig().input_size
    return config.data.image_size if given or "input_size" in file.facts else None


def eval_options(config: FinetuneConfig, context: RunContext, size: ImageSize | None = None) -> EvalOptions:
    """Return how the flags feed images to the model."""
    return EvalOptions(context.device, context.precision, size, protocol=config.evaluation.protocol)


def eval_preprocessing(opened: OpenedModel, options: EvalOptions) -> Preprocessing:
    """Return how images become the model's input: as in `mae-dat evaluate`."""
    options = options_of_weights(opened, options)
    return Preprocessing(
        opened.input_size,
        options.interpolation or opened.interpolation,
        crop=options.crop,
        keep_size=True,
        protocol=options.protocol,
    )


def evaluated_images(config: FinetuneConfig, opened: OpenedModel, preprocessing: Preprocessing) -> ImageSet:
    """Open the validation images, with the labels of the model's outputs; a folder without splits, such as
    ImageNet-A's, is evaluated itself.

    Raises MissingInputError, DataError.
    """
    images = open_images_of_model(
        find_evaluation_images(image_root(config.data.data_path)),
        with_channels(preprocessing, opened.plan.in_chans),
        opened.plan.num_classes,
        given_class_names(config.evaluation.classes, opened.plan.num_classes, opened.title) or opened.classes,
        on_bad=config.data.on_bad,
        order=config.evaluation.class_order,
    )
    decode_channels(images, opened.plan.in_chans)
    if config.evaluation.classes and images.class_names_from == STORED_NAMES:
        images.class_names_from = GIVEN_NAMES
    warn_of_packed_size(images)
    return images


def present_classes(images: ImageSet) -> list[int]:
    """Return the numbers of the classes that have images."""
    return [number for number, count in enumerate(images.class_counts()) if count]


def _accuracy_inputs(
    config: FinetuneConfig, opened: OpenedModel, images: ImageSet, preprocessing: str, context: RunContext
) -> InputSummary:
    """Return the summary of what the evaluation of clean accuracy reads. Nothing is written, so it is only logged."""
    data = config.data
    inputs = InputSummary(f"{config.verb} --eval")
    add_images(inputs, data.data_path, image_root(data.data_path), {"validation": images})
    if config.evaluation.restrict_classes:
        among = f"{len(present_classes(images))} of {opened.plan.num_classes:,} (--restrict_classes)"
        inputs.add("predicted", f"only classes that have images: {among}")
    elif len(present_classes(images)) < opened.plan.num_classes:
        inputs.add("predicted", f"all {opened.plan.num_classes:,} classes of the model (no --restrict_classes)")
    add_on_bad(inputs, data.on_bad)
    add_opened_models(inputs, [opened])
    inputs.add("pixels", describe_pixels(opened), preprocessing)
    add_device(inputs, context, data.num_workers)
    return inputs


def _report_on_suites(config: FinetuneConfig, console: Console) -> None:
    """Measure the classifier of --resume on the suites of --data_path, and write results.json and the report."""
    require_color(config.data.in_chans)
    source, model = str(config.run.resume), config.classifier.model
    with run_context(config.run, config.launch, console, training=False) as context:
        options = eval_options(config, context, evaluated_size(read_model_file(source), config))
        network = on_all_ranks(lambda: open_network(source, model, Path(source).stem, options))
        root = image_root(config.data.data_path)
        batch_size = 2 * config.optim.batch_size
        settings = SuiteSettings(
            root,
            partial=True,  # as for the accuracy alone; the rows are marked
            restrict_classes=config.evaluation.restrict_classes,
            classes=tuple(read_class_names(config.evaluation.classes)) if config.evaluation.classes else None,
            class_order=config.evaluation.class_order,
            limit=config.evaluation.limit,
            limit_corrupted=config.evaluation.limit_corrupted,
            seed=config.run.seed,
            tokenizer=config.dat.tokenizer,
            batch_size=batch_size,
            device=context.device,
            data_path=config.data.data_path,
        )
        setup = EvaluationSetup(
            options,
            context.output,
            console=console,
            world=context.world,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            command="finetune --eval",
        )
        results = run_evaluation(
            [network],
            settings,
            requested=config.evaluation.suite,
            setup=setup,
            title=f"Robustness of {network.name}",
        )
        if context.world.main:
            print_headline(results)


def require_color(in_chans: int) -> None:
    """Raise ConfigError for a classifier of gray images: the corruptions are defined for color."""
    if in_chans != 3:
        raise ConfigError(f"corruptions are defined for color images, not for --in_chans {in_chans}.")


def main(config: FinetuneConfig) -> None:
    """Run `mae-dat finetune --eval`."""
    evaluate_checkpoint(config, console_for_command())


def evaluated_config(file: ModelFile, config: FinetuneConfig) -> FinetuneConfig:
    """Return the settings to evaluate a file with: what it records replaces the flags.

    The flag of the image size wins where it was given. Raises CheckpointError for a pretraining.
    """
    facts, source = file.facts, config.run.resume
    if facts.get("kind") == "mae" or "mask_ratio" in facts:
        raise CheckpointError(
            f"--resume {source} is a pretraining, which has no classes yet: fine-tune it first, "
            f"with --finetune {source}."
        )
    data, classifier = config.data, config.classifier
    if data.input_size == DataConfig().input_size:
        data = dataclasses.replace(data, input_size=tuple(facts.get("input_size", data.input_size)))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, in_chans=facts.get("in_chans", data.in_chans)),
        classifier=dataclasses.replace(
            classifier,
            model=facts.get("model", classifier.model),
            nb_classes=classifier.nb_classes or facts.get("nb_classes"),
        ),
    )
