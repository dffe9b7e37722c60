"""Train an object detector, plainly or with DAT, and measure it.

`mae-dat detect --data_path DIR ... --output_dir OUT`: DIR is in COCO's format (docs/how-to/detect.md). The adversary of
`--dat` raises the detector's total loss. To resume, run the same command again. `--eval --resume OUT` measures the
average precision; with `--corrupted`, also under 15 corruptions.
"""

import dataclasses
import logging
from typing import Any, Literal

from mae_dat.config.commands.detect import DetectConfig
from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.extras import require_extra
from mae_dat.config.flags import flat_values
from mae_dat.config.terminal import print_text
from mae_dat.data.decode import decoding_settings
from mae_dat.data.file_facts import content_sha256
from mae_dat.data.loader import eval_loader
from mae_dat.data.open import describe_images, image_root
from mae_dat.detection.box_gallery import draw_detections
from mae_dat.detection.coco import BoxTransform, CocoImages, find_annotations
from mae_dat.detection.describe import measurement_inputs, training_inputs
from mae_dat.detection.measure import DETECTION_METRICS, average_precision, measure_corruptions, print_corruption_table
from mae_dat.detection.objective import DetectionObjective
from mae_dat.models.classifier import Classifier
from mae_dat.models.describe import WeightsOrigin
from mae_dat.models.detector import Detector, build_detector, build_trunk
from mae_dat.models.mae import VIT_SIZES
from mae_dat.models.weights.open import open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.robustness.fingerprints import state_sha256
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import INPUTS_FILE
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything
from mae_dat.runtime.sharding import full_state_dict
from mae_dat.runtime.world import world_from_environment
from mae_dat.training.context import RunContext, prepare_model, run_context
from mae_dat.training.describe import add_device
from mae_dat.training.export import export_model
from mae_dat.training.finetune import initialize_from
from mae_dat.training.galleries import galleries_due, show_galleries
from mae_dat.training.next_commands import after_detection, log_next_commands
from mae_dat.training.objectives.dat import with_dat
from mae_dat.training.optim import build_optimizer
from mae_dat.training.session import run_training
from mae_dat.training.setup import Reporting, ShownScore
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)


def detect(config: DetectConfig, console: Console) -> dict[str, float]:
    """Train or resume, export the detector, and return its average precision (see `coco_scores`).

    Raises MissingInputError without the packages that measure it.
    """
    require_extra("detection", "training a detector")
    with run_context(config.run, config.launch, console) as context:
        images = open_coco_images(config, "train")
        validation = open_coco_images(config, "val", images.classes)
        seed_everything(config.run.seed)
        model, weights = start_detector(config, len(images.classes))
        model = model.to(context.device)
        objective = with_dat(DetectionObjective(), config.dat, config.data, context.device, pad=True)
        prepare_model(model, context)
        settings = config.detector
        decay = settings.layer_decay if settings.model in VIT_SIZES else None
        optimizer = build_optimizer(model, 0.0, config.optim.weight_decay, decay, opt=settings.opt)
        state = TrainingState(model, optimizer, objective)
        last_epoch = config.optim.total_epochs - 1

        def at_epoch_end(state: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
            if galleries_due(epoch, context):
                gallery = draw_detections(model, objective, validation, seed=config.run.seed, device=context.device)
                show_galleries({"boxes": gallery}, context, log, state.step)
            if (epoch + 1) % config.measure.eval_every and epoch != last_epoch:
                return {}
            scores = _validation_scores(model, validation, config, context)
            return {f"test_{name}": value for name, value in scores.items()}

        record = run_training(
            state,
            images,
            context,
            data=config.data,
            optim=config.optim,
            settings=flat_values(config),
            inputs=lambda: training_inputs(config, model, objective, images, validation, weights),
            reporting=Reporting("detect", at_epoch_end, ShownScore("test_map", "val mAP", 100)),
            validation=validation,
        )
        facts = {**_detector_facts(config, images.classes), "steps": state.step}
        export_model(full_state_dict(model.net.state_dict()), context, facts, record.changes)
        return _validation_scores(model, validation, config, context)


def measure_detector(config: DetectConfig, console: Console) -> dict[str, Any]:
    """Measure the average precision of the detector in `--resume`; with `--corrupted` see `measure_corruptions`."""
    require_extra("detection", "mAP")
    if config.run.resume is None:
        raise ConfigError("--eval needs --resume with a detector: an output folder or its weights.")
    with run_context(config.run, config.launch, console, training=False) as context:
        file = read_model_file(config.run.resume)
        if file.kind != "detector":
            raise CheckpointError(f"--resume {config.run.resume} is not a detector of mae-dat detect: train one first.")
        opened = open_model(file)
        # Boxes are in pixels at the size of the training.
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, input_size=opened.input_size),
            detector=dataclasses.replace(config.detector, model=opened.plan.name),
        )
        model, facts = opened.to(context.device).model, opened.facts
        validation = open_coco_images(config, "val", facts["classes"])
        on_main_rank(lambda: _report_inputs(config, context, model, validation, file.origin))
        if not config.measure.corrupted:
            return _validation_scores(model, validation, config, context)
        protocol = {
            **facts,
            "weights": state_sha256(model),
            "pictures": describe_images(validation),
            "content": content_sha256(validation.content_files()),
            "severities": config.measure.severities,
            "seed": config.run.seed,
            "precision": str(context.precision),
            **decoding_settings(),
        }
        return measure_corruptions(
            model,
            validation,
            config.measure.severities,
            batch_size=config.optim.batch_size,
            num_workers=config.data.num_workers,
            context=context,
            protocol=protocol,
            console=console,
        )


def _report_inputs(
    config: DetectConfig, context: RunContext, model: Detector, validation: CocoImages, origin: WeightsOrigin
) -> None:
    """Log what a measurement reads; store it beside detection.json, if that is written. Raises StorageError."""
    inputs = measurement_inputs(config, model, validation, origin.describe())
    add_device(inputs, context, config.data.num_workers)
    path = None
    if config.measure.corrupted:
        path = context.output / f"detection.json.{INPUTS_FILE}"
        inputs.add("output", str((context.output / "detection.json").absolute()))
    context.console.report_inputs(inputs, path)


def open_coco_images(
    config: DetectConfig, split: Literal["train", "val"], classes: list[str] | None = None
) -> CocoImages:
    """Open a split of the data: augmented for training; for validation unaugmented, and at most --limit images."""
    if config.data.in_chans != 3:
        raise ConfigError(f"--in_chans {config.data.in_chans}: detectors need 3 channels.")
    scale_jitter = config.detector.scale_jitter if split == "train" else None
    images = CocoImages(
        find_annotations(image_root(config.data.data_path), split),
        BoxTransform(config.data.image_size, scale_jitter),
        classes=classes or (),
        on_bad=config.data.on_bad,
        seed=config.run.seed,
    )
    return images if split == "train" else images.limited(config.measure.limit)


def start_detector(config: DetectConfig, num_classes: int) -> tuple[Detector, str]:
    """Build the detector with the weights that the flags name, and return where these came from, in words."""
    settings = config.detector
    if settings.model not in VIT_SIZES:
        weights = "torchvision's, of the backbone" if settings.pretrained else "random (no --pretrained)"
        return build_configured_detector(config, num_classes, pretrained=settings.pretrained), weights
    trunk = build_trunk(settings.model, config.data.image_size, settings.drop_path)
    origin = initialize_from(trunk, settings.finetune) if settings.finetune else None
    weights = origin.describe() if origin else "random (no --finetune)"
    return build_configured_detector(config, num_classes, trunk=trunk), weights


def build_configured_detector(
    config: DetectConfig, num_classes: int, pretrained: bool = False, trunk: Classifier | None = None
) -> Detector:
    """Build the detector that the flags describe, on a transformer that `trunk` provides, or with torchvision's
    backbone, whose weights are torchvision's if `pretrained`."""
    settings = config.detector
    if settings.model in VIT_SIZES and trunk is None:
        trunk = build_trunk(settings.model, config.data.image_size, settings.drop_path)
    return build_detector(
        settings.model,
        num_classes,
        config.data.image_size,
        width=settings.width,
        anchor_size=settings.anchor_size,
        regions=settings.regions,
        pretrained_backbone=pretrained,
        trunk=trunk,
    )


def _detector_facts(config: DetectConfig, classes: list[str]) -> dict[str, Any]:
    """Return the facts to rebuild the detector, which are stored with its weights."""
    settings = config.detector
    return {
        "kind": "detector",
        "model": settings.model,
        "classes": classes,
        "input_size": list(config.data.image_size),
        "width": settings.width,
        "anchor_size": settings.anchor_size,
        "regions": settings.regions,
    }


def _validation_scores(
    model: Detector, images: CocoImages, config: DetectConfig, context: RunContext
) -> dict[str, float]:
    """Compute `coco_scores` of the validation images. Collective."""
    loader = eval_loader(
        images,
        batch_size=config.optim.batch_size,
        rank=context.world.rank,
        world_size=context.world.size,
        num_workers=config.data.num_workers,
    )
    return average_precision(model, loader, context)


def main(config: DetectConfig) -> None:
    """Run the command."""
    console = console_for_command()
    result = measure_detector(config, console) if config.measure.eval else detect(config, console)
    if not world_from_environment().main:
        return
    if config.measure.eval and config.measure.corrupted:
        print_corruption_table(result, config.measure.severities)
    else:
        print_scores(result)
    if not config.measure.eval:
        log_next_commands(config.run.output_dir, after_detection(config.run.output_dir, config.data))


def print_scores(result: dict[str, float]) -> None:
    """Print the average precision in percent on one line."""
    print_text(", ".join(f"{name} {100 * result[name]:.1f} %" for name in DETECTION_METRICS))
