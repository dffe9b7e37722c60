"""Masked-autoencoder pretraining on any folder of images, optionally with DAT (`main_pretrain.py`)."""

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flat_values
from mae_dat.config.groups import MaskConfig
from mae_dat.config.runs import PretrainConfig
from mae_dat.data.adversaries import StoredPairs
from mae_dat.data.describe import add_images
from mae_dat.data.image_set import Batch, ImageSet, Transform
from mae_dat.data.open import image_root, training_images, with_channels
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform, PretrainTransform
from mae_dat.models.describe import describe_model
from mae_dat.models.mae import MaskedAutoencoder, build_mae
from mae_dat.models.weights.initialize import InitReport, initialize_autoencoder
from mae_dat.models.weights.load import DECODER_KEYS
from mae_dat.models.weights.read import errors_name_flag
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import InputSummary
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything, step_generator
from mae_dat.storage.checkpoint import is_foreign, newest_checkpoint
from mae_dat.training.context import RunContext, prepare_model, run_context
from mae_dat.training.describe import add_adversary, add_on_bad, add_pixels
from mae_dat.training.export import export_model
from mae_dat.training.frozen_start import FrozenStart
from mae_dat.training.galleries import adversary_gallery, galleries_due, reconstruction_gallery, show_galleries
from mae_dat.training.next_commands import after_pretraining, log_next_commands
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.dat import WithDAT, open_tokenizer, with_dat
from mae_dat.training.objectives.reconstruction import MaskedReconstruction
from mae_dat.training.objectives.stored import WithStoredAdversary
from mae_dat.training.optim import build_optimizer
from mae_dat.training.session import run_training
from mae_dat.training.setup import Reporting
from mae_dat.training.state import TrainingState

logger = logging.getLogger(__name__)

_GALLERY_IMAGES = 6


def run_pretraining(config: PretrainConfig, console: Console, title: str = "pretrain") -> None:
    """Pretrain, or resume in the output folder, and export the autoencoder with its decoder."""
    mae, data, seed = config.mae, config.data, config.run.seed
    # A weights file is no checkpoint to look for: `load_initial_weights` loads it.
    run = dataclasses.replace(config.run, resume=None) if weights_to_resume(config) else config.run
    with run_context(run, config.launch, console) as context:
        images = training_images(data, PretrainTransform(data.image_size), seed, labeled=False)
        seed_everything(seed)
        model = build_mae(mae.model, img_size=data.image_size, in_chans=data.in_chans)
        start = load_initial_weights(model, config, context)
        model.to(context.device)
        objective, originals = pretraining_objective(config, model, context.device), images
        if stored := config.dat.stored:
            images = StoredPairs(images, stored)
            objective = WithStoredAdversary(objective, config.dat.batch_share, images.describe())
        prepare_model(model, context)
        # The learning rate is set in every step.
        optimizer = build_optimizer(model, 0.0, config.optim.weight_decay, betas=(0.9, 0.95))
        state = TrainingState(
            model, optimizer, objective, frozen_start=decoder_first(model, mae.decoder_warmup if start else 0)
        )
        still_transform = with_channels(EvalTransform(data.image_size), data.in_chans)
        still = gallery_images(originals, still_transform).to(context.device)

        def at_epoch_end(state: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
            if galleries_due(epoch, context):
                galleries = draw_galleries(model, objective, still, mae=mae, seed=seed)
                show_galleries(galleries, context, log, state.step)
            return {}

        record = run_training(
            state,
            images,
            context,
            data=data,
            optim=config.optim,
            settings=flat_values(config),
            inputs=lambda: pretraining_inputs(config, images, state, start),
            reporting=Reporting(title, at_epoch_end),
        )
        facts: dict[str, Any] = {
            "kind": "mae",
            "model": mae.model,
            "input_size": list(data.image_size),
            "in_chans": data.in_chans,
            "norm_pix_loss": mae.norm_pix_loss,
            "steps": state.step,
        }
        export_model(model.state_dict(), context, facts, record.changes)


def weights_to_resume(config: PretrainConfig) -> str | None:
    """Return the weights that `--resume` names, as in MAE's usage; None if it names a checkpoint of this package.

    Raises ConfigError for --init beside them.
    """
    resume = config.run.resume
    if not resume or not is_foreign(resume):
        return None
    if config.mae.init:
        raise ConfigError(
            f"--init {config.mae.init} and the weights --resume {resume}: give one of them to start from."
        )
    return resume


def load_initial_weights(model: MaskedAutoencoder, config: PretrainConfig, context: RunContext) -> InitReport | None:
    """Load the weights that the flags name, and log what became of each part; None without any.

    Raises MissingInputError, CheckpointError, ConfigError, DownloadError.
    """
    resume = weights_to_resume(config)
    source = config.mae.init or resume
    if not source:
        return None
    with errors_name_flag("--resume" if resume else "--init"):
        report = initialize_autoencoder(model, source)
    if resume and on_main_rank(lambda: newest_checkpoint(context.output)) is None:
        logger.info(
            "--resume %s is not a checkpoint of mae-dat: training starts at epoch %d from the model in the file.",
            resume,
            config.run.start_epoch,
        )
    return report


def decoder_first(model: MaskedAutoencoder, epochs: float) -> FrozenStart | None:
    """Return the encoder's parameters as frozen for the first epochs; None for none."""
    encoder = [value for key, value in model.named_parameters() if not key.startswith(DECODER_KEYS)]
    return FrozenStart(encoder, epochs) if epochs else None


def pretraining_objective(config: PretrainConfig, model: MaskedAutoencoder, device: torch.device) -> Objective:
    """Return masked reconstruction of the configured targets, with DAT or without.

    Where visual words are a target, the model gets a head for them. Raises ConfigError.
    """
    mae, attack = config.mae, config.dat.attack
    if mae.target == "pixels":
        objective = MaskedReconstruction(mae.mask_ratio, mae.norm_pix_loss)
        return with_dat(objective, config.dat, config.data, device)
    tokenizer = open_tokenizer(config.dat, config.data, device)
    model.add_word_head(tokenizer.factor, tokenizer.num_words, pixels=mae.target == "both")
    model.to(device)
    weight = mae.words_weight if mae.target == "both" else None
    objective = MaskedReconstruction(mae.mask_ratio, mae.norm_pix_loss, tokenizer, weight)
    return WithDAT(tokenizer, attack, objective) if attack else objective


def pretraining_inputs(
    config: PretrainConfig, images: ImageSet, state: TrainingState, start: InitReport | None
) -> InputSummary:
    """Return the summary of what a pretraining reads; `start` is about the weights it starts from."""
    data, mae = config.data, config.mae
    inputs = InputSummary(config.verb)
    add_images(inputs, data.data_path, image_root(data.data_path), {"training": images})
    add_on_bad(inputs, data.on_bad)
    target = f"target {mae.target}" + (", normalized by patch" if mae.norm_pix_loss and mae.target != "words" else "")
    inputs.add("model", f"{describe_model(mae.model, state.model)}; mask ratio {mae.mask_ratio:g}, {target}")
    inputs.add(
        "weights",
        start.file.origin.describe() if start else "random (no --init)",
        start.summary() if start else "",
        f"the decoder alone is trained in the first {mae.decoder_warmup:g} epochs" * bool(start and mae.decoder_warmup),
    )
    add_pixels(inputs, data, state.model, "random crop of 20 to 100 % of the area, bicubic, flip")
    add_adversary(inputs, config.dat, state.objective)
    return inputs


def gallery_images(images: ImageSet, transform: Transform) -> Tensor:
    """Return evenly spaced images without augmentation, (B, C, H, W), for galleries."""
    still = images.with_transform(transform)  # which decodes the same channels
    return torch.stack([still[index]["image"] for index in evenly_spaced(len(still), _GALLERY_IMAGES)])


def draw_galleries(
    model: MaskedAutoencoder, objective: Objective, image: Tensor, mae: MaskConfig, seed: int
) -> dict[str, Tensor]:
    """Draw reconstructions and adversaries of images (B, C, H, W) in [0, 1], as galleries (3, H, W) by name.

    The masks are the same after every epoch.
    """
    generator = step_generator(seed, 0, 0, image.device)
    unused = torch.zeros(len(image), dtype=torch.int64)
    batch: Batch = {"image": image, "label": unused, "index": unused, "skipped": unused}
    _, prepared = objective.prepare(model, batch, generator)
    galleries = {}
    if mae.target != "words":
        noise = prepared[1]
        galleries["reconstruction"] = reconstruction_gallery(
            model, image, mask_ratio=mae.mask_ratio, noise=noise, norm_pix=mae.norm_pix_loss
        )
    if isinstance(objective, WithDAT) and objective.strength_is_known:
        adversary = objective.adversary(model, image, prepared, generator)
        galleries["adversary"] = adversary_gallery(image, adversary)
    return galleries


def main(config: PretrainConfig) -> None:
    """Run the command, and log what to do with the result."""
    run_pretraining(config, console_for_command())
    log_next_commands(config.run.output_dir, after_pretraining(config))
