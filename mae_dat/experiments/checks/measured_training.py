"""A training without images of its own, for measuring the memory of an update."""

import torch

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.groups import ClassifierConfig, DataConfig, MaskConfig, RunConfig
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.mae import MAE_MODELS, build_mae
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything
from mae_dat.runtime.world import World
from mae_dat.training.context import RunContext, prepare_model
from mae_dat.training.finetune import build_configured_classifier, build_state
from mae_dat.training.loop import Trainer
from mae_dat.training.optim import build_optimizer
from mae_dat.training.prefetch import Prefetcher
from mae_dat.training.pretrain import pretraining_objective
from mae_dat.training.setup import Reporting, TrainingSetup
from mae_dat.training.state import TrainingState

_PRETRAINING_BATCH, _FINETUNING_BATCH = 4096, 1024
_CLASSES = 1000


def effective_batch(model: str) -> int:
    """Return the images of an update in MAE's recipes: pretraining for an autoencoder, fine-tuning for a classifier."""
    return _PRETRAINING_BATCH if model in MAE_MODELS else _FINETUNING_BATCH


def parameters(config: DoctorConfig, device: torch.device) -> int:
    """Count the parameters of the model that is measured, without allocating them. Raises ConfigError."""
    settings = training_config(config, device)
    with torch.device("meta"):
        if isinstance(settings, PretrainConfig):
            model: torch.nn.Module = build_mae(settings.mae.model, img_size=settings.data.image_size)
        else:
            model = build_configured_classifier(settings.classifier, settings.data, _CLASSES)
    return sum(parameter.numel() for parameter in model.parameters())


def training_config(config: DoctorConfig, device: torch.device) -> PretrainConfig | FinetuneConfig:
    """Return the configuration of the training that is measured: a pretraining if the model is an autoencoder."""
    name = config.model_on(device.type)
    data = DataConfig(input_size=config.size_of(name))
    run = RunConfig(precision=config.precision, checkpoint_activations=config.checkpoint_activations)
    if name in MAE_MODELS:
        return PretrainConfig(data=data, run=run, mae=MaskConfig(model=name), dat=config.dat)
    return FinetuneConfig(data=data, run=run, classifier=ClassifierConfig(model=name), dat=config.dat)


class MeasuredTraining:
    """A training whose updates are made one by one, with random images. It writes no files."""

    def __init__(self, config: DoctorConfig, device: torch.device) -> None:
        settings = training_config(config, device)
        context = RunContext(
            settings.run, World(), device, amp_dtype(settings.run.precision, device), Console(quiet=True)
        )
        seed_everything(0)
        if isinstance(settings, PretrainConfig):
            state = _pretraining_state(settings, context)
        else:
            state, _ = build_state(settings, _CLASSES, context)
        setup = TrainingSetup(
            context=context,
            optim=settings.optim,
            loader=[],
            steps_per_epoch=1,
            log=RunLog(context.output, enabled=False),
            reporting=Reporting("measure"),
        )
        self.trainer, self.image_size = Trainer(state, setup), settings.data.image_size

    def update(self, images: int) -> None:
        """Make one update with a number of images, and wait for its end. Raises what the training raises."""
        numbers = torch.arange(images)
        batch: Batch = {
            "image": torch.rand(images, 3, *self.image_size),
            "label": numbers % _CLASSES,
            "index": numbers,
            "skipped": torch.zeros_like(numbers),
        }
        self.trainer.prefetcher = Prefetcher([batch], 1, lag=0)
        self.trainer.state.optimizer.zero_grad(set_to_none=True)
        self.trainer.train_step()
        self.trainer.read_reports(lag=0)


def _pretraining_state(config: PretrainConfig, context: RunContext) -> TrainingState:
    model = build_mae(config.mae.model, img_size=config.data.image_size).to(context.device)
    objective = pretraining_objective(config, model, context.device)
    prepare_model(model, context)
    optimizer = build_optimizer(model, 0.0, config.optim.weight_decay, betas=(0.9, 0.95))
    return TrainingState(model, optimizer, objective)
