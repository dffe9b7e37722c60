"""What pretraining and fine-tuning share: joining the world, resuming, the loop, exported weights."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_dat.config.errors import OutputError
from mae_dat.config.groups import RunConfig
from mae_dat.config.parse import flat_values, write_config
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import train_loader
from mae_dat.data.open import describe_images
from mae_dat.data.sampler import TrainSampler, steps_per_epoch
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console
from mae_dat.runtime.environment import code_facts
from mae_dat.runtime.run_log import RunLog
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.output_lock import record_start
from mae_dat.training import loop as engine
from mae_dat.training.context import RunContext
from mae_dat.training.loop import Job
from mae_dat.training.resume import checkpoint_to_resume, keep_global_batch, restore_progress
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)


def train(
    training: TrainingState,
    images: ImageSet,
    context: RunContext,
    config: Any,
    console: Console,
    title: str,
    at_epoch_end: Callable[[TrainingState, int, RunLog], dict[str, float]],
    scalar_tags: dict[str, str],
) -> None:
    """Resumes or starts, and trains to the end. `config` has the groups run, data and optim."""
    run: RunConfig = config.run
    world = context.world
    found = on_main_rank(lambda: checkpoint_to_resume(run, context.output))
    optim = keep_global_batch(config.optim, found, world.size)
    shares = (optim.batch_size, world.size, optim.accum_iter)
    epoch_steps = steps_per_epoch(len(images), *shares)
    restore_progress(training, found, config, images, math.prod(shares), context)
    total = optim.total_epochs * epoch_steps
    if training.step >= total:
        logger.info("%s is complete (%d steps): nothing left to train.", run.output_dir, training.step)
        return
    on_main_rank(lambda: begin(config, context.output, training.step))
    order = (world.rank, world.size, run.seed, training.step, total, optim.accum_iter, images.order)
    sampler = TrainSampler(len(images), optim.batch_size, *order)
    loader = train_loader(
        images, sampler, config.data.num_workers, config.data.pin_mem and context.device.type == "cuda"
    )
    again = 1000 * training.step // epoch_steps + 1
    log = RunLog(context.output, log_folder(run), training.step, enabled=world.main, purge_from=again)
    facts = {
        "settings": flat_values(config),
        "images": describe_images(images),
        "ranks": world.size,
        "global_batch": math.prod(shares),
        "code": code_facts(),
    }
    job = Job(
        run=run,
        optim=optim,
        loader=loader,
        steps_per_epoch=epoch_steps,
        world=world,
        device=context.device,
        precision=context.precision,
        console=console,
        log=log,
        title=title,
        facts=facts,
        at_epoch_end=at_epoch_end,
        scalar_tags=scalar_tags,
        name_of=images.name_of,
        guard=context.lease.check if context.lease else None,
    )
    try:
        engine.fit(training, job)
    finally:
        log.close()


def begin(config: Any, output: Path, step: int) -> None:
    """Notes that training starts at a step, and with which settings. Raises NoProgressError, StorageError."""
    record_start(output, step)
    write_config(config, output / "config.yaml")


def log_folder(run: RunConfig) -> Path | None:
    """The folder that `--log_dir` names, made and tried; None for the output folder. Raises OutputError."""
    if not run.log_dir:
        return None
    try:
        return prepare_output_folder(Path(run.log_dir))
    except OutputError as error:
        raise OutputError(f"--log_dir: {error}") from error
