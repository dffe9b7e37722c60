"""Fine-tuning of a classifier, plainly or with DAT, and linear probes (`main_finetune.py`)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae_dat.config.adversaries import describe_schedule
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.flags import flat_values
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, DataConfig, OptimConfig
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.adversaries import StoredPairs
from mae_dat.data.describe import add_images, describe_resize
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import ImageLoader, eval_loader
from mae_dat.data.open import (
    decode_channels,
    image_root,
    open_images,
    training_images,
    warn_of_packed_size,
    with_channels,
)
from mae_dat.data.transforms import EvalTransform, finetune_transform
from mae_dat.models.classifier import Classifier, build_classifier, fused_head
from mae_dat.models.describe import WeightsOrigin, describe_model, timm_origin
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.split_norms import auxiliary_norms, main_norms, split_norms
from mae_dat.models.weights.load import load_pretrained
from mae_dat.models.weights.read import errors_name_flag, read_model_file
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import InputSummary
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything, step_generator
from mae_dat.runtime.sharding import full_state_dict
from mae_dat.training.accuracy import evaluate_accuracy, evaluate_classes
from mae_dat.training.class_weights import class_weights
from mae_dat.training.context import RunContext, prepare_model, run_context
from mae_dat.training.describe import (
    add_adversary,
    add_on_bad,
    add_pixels,
    describe_augmentation,
    describe_loss,
    describe_trained,
)
from mae_dat.training.export import export_model
from mae_dat.training.frozen_start import freeze_parts
from mae_dat.training.galleries import adversary_gallery, galleries_due, show_galleries
from mae_dat.training.next_commands import after_finetuning, log_next_commands
from mae_dat.training.normalization import warn_of_normalization
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.configured import classification_objective
from mae_dat.training.objectives.consistency import AUGMIX_VIEWS
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.optim import build_optimizer, effective_lr
from mae_dat.training.resume import SettingChange
from mae_dat.training.session import run_training
from mae_dat.training.setup import Reporting, ShownScore
from mae_dat.training.state import TrainingState
from mae_dat.training.validation import report_classes

logger = logging.getLogger(__name__)

_GALLERY_IMAGES = 6
_SLOW_LARS = 0.5  # MAE's linear probe has 6.4


def run_finetuning(config: FinetuneConfig, console: Console, title: str = "fine-tune") -> dict[str, float]:
    """Fine-tune, or resume in the output folder, export the classifier, and return its accuracy on the validation split
    (`evaluate_accuracy`)."""
    check_mixup(config.augment, config.optim.batch_size)
    settings, data, seed = config.classifier, config.data, config.run.seed
    with run_context(config.run, config.launch, console) as context:
        images, validation = labeled_images(config)
        if stored := config.dat.stored:
            images = StoredPairs(images, stored)
        classes = class_count(settings.nb_classes, images)
        seed_everything(seed)
        warn_of_slow_lars(settings.opt, config.optim, context.world.size)
        images.is_balanced = config.loss.sampler == "balanced"
        weights = class_weights(config.loss.class_weights, images, classes)
        state, origin = build_state(config, classes, context, weights, validation, images)
        loader = validation_loader(validation, 2 * config.optim.batch_size, data, context)
        # Evenly spaced, but unlike `evenly_spaced` always six: in a split of fewer images some are taken twice.
        samples = [validation[index * len(validation) // _GALLERY_IMAGES] for index in range(_GALLERY_IMAGES)]

        def at_epoch_end(state: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
            if galleries_due(epoch, context):
                galleries = draw_validation_adversary(
                    state.model, state.objective, samples=samples, seed=seed, device=context.device
                )
                show_galleries(galleries, context, log, state.step)
            return evaluate_accuracy(state.averaged, loader, context.device, context.precision)

        record = run_training(
            state,
            images,
            context,
            data=data,
            optim=config.optim,
            settings=flat_values(config),
            inputs=lambda: finetuning_inputs(config, state, images, validation, origin),
            reporting=Reporting(title, at_epoch_end, ShownScore("test_acc1", "val acc1")),
            validation=validation,
        )
        unused = [f"unused {number}" for number in range(len(images.classes), classes)]
        facts = {**classifier_facts(settings, data, [*images.classes, *unused]), "nb_classes": classes}
        export_classifier(state, context, facts, record.changes)
        final = evaluate_classes(state.averaged, loader, context.device, context.precision)
        report_classes(final, images.classes, context.output)
        return final.scores


def export_classifier(
    state: TrainingState, context: RunContext, facts: Mapping[str, Any], changes: Sequence[SettingChange] = ()
) -> None:
    """Export the averaged classifier of a finished training, with `facts` about it.

    A linear probe's head becomes one layer, and auxiliary norms are left out.
    """
    classifier = state.averaged
    assert isinstance(classifier, Classifier)
    tensors = main_norms(fused_head(full_state_dict(classifier.net.state_dict())))
    export_model(tensors, context, {**facts, "averaged": state.ema is not None, "steps": state.step}, changes)


def build_state(
    config: FinetuneConfig,
    classes: int,
    context: RunContext,
    weights: Tensor | None = None,
    validation: ImageSet | None = None,
    images: ImageSet | None = None,
) -> tuple[TrainingState, WeightsOrigin | None]:
    """Build the model with the weights to start from, its average, the objective and the optimizer.

    Also returns where the weights came from, None for random ones. The normalization of weights with these classes is
    checked on `validation` images if their file does not record it. Raises MissingInputError, CheckpointError,
    ConfigError.
    """
    settings = config.classifier
    model = build_configured_classifier(settings, config.data, classes, settings.pretrained)
    origin = initialize(model, settings)
    model.to(context.device)
    if validation is not None and origin and not origin.normalization_is_known and config.data.in_chans == 3:
        name = Path(origin.source).name
        on_main_rank(lambda: warn_of_normalization(name, model, validation, context.device))
    if config.baselines.splits_norms:
        split_norms(model)
    frozen_start = freeze_parts(model, settings)
    model.to(context.device)
    objective = classification_objective(config, classes, context.device, weights, images)
    ema = ModelEmaV3(model, decay=settings.ema_decay) if settings.ema_decay else None
    prepare_model(model, context, ema.module if ema else None)
    # The learning rate is set in every step.
    optimizer = build_optimizer(model, 0.0, config.optim.weight_decay, settings.layer_decay, opt=settings.opt)
    return TrainingState(model, optimizer, objective, ema, frozen_start), origin


def check_mixup(augment: AugmentConfig, batch_size: int) -> None:
    """Check that mixup and cutmix can pair the images of a batch. Raises ConfigError before anything is read."""
    mixes = augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None
    if mixes and batch_size % 2:
        raise ConfigError(f"mixup and cutmix pair the images of a batch: --batch_size must be even, got {batch_size}.")


def warn_of_slow_lars(opt: str, optim: OptimConfig, ranks: int) -> None:
    """Warn where LARS would hardly train: it moves a tensor by lr / 1000 of its norm, and a rate that is scaled down
    for a small batch leaves the tensor where it is."""
    batch = optim.batch_size * optim.accum_iter * ranks
    lr = effective_lr(optim.lr, optim.blr, batch)
    if opt == "lars" and lr < _SLOW_LARS:
        logger.warning(
            "--opt lars at a peak rate of %.3g hardly moves: blr 0.1 is meant for batches of some thousand images, and "
            "this one has %d. Give --opt sgd, or a larger --blr.",
            lr,
            batch,
        )


def labeled_images(config: FinetuneConfig) -> tuple[ImageSet, ImageSet]:
    """Open the training images, augmented, and the validation images, with the same classes.

    Raises ConfigError for an unknown --aa or --remode.
    """
    augment = config.augment
    try:
        transform = finetune_transform(
            config.data.image_size,
            aa=augment.aa,
            color_jitter=augment.color_jitter,
            crop_scale=augment.crop_scale,
            interpolation=augment.train_interpolation,
            reprob=augment.reprob,
            remode=augment.remode,
            recount=augment.recount,
            views=AUGMIX_VIEWS if config.baselines.jsd else 1,
            resplit=augment.resplit,
        )
    except (AssertionError, ValueError) as error:  # timm asserts what its users write
        raise ConfigError(f"--aa {augment.aa}, --remode {augment.remode}: {error}; see --help.") from error
    outputs = config.classifier.nb_classes
    images = training_images(config.data, transform, config.run.seed, labeled=True, outputs=outputs)
    if sum(count > 0 for count in images.class_counts()) < 2:
        raise DataError(
            f"{images.root} has images of a single class: its loss is 0 and nothing can be learned; add the images of "
            "another class, such as what is not in the first."
        )
    return images, validation_images(config.data, images.classes)


def validation_images(data: DataConfig, classes: list[str] | None = None) -> ImageSet:
    """Open the validation split, without augmentation. `classes` are those of the training split."""
    root = find_split(image_root(data.data_path), "val")
    transform = with_channels(EvalTransform(data.image_size), data.in_chans)
    images = open_images(root, transform, classes=classes, on_bad=data.on_bad)
    decode_channels(images, data.in_chans)
    warn_of_packed_size(images)
    return images


def validation_loader(images: ImageSet, batch_size: int, data: DataConfig, context: RunContext) -> ImageLoader:
    """Return a loader of this rank's share of the validation images."""
    return eval_loader(
        images,
        batch_size,
        rank=context.world.rank,
        world_size=context.world.size,
        num_workers=data.num_workers,
        pin_memory=data.pin_mem and context.device.type == "cuda",
    )


def class_count(nb_classes: int | None, images: ImageSet) -> int:
    """Return the number of classes of the head: `--nb_classes`, by default one for each class folder.

    Raises DataError when `--nb_classes` is below the number of class folders.
    """
    folders = len(images.classes)
    if nb_classes is not None and nb_classes < folders:
        raise DataError(
            f"{images.root} has {folders} class folders, --nb_classes is {nb_classes}: leave it out, or remove folders."
        )
    return nb_classes or folders


def build_configured_classifier(
    settings: ClassifierConfig, data: DataConfig, classes: int, pretrained: bool = False
) -> Classifier:
    """Build the classifier that the flags describe, with timm's weights if `pretrained`.

    Raises ConfigError, also where timm cannot build it.
    """
    try:
        return build_classifier(
            settings.model,
            classes,
            data.image_size,
            drop_path=settings.drop_path,
            global_pool=settings.mean_pool,
            in_chans=data.in_chans,
            pretrained=pretrained,
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, data.image_size))
        raise ConfigError(f"--model {settings.model} cannot be built for {size} px: {error}") from error


def classifier_facts(settings: ClassifierConfig, data: DataConfig, classes: list[str]) -> dict[str, Any]:
    """Return what it takes to rebuild the classifier, for its exported weights; `classes` are the folders' names."""
    return {
        "kind": "classifier",
        "model": settings.model,
        "global_pool": settings.mean_pool,
        "classes": classes,
        "input_size": list(data.image_size),
        "in_chans": data.in_chans,
    }


def draw_validation_adversary(
    model: nn.Module, objective: Objective, samples: list[Any], seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Draw the adversary of the current model on validation images, as a gallery (3, H, W) in [0, 1]; none without DAT.

    The images and the adversary's randomness are the same after every epoch. The adversary uses the norms of
    adversarial views where the model has them.
    """
    if not (isinstance(objective, WithDAT) and objective.strength_is_known):
        return {}
    image: Tensor = torch.stack([sample["image"] for sample in samples]).to(device)
    label = torch.tensor([sample["label"] for sample in samples], device=device)
    target = torch.nn.functional.one_hot(label, objective.objective.num_classes).float()  # type: ignore[attr-defined]
    generator = step_generator(seed, 0, 0, device)
    with evaluation_mode(model), auxiliary_norms(model):
        adversary = objective.adversary(model, image, target, generator)
    return {"adversary": adversary_gallery(image, adversary)}


def initialize(model: Classifier, settings: ClassifierConfig) -> WeightsOrigin | None:
    """Load the weights that the flags start from; for a linear probe freeze them and put a new head on top.

    Returns where the weights came from, None for random ones. Raises MissingInputError, CheckpointError, ConfigError.
    """
    origin = None
    if settings.finetune:
        origin = initialize_from(model, settings.finetune)
    elif settings.pretrained:
        origin = timm_origin(model)
    if settings.linear_probe:
        model.make_linear_probe()
    return origin


def initialize_from(model: Classifier, source: str | Path) -> WeightsOrigin:
    """Load pretrained weights from a file, an output folder or by their released name; return where they came from.

    Raises MissingInputError, CheckpointError, DownloadError.
    """
    with errors_name_flag("--finetune"):
        file = read_model_file(source)
        report = load_pretrained(model, file)
    is_known = bool(file.facts or file.statistics) or not report.has_head
    return replace(file.origin, normalization_is_known=is_known)


def finetuning_inputs(
    config: FinetuneConfig,
    state: TrainingState,
    images: ImageSet,
    validation: ImageSet,
    origin: WeightsOrigin | None,
) -> InputSummary:
    """Return the summary of what a fine-tuning reads; `origin` is that of the weights it starts from."""
    data, settings, model = config.data, config.classifier, state.model
    inputs = InputSummary(config.verb)
    add_images(inputs, data.data_path, image_root(data.data_path), {"training": images, "validation": validation})
    add_on_bad(inputs, data.on_bad)
    classes = class_count(settings.nb_classes, images)
    inputs.add("model", describe_model(settings.model, model, classes))
    if classes > len(images.classes):
        inputs.add("classes", f"outputs {len(images.classes)} to {classes - 1} have no folder (--nb_classes)")
    inputs.add(
        "weights",
        origin.describe() if origin else "random (no --finetune, no --pretrained)",
    )
    inputs.add("trained", *describe_trained(settings, model))
    inputs.add("loss", describe_loss(config.loss))
    add_pixels(
        inputs,
        data,
        model,
        f"training: {describe_augmentation(config.augment)}",
        f"validation: {describe_resize(EvalTransform(data.image_size))}",
    )
    schedule = (
        describe_schedule(config.dat.hold_epochs, config.dat.ramp_epochs) if config.baselines.at != "none" else []
    )
    add_adversary(inputs, config.dat, state.objective, ", ".join([config.baselines.describe(), *schedule]).strip(", "))
    return inputs


def main(config: FinetuneConfig) -> None:
    """Run the command, and log the accuracy of the result and what to do with it."""
    scores = run_finetuning(config, console_for_command())
    logger.info(
        "val acc1 %.2f %%, acc5 %.2f %%, balanced_acc %.2f %%",
        scores["test_acc1"],
        scores["test_acc5"],
        scores["test_balanced_acc"],
    )
    log_next_commands(config.run.output_dir, after_finetuning(config.run.output_dir, config.data))
