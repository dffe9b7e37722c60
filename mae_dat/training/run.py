"""What pretraining and fine-tuning share: joining the world, resuming, the loop, exported weights."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError, OutputError
from mae_dat.config.groups import DataConfig, DatConfig, LaunchConfig, RunConfig
from mae_dat.config.parse import flat_values, write_config
from mae_dat.data.image_set import ImageSet, Transform, as_float, find_split
from mae_dat.data.loader import TrainSampler, steps_per_epoch, train_loader
from mae_dat.data.open import image_root, open_images
from mae_dat.models.tokenizer import VisualTokenizer, check_card, in_precision, load_tokenizer
from mae_dat.models.tokenizer.padded import PaddedTokenizer
from mae_dat.runtime.console import Console, RunLog
from mae_dat.runtime.environment import code_facts, told
from mae_dat.runtime.sharding import checkpoint_blocks, choose_attention, compile_blocks, shard, whole
from mae_dat.runtime.watchdog import watching
from mae_dat.runtime.world import (
    World,
    amp_dtype,
    from_main,
    pick_device,
    process_group,
    set_float32,
    together,
    world_from_environment,
)
from mae_dat.storage.attempts import record_start
from mae_dat.storage.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint, sweep, verify
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of
from mae_dat.storage.output_lock import Lease, hold
from mae_dat.storage.registry import released
from mae_dat.storage.released import local_path
from mae_dat.storage.weight_files import WeightsFile, read_weights, unwrap, write_weights
from mae_dat.training import loop as engine
from mae_dat.training.galleries import save_png
from mae_dat.training.loop import Job
from mae_dat.training.objectives.base import Objective, WithDAT
from mae_dat.training.resume import check_changes, keep_global_batch
from mae_dat.training.state import Training

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run happens."""

    world: World
    device: torch.device
    precision: torch.dtype | None
    output: Path
    lease: Lease | None = None
    """Of the output folder, on rank 0 of a training."""
    shards: bool = False
    """Whether the ranks share one copy of a model (`--fsdp`)."""
    compiled: bool = False
    """Whether blocks are compiled."""
    checkpointed: bool = False
    """Whether blocks compute their activations twice to save memory."""


@contextlib.contextmanager
def place(run: RunConfig, launch: LaunchConfig, console: Console, training: bool = True) -> Iterator[Place]:
    """Joins the peers, picks the device and prepares the output folder; the block runs inside the process group.

    A training has the folder to itself: OutputError, on all ranks, if another one holds it.
    """
    world = world_from_environment()
    if world.size == 1 and launch.world_size > 1:
        logger.warning(
            "--world_size %d alone starts nothing: use torchrun --nproc_per_node %d.",
            launch.world_size,
            launch.world_size,
        )
    fsdp = launch.fsdp and world.size > 1
    if launch.fsdp and not fsdp:
        logger.warning("--fsdp: a single rank has nobody to share the model with.")
    if not world.main:
        console.quiet, console.live = True, False
    if run.compile and fsdp:
        raise ConfigError("--compile does not go with --fsdp: leave out one of them.")
    device = pick_device(run.device, world)
    set_float32(run.precision)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with process_group(world, device), contextlib.ExitStack() as stack:
        output, leases = Path(run.output_dir), []

        def prepare() -> None:
            prepare_output_folder(output)
            if training:
                leases.append(stack.enter_context(hold(output)))
                sweep(output)

        from_main(prepare)
        stack.enter_context(watching(run.hang_minutes, world.rank))
        yield Place(
            world,
            device,
            amp_dtype(run.precision, device),
            output,
            leases[0] if leases else None,
            fsdp,
            run.compile,
            run.checkpoint_activations,
        )


def training_images(data: DataConfig, transform: Transform, seed: int, labelled: bool) -> ImageSet:
    """The training split of the images that the flags or the environment name. Raises ConfigError, DataError."""
    root = find_split(image_root(data.data_path), "train", labelled=labelled)
    images = open_images(root, in_channels(transform, data), labelled=labelled, on_bad=data.on_bad, seed=seed)
    if images.shrunk is not None and images.shrunk < max(data.image_size):
        logger.warning(
            "%s was packed with --size %d, which --input_size %d enlarges: pack the images anew, with a larger one.",
            root,
            images.shrunk,
            max(data.image_size),
        )
    return images


def in_channels(transform: Transform, data: DataConfig) -> Transform:
    """The transform with `in_chans` channels: 3 for RGB, or 1 for the luminance (ITU-R 601) of what it makes.

    Raises ConfigError for other numbers: a folder of pictures holds no further channels.
    """
    if data.in_chans not in (1, 3):
        raise ConfigError(
            f"--in_chans {data.in_chans}: image folders give 3 channels, or 1 (luminance); use one of these, or build "
            "MaskedAutoencoder and your own data set in Python for other channels."
        )
    if data.in_chans == 3:
        return transform
    flow: Transform = transforms.Compose([transform, as_float, transforms.Grayscale()])
    return flow


def with_dat(
    objective: Objective, dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False
) -> Objective:
    """The objective itself, or wrapped in DAT with its tokenizer."""
    if dat.attack is None:
        return objective
    return WithDAT(objective, open_tokenizer(dat, data, device, pad), dat.attack)


def open_tokenizer(dat: DatConfig, data: DataConfig, device: torch.device, pad: bool = False) -> VisualTokenizer:
    """The tokenizer of the flags, after a check that the sizes fit; with `pad` all of them do."""
    tokenizer = in_precision(load_tokenizer(dat.tokenizer), device, dat.tokenizer_precision, dat.tokenizer_compile)
    if pad:
        tokenizer = PaddedTokenizer(tokenizer, data.image_size)
    tokenizer.check(torch.zeros(1, data.in_chans, *data.image_size))
    facts = (dat.tokenizer, tokenizer.factor, tokenizer.num_words, dat.dat)
    logger.info("tokenizer %s: factor %d, %d words; DAT: %s", *facts)
    return tokenizer


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


def restore(training: Training, found: Checkpoint, world: World) -> None:
    """Resumes from a checkpoint. Raises CheckpointError when it is of another model or kind of run."""
    try:
        # Every rank checks the file as it sees it: what rank 0 read whole may be old or torn on another machine.
        training.load_state_dict(verify(found.path.with_suffix(".json")).load(), world.rank, world.size)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{found.path} does not fit this run: {cause}. Use the settings it was made with (config.yaml beside it), "
            "or another --output_dir."
        ) from error
    logger.info("resuming from %s (epoch %.2f)", found.path, found.manifest.get("epoch", 0))


def go_on(
    training: Training, found: Checkpoint | None, config: Any, images: ImageSet, batch: int, where: Place
) -> None:
    """Brings the training to where the checkpoint, if there is one, left it; `batch` is the global one. Raises
    ConfigError, CheckpointError."""
    epoch_steps, which = len(images) // batch, description(images)
    training.step = config.run.start_epoch * epoch_steps
    if found is None:
        return
    check_changes(found, flat_values(config), which, batch, config.run.allow_change)
    tell_of_new_code(found)
    together(lambda: restore(training, found, where.world))
    if (found.manifest.get("global_batch", batch), found.manifest.get("images", which)) != (batch, which):
        training.step = round(found.manifest["epoch"] * epoch_steps)


def description(images: ImageSet) -> str:
    """Number and fingerprint of the images, for a checkpoint's manifest."""
    return f"{len(images)} ({images.fingerprint()[:12]})"


def tell_of_new_code(found: Checkpoint) -> None:
    """A note where the package's sources are not those that the checkpoint was made with."""
    before, now = found.manifest.get("code", {}), code_facts()
    if before and before["sha256"] != now["sha256"]:
        logger.warning("the code has changed since the checkpoint: %s before, %s now.", told(before), told(now))


def train(
    training: Training,
    images: ImageSet,
    where: Place,
    config: Any,
    console: Console,
    title: str,
    at_epoch_end: Callable[[Training, int, RunLog], dict[str, float]],
    scalar_tags: dict[str, str],
) -> None:
    """Resumes or starts, and trains to the end. `config` has the groups run, data and optim."""
    run: RunConfig = config.run
    world = where.world
    found = from_main(lambda: checkpoint_to_resume(run, where.output))
    optim = keep_global_batch(config.optim, found, world.size)
    shares = (optim.batch_size, world.size, optim.accum_iter)
    epoch_steps = steps_per_epoch(len(images), *shares)
    go_on(training, found, config, images, math.prod(shares), where)
    total = optim.total_epochs * epoch_steps
    if training.step >= total:
        logger.info("%s is complete (%d steps): nothing left to train.", run.output_dir, training.step)
        return
    from_main(lambda: begin(config, where.output, training.step))
    order = (world.rank, world.size, run.seed, training.step, total, optim.accum_iter, images.order)
    sampler = TrainSampler(len(images), optim.batch_size, *order)
    loader = train_loader(images, sampler, config.data.num_workers, config.data.pin_mem and where.device.type == "cuda")
    again = 1000 * training.step // epoch_steps + 1
    log = RunLog(where.output, log_folder(run), training.step, enabled=world.main, purge_from=again)
    facts = {
        "settings": flat_values(config),
        "images": description(images),
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
        device=where.device,
        precision=where.precision,
        console=console,
        log=log,
        title=title,
        facts=facts,
        at_epoch_end=at_epoch_end,
        scalar_tags=scalar_tags,
        name_of=images.name_of,
        guard=where.lease.check if where.lease else None,
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


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Adds the flag that named a file, such as `--finetune`, to the error of its load."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def settle(model: nn.Module, where: Place, copy: nn.Module | None = None) -> None:
    """Makes of a model, and of its averaged copy, what the flags ask; the optimizer comes after. Raises ConfigError."""
    choose_attention(model, where.device, where.precision)
    if where.checkpointed:
        checkpoint_blocks(model)
    if where.compiled:
        compile_blocks(model)
    for one in (model, copy):
        if one is not None and where.shards:
            shard(one, where.world, where.device)


def pictures_due(run: RunConfig, epoch: int, where: Place) -> bool:
    """Whether this rank draws after this epoch: rank 0, and with a sharded model all of them."""
    turn = run.pictures_every and (epoch + 1) % run.pictures_every == 0
    return bool(turn) and (where.world.main or where.shards)


def show(pictures: Mapping[str, Tensor], where: Place, log: RunLog, epoch: int) -> None:
    """Galleries by name, (3, H, W) in [0, 1]: the newest of each as pictures/NAME.png, all of them in TensorBoard."""
    if not where.world.main:
        return
    folder = where.output / "pictures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        save_png(picture, folder / f"{name}.png")
        log.picture(name, picture, 1000 * (epoch + 1))


def export(tensors: Mapping[str, Tensor], where: Place, facts: dict[str, Any]) -> None:
    """Writes `model.safetensors` (bare keys, what it takes to rebuild the model inside) and its card with the sha256.

    Nothing is written when the file there is of the same facts and steps: a rerun of a complete run changes nothing.
    """
    tensors = whole(tensors)
    path = where.output / WEIGHTS
    card = path.with_suffix(".json")
    if not where.world.main:
        return
    if path.is_file() and card.is_file() and facts.items() <= json.loads(card.read_text()).items():
        return
    write_weights(path, tensors, {"mae_dat": json.dumps(facts)})
    with atomic_write(card) as file:
        file.write(json.dumps({"sha256": sha256_of(path), **facts}, indent=1).encode() + b"\n")
    logger.info("wrote %s", path)


def read_export(path: Path) -> tuple[WeightsFile, dict[str, Any]]:
    """Weights from a file, an output folder of ours or by the name of released ones, and the facts stored with them or
    in the registry (empty for another foreign file).

    A folder gives its `model.safetensors`, or the model in its newest checkpoint. Raises MissingInputError,
    CheckpointError, DownloadError.
    """
    entry = None if path.exists() else released().get(str(path))
    path = local_path(path)
    if path.is_dir() and not (path / WEIGHTS).is_file():
        found = newest_checkpoint(path)
        if found is None:
            raise MissingInputError(f"{path} holds neither {WEIGHTS} nor a valid checkpoint-*.pth.")
        state = found.load()
        weights = unwrap(state, str(found.path))
        return weights, dict(found.manifest.get("settings", {}))
    file = path / WEIGHTS if path.is_dir() else path
    check_card(file)
    weights = read_weights(file)
    try:
        return weights, json.loads(weights.metadata.get("mae_dat", "{}")) or (entry.facts if entry else {})
    except ValueError as error:
        raise CheckpointError(f"{file}: its description is damaged ({error}).") from error


def console_for_command() -> Console:
    """A console that logs; only warnings on ranks above 0."""
    console = Console(quiet=not world_from_environment().main)
    console.start_logging()
    logging.captureWarnings(True)
    return console


def arguments() -> list[str]:
    """The command line after the script's name."""
    return sys.argv[1:]
