"""Resuming from a checkpoint: which settings may change, and the same global batch on another number of ranks."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.flags import RENAMED
from mae_dat.config.groups import OptimConfig, RunConfig
from mae_dat.data.decode import decoding_settings
from mae_dat.data.file_facts import FileFacts, file_facts, replaced
from mae_dat.data.image_set import ImageSet
from mae_dat.data.open import describe_images
from mae_dat.models.describe import HASH_DIGITS
from mae_dat.models.tokenizer import VisualTokenizer, tokenizer_path
from mae_dat.runtime.collectives import on_all_ranks
from mae_dat.runtime.environment import CodeFacts, describe_code
from mae_dat.storage.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint, verify_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.training.context import RunContext
from mae_dat.training.objectives.base import Objective
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)

# Settings that may change when a run is resumed: they say where and how it is computed, not what. All others change the
# result.
FREE_SETTINGS = {
    *("output_dir", "log_dir", "resume", "start_epoch", "deterministic", "save_minutes", "keep", "keep_every"),
    "checkpoint_activations",
    *("allow_change", "hang_minutes", "log_every", "images_every"),
    *("data_path", "on_bad", "num_workers", "pin_mem", "threads"),
    *("eval", "dist_eval", "suite", "limit", "limit_corrupted", "restrict_classes"),
    *("protocol", "classes", "class_order"),
    *("val_path", "save_every"),  # of a tokenizer's training
    *("fsdp", "world_size", "local_rank", "dist_on_itp", "dist_url"),
}
BATCH_SETTINGS = {"batch_size", "accum_iter"}  # free while the global batch, their product with the ranks, is the same

_TOKENIZER_SETTINGS = ("tokenizer", "teacher")
"""Settings that name the file of a tokenizer, and attributes of the objectives that use one."""

# A setting that only one kind of training has.
_KINDS = {
    "mask_ratio": "a pretraining",
    "gan_weight": "a tokenizer's training",
    "word_weight": "a distillation",
}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, each with its value before and now.

    Settings that only one side has are left out: the other side is of another version.
    """
    before = {RENAMED.get(name, name): value for name, value in before.items()}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    shared = [name for name in listed if name in before]
    return {name: (before[name], listed[name]) for name in shared if before[name] != listed[name]}


def content_facts(
    settings: Mapping[str, Any],
    images: ImageSet,
    objective: Objective,
    checkpoint: Checkpoint | None,
    validation: ImageSet | None = None,
) -> dict[str, Any]:
    """Return what a manifest records about the content of the images, how they are decoded, and the tokenizers that the
    objective uses.

    Content is not read again if sizes and times of the images are those in the manifest of `checkpoint`.
    """
    before = checkpoint.manifest if checkpoint else {}
    sets = {"image_files": images} | ({} if validation is None else {"validation_files": validation})
    used = [
        name
        for name in _TOKENIZER_SETTINGS
        if name in settings and isinstance(getattr(objective, name, None), VisualTokenizer)
    ]
    return {
        **{name: file_facts(split.content_files(), before.get(name)) for name, split in sets.items()},
        **({} if validation is None else {"validation": describe_images(validation)}),
        "decoding": decoding_settings(),
        "tokenizer_files": {name: sha256_of(tokenizer_path(settings[name])) for name in used},
    }


class SettingChange(TypedDict):
    """A setting that affects the result and was changed within a run, as `--allow_change` allows."""

    step: int
    """Updates before the change."""
    setting: str
    before: Any
    now: Any


def check_changes(checkpoint: Checkpoint, manifest: Mapping[str, Any], allowed: Iterable[str]) -> list[SettingChange]:
    """Compare the run that `manifest` describes with the one that made the checkpoint, and log what differs.

    Returns the allowed changes that affect the result.

    Raises ConfigError for a change that affects the result and is not `allowed`, and CheckpointError for another kind
    of run.
    """
    settings, images, batch = (manifest[name] for name in ("settings", "images", "global_batch"))
    before = checkpoint.manifest.get("settings", {})
    if before and _kind_of(before) != _kind_of(settings):
        raise CheckpointError(
            f"{checkpoint.path} does not fit this run: it is of {_kind_of(before)}, not of {_kind_of(settings)}. Use "
            "another --output_dir."
        )
    if unknown := sorted(set(allowed) - set(settings) - {"images", "validation"}):
        raise ConfigError(f"--allow_change {' '.join(unknown)}: no such setting; see --help.")
    changed = changes(before, settings)
    same_batch = checkpoint.manifest.get("global_batch", batch) == batch
    free = FREE_SETTINGS | (BATCH_SETTINGS if same_batch else set())
    if checkpoint.manifest.get("images", images) != images:
        changed["images"] = (checkpoint.manifest["images"], images)
    validation, now = checkpoint.manifest.get("validation"), manifest.get("validation")
    if validation and now and validation != now and "limit" not in changed:
        changed["validation"] = (validation, now)
    changed |= _changed_content(checkpoint.manifest, manifest)
    lines = [
        f"  --{name}: {old} before, {new} now" + ("" if name in free else "  (changes the result)")
        for name, (old, new) in changed.items()
    ]
    refused = [name for name in changed if name not in free and name not in allowed]
    message = "\n".join([f"{checkpoint.path} was made with other settings:", *lines])
    if refused:
        raise ConfigError(
            f"{message}\nTo resume anyway, repeat the command with --allow_change {' '.join(refused)}; "
            "to start anew, choose another --output_dir."
        )
    if lines:
        logger.warning("%s", message)
    return [
        SettingChange(step=checkpoint.step, setting=name, before=old, now=new)
        for name, (old, new) in changed.items()
        if name not in free
    ]


def _changed_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return images and tokenizers that have other content under the same names, and images that are decoded in another
    way, each with what it was and is.

    Older manifests do not record the content, and nothing is compared with them.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name, key in (("images", "image_files"), ("validation", "validation_files")):
        files, files_now = before.get(key), now.get(key)
        if files and files_now and before.get(name) == now[name] and replaced(files, files_now):
            changed[name] = (before[name], f"{now[name]}, the same names with {_describe_replaced(files, files_now)}")
    decoding, decoding_now = before.get("decoding"), now.get("decoding")
    if decoding is not None and decoding_now is not None and decoding != decoding_now:
        changed["images"] = tuple(_describe_decoding(values) for values in (decoding, decoding_now))  # type: ignore[assignment]
    hashes = before.get("tokenizer_files", {})
    for name, sha256 in now.get("tokenizer_files", {}).items():
        if hashes.get(name, sha256) != sha256:
            path_before, path = before["settings"].get(name), now["settings"][name]
            digits = HASH_DIGITS
            changed[name] = (f"{path_before} (sha256 {hashes[name][:digits]})", f"{path} (sha256 {sha256[:digits]})")
    return changed


def _describe_replaced(before: FileFacts, now: FileFacts) -> str:
    if before["sizes"] != now["sizes"]:
        return "other sizes"
    if before["content"] != now["content"]:
        return "other content of the same sizes"
    return "other times for a part of the files, so these were written anew"


def _describe_decoding(values: Mapping[str, str]) -> str:
    text = ", ".join(f"${name}={value}" for name, value in values.items())
    return f"decoded with {text or 'the default white level and largest size'}"


def _kind_of(settings: Mapping[str, Any]) -> str:
    return next((kind for name, kind in _KINDS.items() if name in settings), "a fine-tuning")


def keep_global_batch(optim: OptimConfig, checkpoint: Checkpoint | None, ranks: int) -> OptimConfig:
    """Return settings with the checkpoint's images per update on this number of ranks, in micro-batches no larger than
    `--batch_size`.

    Settings with another `--batch_size` or `--accum_iter` than the checkpoint's are returned as they are. Raises
    ConfigError when the images cannot be divided evenly.
    """
    manifest = checkpoint.manifest if checkpoint else {}
    before = {name: manifest.get("settings", {}).get(name) for name in BATCH_SETTINGS}
    now = {name: getattr(optim, name) for name in BATCH_SETTINGS}
    global_batch: int = manifest.get("global_batch", 0)
    if before != now or global_batch == optim.batch_size * optim.accum_iter * ranks:
        return optim
    share, rest = divmod(global_batch, ranks)
    sizes = [size for size in range(min(optim.batch_size, share), 0, -1) if share % size == 0]
    if rest or not sizes:
        raise ConfigError(
            f"{checkpoint.path if checkpoint else ''} was made with {global_batch} images per update, which {ranks} "
            f"ranks cannot share evenly: use {manifest['ranks']} ranks or another divisor of {global_batch}, or set "
            "--batch_size and --accum_iter."
        )
    # Mixup pairs the images of a micro-batch, so an even size stays even where that is possible.
    size = next((size for size in sizes if size % 2 == 0 or optim.batch_size % 2), sizes[0])
    divided = dataclasses.replace(optim, batch_size=size, accum_iter=share // size)
    logger.warning(
        "%d ranks instead of %d: %d images per update as before, now %d x %d x %d ranks.",
        ranks,
        manifest["ranks"],
        global_batch,
        divided.batch_size,
        divided.accum_iter,
        ranks,
    )
    return divided


def checkpoint_to_resume(run: RunConfig, output: Path, weights_flag: str = "--finetune") -> Checkpoint | None:
    """Find the newest valid checkpoint of the output folder; else the one that `--resume` names; else None.

    `weights_flag` is the command's flag for other weights, for messages. Raises CheckpointError for a checkpoint of the
    first format.
    """
    newest = newest_checkpoint(output)
    if newest and run.resume:
        # A requeued job repeats its command line, so its own progress takes precedence over where it started.
        logger.info("%s has a checkpoint of its own, which takes precedence over --resume %s.", output, run.resume)
    checkpoint = newest or (find_checkpoint(Path(run.resume), weights_flag) if run.resume else None)
    if checkpoint and checkpoint.manifest["version"] < 2:
        raise CheckpointError(
            f"{checkpoint.path} has format {checkpoint.manifest['version']}, of a version of mae_dat that counted "
            f"steps in another way: finish the run with that version, or start a new one, in another --output_dir, "
            f"from its weights with {weights_flag} {checkpoint.path}."
        )
    return checkpoint


def load_checkpoint(state: TrainingState, checkpoint: Checkpoint, rank: int, ranks: int) -> None:
    """Load a checkpoint into the state on one of `ranks` ranks. Raises CheckpointError when it is of another model or
    kind of run."""
    try:
        # Every rank checks the file as it sees it: another machine may see an old or incomplete one.
        content = verify_checkpoint(checkpoint.path.with_suffix(".json")).load()
        state.load_state_dict({"step": checkpoint.step, **content}, rank, ranks)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path} does not fit this run: {cause}. Use the settings it was made with (config.yaml in the "
            "same folder), or another --output_dir."
        ) from error
    logger.info("resuming from %s (epoch %.2f)", checkpoint.path, checkpoint.manifest.get("epoch", 0))


def restore_progress(
    state: TrainingState,
    checkpoint: Checkpoint,
    manifest: Mapping[str, Any],
    epoch_steps: int,
    context: RunContext,
) -> list[SettingChange]:
    """Load a checkpoint into the state, after a check that it belongs to the run that `manifest` describes.

    Returns the allowed changes of settings that affect the result, with those of earlier sessions.
    With another global batch or other images, the step is the one at the same epoch. Raises ConfigError,
    CheckpointError. Collective.
    """
    images, batch = manifest["images"], manifest["global_batch"]
    changes_now = check_changes(checkpoint, manifest, context.run.allow_change)
    warn_if_code_changed(checkpoint, manifest["code"])
    on_all_ranks(lambda: load_checkpoint(state, checkpoint, context.world.rank, context.world.size))
    before = checkpoint.manifest
    if (before.get("global_batch", batch), before.get("images", images)) != (batch, images):
        state.step = round(before["epoch"] * epoch_steps)
    return [*before.get("changes", []), *changes_now]


def warn_if_code_changed(checkpoint: Checkpoint, code: CodeFacts) -> None:
    """Warn where the package's source code is not the one that made the checkpoint."""
    before = checkpoint.manifest.get("code", {})
    if before and before["sha256"] != code["sha256"]:
        logger.warning(
            "the code has changed since the checkpoint: %s before, %s now.", describe_code(before), describe_code(code)
        )
