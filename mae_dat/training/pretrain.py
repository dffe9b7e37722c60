"""Masked-autoencoder pretraining on any folder of images, optionally with DAT (`main_pretrain.py`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_dat.config.parse import load_config
from mae_dat.config.runs import PretrainConfig
from mae_dat.data.image_set import Batch, ImageSet, Transform
from mae_dat.data.open import training_images, with_channels
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform, PretrainTransform
from mae_dat.models.mae import MaskedAutoencoder, build_mae
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything, step_generator
from mae_dat.training import run
from mae_dat.training.context import RunContext, prepare_model, run_context
from mae_dat.training.export import export_model
from mae_dat.training.galleries import adversary_gallery, galleries_due, reconstruction_gallery, show_galleries
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.dat import WithDAT, open_tokenizer, with_dat
from mae_dat.training.objectives.reconstruction import MaskedReconstruction
from mae_dat.training.optim import build_optimizer
from mae_dat.training.state import TrainingState

_SCALAR_TAGS = {"train_lr": "lr"}
_GALLERY_IMAGES = 6


def pretrain(config: PretrainConfig, console: Console, title: str = "pretrain") -> None:
    """Pretrains, or goes on where the output folder stands, and exports the autoencoder with its decoder."""
    with run_context(config.run, config.launch, console) as context:
        size = config.data.image_size
        images = training_images(config.data, PretrainTransform(size), config.run.seed, labelled=False)
        seed_everything(config.run.seed)
        model = build_mae(config.mae.model, img_size=size, in_chans=config.data.in_chans).to(context.device)
        objective = pretraining_objective(config, model, context.device)
        prepare_model(model, context)
        # The rate is set in every step.
        optimizer = build_optimizer(model, 0.0, config.optim.weight_decay, betas=(0.9, 0.95))
        training = TrainingState(model, optimizer, objective)
        shown = fixed_images(images, with_channels(EvalTransform(size), config.data.in_chans)).to(context.device)

        def at_epoch_end(training: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
            if galleries_due(config.run, epoch, context):
                show_galleries(draw_galleries(model, objective, shown, config, context), context, log, epoch)
            return {}

        run.train(training, images, context, config, console, title, at_epoch_end, _SCALAR_TAGS)
        facts = {"kind": "mae", "model": config.mae.model, "input_size": list(size), "in_chans": config.data.in_chans}
        export_model(
            model.state_dict(), context, {**facts, "norm_pix_loss": config.mae.norm_pix_loss, "steps": training.step}
        )


def pretraining_objective(config: PretrainConfig, model: MaskedAutoencoder, device: torch.device) -> Objective:
    """Masked reconstruction of the flags' targets, with DAT or without. Where words are a target, the model gets a head
    for them. Raises ConfigError."""
    mae, attack = config.mae, config.dat.attack
    if mae.target == "pixels":
        objective = MaskedReconstruction(mae.mask_ratio, mae.norm_pix_loss)
        return with_dat(objective, config.dat, config.data, device)
    tokenizer = open_tokenizer(config.dat, config.data, device)
    model.add_word_head(tokenizer.factor, tokenizer.num_words, pixels=mae.target == "both")
    model.to(device)
    weight = mae.words_weight if mae.target == "both" else None
    objective = MaskedReconstruction(mae.mask_ratio, mae.norm_pix_loss, tokenizer, weight)
    return WithDAT(objective, tokenizer, attack) if attack else objective


def fixed_images(images: ImageSet, transform: Transform) -> Tensor:
    """Some of the pictures, evenly spread and not augmented, for galleries."""
    still = images.with_transform(transform)
    return torch.stack([still[index]["image"] for index in evenly_spaced(len(still), _GALLERY_IMAGES)])


def draw_galleries(
    model: MaskedAutoencoder, objective: Objective, image: Tensor, config: PretrainConfig, context: RunContext
) -> dict[str, Tensor]:
    """Galleries of the same pictures under the same mask after every epoch: reconstructions, and what the adversary
    did."""
    generator = step_generator(config.run.seed, 0, 0, context.device)
    none = torch.zeros(len(image), dtype=torch.int64)
    batch: Batch = {"image": image, "label": none, "index": none, "skipped": none}
    _, view_context = objective.prepare(model, batch, generator)
    drawn = {}
    if config.mae.target != "words":
        ratio, norm_pix = config.mae.mask_ratio, config.mae.norm_pix_loss
        drawn["reconstruction"] = reconstruction_gallery(model, image, ratio, view_context[1], norm_pix)
    if isinstance(objective, WithDAT) and objective.strength_is_known:
        found = objective.adversary(model, image, view_context, generator)
        drawn["adversary"] = adversary_gallery(image, found)
    return drawn


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    pretrain(load_config(PretrainConfig, arguments), console)
