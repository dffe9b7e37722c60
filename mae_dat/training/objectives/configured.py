"""The objective of a fine-tuning, as its flags describe it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_dat.attacks.pixel import PixelAttack
from mae_dat.config.errors import DataError
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.adversaries import StoredPairs
from mae_dat.data.image_set import ImageSet
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.inputs import list_names
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.consistency import AugMix, ConsistentDAT
from mae_dat.training.objectives.dat import open_tokenizer, with_dat
from mae_dat.training.objectives.pixel import WithPixelAdversary
from mae_dat.training.objectives.stored import WithStoredAdversary, WithTeacher


def classification_objective(
    config: FinetuneConfig,
    classes: int,
    device: torch.device,
    weights: Tensor | None = None,
    images: ImageSet | None = None,
) -> Objective:
    """Return the configured objective: the loss of clean images or views, with DAT or one of its baselines.

    `weights` (K,) are those of the classes; a teacher and stored adversaries need the training `images`.
    """
    baselines, attack = config.baselines, config.dat.attack
    if baselines.jsd:
        return AugMix(config.augment, classes, baselines.jsd)
    weights = weights if weights is None else weights.to(device)
    if baselines.teacher:
        objective: Classification = with_teacher(config, images.classes if images else [], classes, device, weights)
    else:
        objective = Classification(config.augment, classes, config.loss.loss == "bce", weights)
    if isinstance(images, StoredPairs):
        return WithStoredAdversary(objective, config.dat.batch_share, images.describe())
    if baselines.at != "none":
        pixel_attack = PixelAttack(
            baselines.eps, baselines.step, baselines.at_steps, norm=baselines.at_norm, random_start=True
        )
        schedule = (config.dat.hold_epochs, config.dat.ramp_epochs)
        return WithPixelAdversary(objective, pixel_attack, baselines.clean_weight, *schedule)
    if baselines.dat_jsd and attack:
        tokenizer = open_tokenizer(config.dat, config.data, device)
        return ConsistentDAT(tokenizer, attack, objective, baselines.dat_jsd)
    return with_dat(objective, config.dat, config.data, device)


def with_teacher(
    config: FinetuneConfig, names: Sequence[str], classes: int, device: torch.device, weights: Tensor | None
) -> WithTeacher:
    """Open the teacher and return the objective that learns from it. Raises UserError for one of other classes."""
    baselines = config.baselines
    assert baselines.teacher is not None
    opened = open_model(baselines.teacher, img_size=config.data.image_size, flag="--teacher")
    outputs = teacher_outputs(opened, names, classes)
    return WithTeacher(
        config.augment,
        classes,
        opened.classifier().to(device),
        outputs,
        binary=config.loss.loss == "bce",
        class_weights=weights,
        weight=baselines.teacher_weight,
        temperature=baselines.teacher_temperature,
    )


def teacher_outputs(opened: OpenedModel, names: Sequence[str], classes: int) -> list[int]:
    """Return the teacher's output for each class of the images. Raises DataError if it lacks one.

    Without stored names, a teacher with as many outputs has them in the same order.
    """
    if opened.classes is None:
        if opened.plan.num_classes == classes:
            return list(range(classes))
        raise DataError(
            f"--teacher {opened.title} has {opened.plan.num_classes} outputs without names, and the images have "
            f"{classes} classes: use a teacher of the same classes."
        )
    if missing := [name for name in names if name not in opened.classes]:
        raise DataError(
            f"--teacher {opened.title} does not know the class {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; it was trained on {list_names(opened.classes)}. Use a teacher of the same classes."
        )
    if len(names) != classes:
        raise DataError(f"--teacher {opened.title} has no output for the unused classes of --nb_classes {classes}.")
    return [opened.classes.index(name) for name in names]
