"""One session of a training: resumes or starts it in its output folder, and trains to the end."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mae_dat.config.errors import OutputError
from mae_dat.config.groups import DataConfig, OptimConfig
from mae_dat.config.memory import memory_errors_name_flags
from mae_dat.config.parse import command_line
from mae_dat.config.yaml_files import settings_text
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import ImageLoader, train_loader
from mae_dat.data.open import describe_images
from mae_dat.data.sampler import TrainSampler, steps_per_epoch
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.environment import code_facts
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.runtime.run_log import RunLog
from mae_dat.storage.checkpoint import Checkpoint
from mae_dat.storage.files import atomic_write, prepare_output_folder
from mae_dat.storage.output_lock import record_start
from mae_dat.training.context import RunContext
from mae_dat.training.describe import add_device, add_resumed_weights, add_run_output
from mae_dat.training.export import set_aside_exports
from mae_dat.training.loop import Trainer
from mae_dat.training.resume import (
    SettingChange,
    checkpoint_to_resume,
    content_facts,
    keep_global_batch,
    restore_progress,
)
from mae_dat.training.setup import Reporting, TrainingSetup
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)


class TrainingRecord(NamedTuple):
    """With which settings a run was trained to its end, and which of them were changed on the way."""

    settings: dict[str, Any]
    changes: list[SettingChange]


def run_training(  # noqa: PLR0913 - keywords
    state: TrainingState,
    images: ImageSet,
    context: RunContext,
    *,
    data: DataConfig,
    optim: OptimConfig,
    settings: Mapping[str, Any],
    inputs: Callable[[], InputSummary],
    reporting: Reporting,
    validation: ImageSet | None = None,
    trainer_class: type[Trainer] = Trainer,
    epoch_steps: int | None = None,
) -> TrainingRecord:
    """Resume or start a training in the output folder, and train to the end.

    `settings` are all settings of the run by flag, for its manifests and config.yaml. `validation` are the images by
    which the run is measured between its epochs. `inputs` returns the summary of
    what the run reads; rank 0 calls it, and adds the device and the output folder. `epoch_steps` are the updates of an
    epoch, by default as many as its images fill. Raises what `Trainer.run` raises, and ConfigError, CheckpointError,
    DataError, NoProgressError and StorageError before the first step.
    """
    weights_flag = "--init" if "init" in settings else "--finetune"
    checkpoint = on_main_rank(lambda: checkpoint_to_resume(context.run, context.output, weights_flag))
    optim = keep_global_batch(optim, checkpoint, context.world.size)
    epoch_steps = epoch_steps or steps_per_epoch(len(images), optim.batch_size, context.world.size, optim.accum_iter)
    manifest = _manifest(settings, images, optim, context.world.size)
    manifest |= on_main_rank(lambda: content_facts(settings, images, state.objective, checkpoint, validation))
    state.step = context.run.start_epoch * epoch_steps
    record = TrainingRecord(dict(settings), [])
    if checkpoint:
        record.changes.extend(restore_progress(state, checkpoint, manifest, epoch_steps=epoch_steps, context=context))
    manifest["changes"] = record.changes
    total_steps = optim.total_epochs * epoch_steps
    on_main_rank(lambda: _report_inputs(inputs(), context, checkpoint, state.step, total_steps, data.num_workers))
    if state.step >= total_steps:
        logger.info("%s is complete (%s): nothing left to train.", context.run.output_dir, count_of(state.step, "step"))
        before = checkpoint.manifest if checkpoint else {}
        return TrainingRecord(dict(before.get("settings", settings)), list(before.get("changes", [])))
    with contextlib.closing(_start_log(context, settings, state.step)) as log:
        setup = TrainingSetup(
            context=context,
            optim=optim,
            loader=_loader(images, context, data, optim, first_step=state.step, epoch_steps=epoch_steps),
            steps_per_epoch=epoch_steps,
            log=log,
            reporting=reporting,
            manifest=manifest,
            name_of=images.name_of,
        )
        with memory_errors_name_flags(settings):
            trainer_class(state, setup).run()
    return record


def _report_inputs(
    inputs: InputSummary, context: RunContext, checkpoint: Checkpoint | None, step: int, total_steps: int, workers: int
) -> None:
    """Log the summary of the inputs, and store it unless nothing is left to train. Raises StorageError."""
    add_device(inputs, context, workers)
    add_resumed_weights(inputs, context, checkpoint)
    add_run_output(inputs, context, checkpoint, step, total_steps)
    context.console.report_inputs(inputs, context.output / INPUTS_FILE if step < total_steps else None)


def _manifest(settings: Mapping[str, Any], images: ImageSet, optim: OptimConfig, ranks: int) -> dict[str, Any]:
    """Return what every checkpoint's manifest records about the run."""
    return {
        "settings": settings,
        "images": describe_images(images),
        "ranks": ranks,
        "global_batch": optim.batch_size * optim.accum_iter * ranks,
        "code": code_facts(),
    }


def _record_start(output: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Record that training starts at a step, and with which settings. Raises NoProgressError, StorageError."""
    record_start(output, step)
    set_aside_exports(output)
    with atomic_write(output / "config.yaml") as file:
        file.write(settings_text(settings, command_line()).encode(errors="backslashreplace"))


def _loader(
    images: ImageSet, context: RunContext, data: DataConfig, optim: OptimConfig, first_step: int, epoch_steps: int
) -> ImageLoader:
    """Open the loader of this rank's micro-batches of all steps from `first_step` on."""
    sampler = TrainSampler(
        len(images),
        optim.batch_size,
        rank=context.world.rank,
        world_size=context.world.size,
        seed=context.run.seed,
        start_step=first_step,
        total_steps=optim.total_epochs * epoch_steps,
        accum_iter=optim.accum_iter,
        order=images.epoch_order,
    )
    pinned = data.pin_mem and context.device.type == "cuda"
    return train_loader(images, sampler, data.num_workers, pin_memory=pinned)


def _start_log(context: RunContext, settings: Mapping[str, Any], step: int) -> RunLog:
    """Record that training starts at a step, and open its log, to which only rank 0 writes.

    Raises OutputError, NoProgressError, StorageError.
    """
    on_main_rank(lambda: _record_start(context.output, step, settings))
    return RunLog(
        context.output,
        _log_folder(context.run.log_dir),
        step,
        enabled=context.world.main,
    )


def _log_folder(log_dir: str | None) -> Path | None:
    """Create and check the folder that `--log_dir` names; None for the output folder. Raises OutputError."""
    if not log_dir:
        return None
    try:
        return prepare_output_folder(Path(log_dir))
    except OutputError as error:
        raise OutputError(f"--log_dir: {error}") from error
