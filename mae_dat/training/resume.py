"""Going on from a checkpoint: whether settings and images are those that it was made with, and the same global batch on
another number of ranks."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.groups import OptimConfig, RunConfig
from mae_dat.config.parse import flat_values
from mae_dat.data.image_set import ImageSet
from mae_dat.data.open import describe_images
from mae_dat.runtime.collectives import on_all_ranks
from mae_dat.runtime.environment import code_facts, describe_code
from mae_dat.runtime.world import World
from mae_dat.storage.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint, verify_checkpoint
from mae_dat.training.context import RunContext
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)

# Settings that may change on the way: they say where and how a run is computed, not what. All others change the result.
FREE_SETTINGS = {
    *("output_dir", "log_dir", "resume", "start_epoch", "deterministic", "save_minutes", "keep", "keep_every"),
    "checkpoint_activations",
    *("allow_change", "hang_minutes", "pictures_every"),
    *("data_path", "on_bad", "num_workers", "pin_mem"),
    *("eval", "dist_eval", "suite", "limit"),
    *("fsdp", "world_size", "local_rank", "dist_on_itp", "dist_url"),
}
BATCH_SETTINGS = {"batch_size", "accum_iter"}  # free as long as their product with the ranks, the global batch, is kept


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, each with its value before and now. What only one side has (another version's) is left
    out."""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    shared = [name for name in listed if name in before]
    return {name: (before[name], listed[name]) for name in shared if before[name] != listed[name]}


def check_changes(found: Checkpoint, now: dict[str, Any], images: str, batch: int, allowed: tuple[str, ...]) -> None:
    """Shows what differs from the checkpoint. Raises ConfigError when it changes the result and is not `allowed`, and
    CheckpointError for a checkpoint of another kind of run.

    `now` are the settings, `images` tells which the training images are, `batch` is the global batch.
    """
    before = found.manifest.get("settings", {})
    if before and ("mask_ratio" in before) != ("mask_ratio" in now):
        kinds = ("a pretraining", "a fine-tuning")
        was, is_now = kinds if "mask_ratio" in before else kinds[::-1]
        raise CheckpointError(
            f"{found.path} does not fit this run: it is {was}'s, not {is_now}'s. Use another --output_dir."
        )
    if unknown := sorted(set(allowed) - set(now) - {"images"}):
        raise ConfigError(f"--allow_change {' '.join(unknown)}: no such setting; see --help.")
    changed = changes(before, now)
    same_batch = found.manifest.get("global_batch", batch) == batch
    free = FREE_SETTINGS | (BATCH_SETTINGS if same_batch else set())
    if found.manifest.get("images", images) != images:
        changed["images"] = (found.manifest["images"], images)
    lines = [
        f"  --{name}: {old} before, {new} now" + ("" if name in free else "  (changes the result)")
        for name, (old, new) in changed.items()
    ]
    refused = [name for name in changed if name not in free and name not in allowed]
    describe_code = "\n".join([f"{found.path} was made with other settings:", *lines])
    if refused:
        raise ConfigError(
            f"{describe_code}\nTo go on all the same repeat the command with --allow_change {' '.join(refused)}; "
            "to start anew choose another --output_dir."
        )
    if lines:
        logger.warning("%s", describe_code)


def keep_global_batch(optim: OptimConfig, found: Checkpoint | None, ranks: int) -> OptimConfig:
    """The checkpoint's images per update on this number of ranks, in micro-batches no larger than `--batch_size`.

    Raises ConfigError when they cannot be shared out evenly. Where another `--batch_size` or `--accum_iter` is asked
    for than when the checkpoint was made, it is left as it is.
    """
    before = found.manifest if found else {}
    asked = {name: before.get("settings", {}).get(name) for name in BATCH_SETTINGS}
    whole: int = before.get("global_batch", 0)
    if (
        asked != {name: getattr(optim, name) for name in BATCH_SETTINGS}
        or whole == optim.batch_size * optim.accum_iter * ranks
    ):
        return optim
    share, rest = divmod(whole, ranks)
    sizes = [size for size in range(min(optim.batch_size, share), 0, -1) if share % size == 0]
    if rest or not sizes:
        raise ConfigError(
            f"{found.path if found else ''} was made with {whole} images per update, which {ranks} ranks cannot share "
            f"evenly: use {before['ranks']} ranks or another divisor of {whole}, or set --batch_size and --accum_iter."
        )
    # Mixup pairs the images of a micro-batch, so an even one stays even where that is possible.
    size = next((one for one in sizes if one % 2 == 0 or optim.batch_size % 2), sizes[0])
    kept = dataclasses.replace(optim, batch_size=size, accum_iter=share // size)
    logger.warning(
        "%d ranks instead of %d: %d images per update as before, now %d x %d x %d ranks.",
        *(ranks, before["ranks"], whole, kept.batch_size, kept.accum_iter, ranks),
    )
    return kept


def checkpoint_to_resume(run: RunConfig, output: Path) -> Checkpoint | None:
    """The newest valid checkpoint of the output folder; else the one that `--resume` names; else None. Raises
    CheckpointError for one of the first format."""
    own = newest_checkpoint(output)
    if own and run.resume:
        # A requeued job repeats its command line: what it has learned since counts, not where it began.
        logger.info("%s has a checkpoint of its own, which goes before --resume %s.", output, run.resume)
    found = own or (find_checkpoint(Path(run.resume)) if run.resume else None)
    if found and found.manifest["version"] < 2:
        raise CheckpointError(
            f"{found.path} has format {found.manifest['version']}, of a version of mae_dat that counted steps "
            f"otherwise: finish the run with that, or start a new one, in another --output_dir, from its weights with "
            f"--finetune {found.path}."
        )
    return found


def restore(training: TrainingState, found: Checkpoint, world: World) -> None:
    """Resumes from a checkpoint. Raises CheckpointError when it is of another model or kind of run."""
    try:
        # Every rank checks the file as it sees it: what rank 0 read whole may be old or torn on another machine.
        training.load_state_dict(verify_checkpoint(found.path.with_suffix(".json")).load(), world.rank, world.size)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{found.path} does not fit this run: {cause}. Use the settings it was made with (config.yaml beside it), "
            "or another --output_dir."
        ) from error
    logger.info("resuming from %s (epoch %.2f)", found.path, found.manifest.get("epoch", 0))


def restore_progress(
    training: TrainingState, found: Checkpoint | None, config: Any, images: ImageSet, batch: int, context: RunContext
) -> None:
    """Brings the training to where the checkpoint, if there is one, left it; `batch` is the global one. Raises
    ConfigError, CheckpointError."""
    epoch_steps, which = len(images) // batch, describe_images(images)
    training.step = config.run.start_epoch * epoch_steps
    if found is None:
        return
    check_changes(found, flat_values(config), which, batch, config.run.allow_change)
    warn_if_code_changed(found)
    on_all_ranks(lambda: restore(training, found, context.world))
    if (found.manifest.get("global_batch", batch), found.manifest.get("images", which)) != (batch, which):
        training.step = round(found.manifest["epoch"] * epoch_steps)


def warn_if_code_changed(found: Checkpoint) -> None:
    """A note where the package's sources are not those that the checkpoint was made with."""
    before, now = found.manifest.get("code", {}), code_facts()
    if before and before["sha256"] != now["sha256"]:
        logger.warning(
            "the code has changed since the checkpoint: %s before, %s now.", describe_code(before), describe_code(now)
        )
