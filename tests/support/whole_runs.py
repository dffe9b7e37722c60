"""Whole trainings of tiny models: run, interrupt, read back and compare them."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MEASURED
from torch import Tensor, nn

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, DataConfig, MaskConfig, OptimConfig, RunConfig
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import train_loader
from mae_dat.data.sampler import TrainSampler, steps_per_epoch
from mae_dat.data.transforms import EvalTransform
from mae_dat.models import mae
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import RunLog, read_log
from mae_dat.runtime.world import World
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.training.context import RunContext
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.optim import build_optimizer
from mae_dat.training.pretrain import run_pretraining
from mae_dat.training.setup import EpochEnd, Reporting, TrainingSetup
from mae_dat.training.state import TrainingState

SIDE = 32


TINY = ViTSize(SIDE, 8, 32, 2, 2)


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 training images (4 steps of 8, two left over) and 20 for validation."""
    return write_image_folder(
        tmp_path_factory.mktemp("engine") / "images",
        FolderSettings(train=34, val=20, conflict=10, silhouette=10, size=SIDE),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).save(path)
    return path


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only lose time with more
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(mae.MAE_MODELS, "mae_tiny", MaeSize(TINY, 16, 1, 2))
    monkeypatch.setitem(mae.VIT_SIZES, "vit_tiny", TINY)
    yield
    torch.set_num_threads(threads)


def run_config(output: Path) -> RunConfig:
    return RunConfig(output_dir=str(output), device="cpu", precision="fp32", images_every=0)


def data_config(folder: Path) -> DataConfig:
    return DataConfig(data_path=str(folder), input_size=(SIDE,), num_workers=0)


def run_mae(
    folder: Path,
    output: Path,
    tokenizer: Path,
    accum_iter: int = 1,
    epochs: int = 2,
    save_minutes: float = 10,
    allow_change: tuple[str, ...] = (),
) -> None:
    optim = OptimConfig(batch_size=8, epochs=epochs, warmup_epochs=1, blr=0.05, accum_iter=accum_iter)
    run = dataclasses.replace(run_config(output), save_minutes=save_minutes, allow_change=allow_change)
    config = PretrainConfig(run=run, data=data_config(folder), mae=MaskConfig("mae_tiny", 0.5, True), optim=optim)
    run_pretraining(config, Console(quiet=True))


def run_accumulating_mae(folder: Path, output: Path, tokenizer: Path) -> None:
    run_mae(folder, output, tokenizer, accum_iter=2, epochs=3)


def run_classifier(folder: Path, output: Path, tokenizer: Path) -> None:
    config = FinetuneConfig(
        run=run_config(output),
        data=data_config(folder),
        classifier=ClassifierConfig("vit_tiny", drop_path=0.3, ema_decay=0.8),
        augment=AugmentConfig(mixup=0.8, cutmix=1.0),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=1, blr=0.05),
    )
    run_finetuning(config, Console(quiet=True))


def run_dat(folder: Path, output: Path, tokenizer: Path) -> None:
    config = FinetuneConfig(
        run=run_config(output),
        data=data_config(folder),
        classifier=ClassifierConfig("vit_tiny"),
        augment=AugmentConfig(aa=None),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=1, blr=0.05),
        dat=DatConfig("released", share=0.05, tokenizer=str(tokenizer)),
    )
    run_finetuning(config, Console(quiet=True))


RUNS = {"mae": run_mae, "accumulation": run_accumulating_mae, "mixup, EMA, drop path": run_classifier, "DAT": run_dat}


@contextlib.contextmanager
def signal_in_step(step: int, number: int) -> Iterator[None]:
    """Sends this process a real signal in the middle of a training step."""
    real = Trainer.train_step

    def interrupted(trainer: Trainer) -> None:
        if trainer.state.step == step:
            os.kill(os.getpid(), number)
        real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        yield


def records(output: Path, name: str = "log.txt") -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in read_log(output / name)]


def final_state(output: Path) -> dict[str, Any]:
    found = newest_checkpoint(output)
    assert found is not None
    return found.load()


def assert_equal_states(one: Any, other: Any, where: str = "state") -> None:
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_states(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal_states(mine, theirs, f"{where}.{number}")
    else:
        assert one == other or (one != one and other != other), where


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_classifier("vit_tiny", 10, (SIDE, SIDE), 0.0)
    nn.init.normal_(model.net.head.weight, std=0.05)  # its own start is near 0: no gradient below the head
    return model


def still_images(folder: Path) -> ImageFolder:
    return ImageFolder(folder / "train", EvalTransform((SIDE, SIDE)))


def setup_for(
    images: ImageFolder,
    output: Path,
    optim: OptimConfig,
    world: World = World(),  # noqa: B008 - immutable
    at_epoch_end: EpochEnd = lambda state, epoch, log: {},
    device: torch.device = CPU,
    precision: torch.dtype | None = None,
    run: RunConfig | None = None,
) -> TrainingSetup:
    """A training on `images` from its first step to its last; TensorBoard is left out."""
    epoch_steps = steps_per_epoch(len(images), optim.batch_size, world.size, optim.accum_iter)
    order = (world.rank, world.size, 0, 0, optim.epochs * epoch_steps, optim.accum_iter)
    sampler = TrainSampler(len(images), optim.batch_size, *order)
    output.mkdir(exist_ok=True)
    return TrainingSetup(
        context=RunContext(run or run_config(output), world, device, precision, Console(quiet=True)),
        optim=optim,
        loader=train_loader(images, sampler, 0, pin_memory=device.type == "cuda"),
        steps_per_epoch=epoch_steps,
        log=RunLog(output, enabled=False),
        reporting=Reporting("train", at_epoch_end),
        name_of=lambda index: images.samples[index][0],
    )


def state_of(model: nn.Module, objective: Objective) -> TrainingState:
    return TrainingState(model, build_optimizer(model, 0.0, 0.05), objective)


class _NaNAt(Classification):
    """Not a number at one step: in the loss, or by an infinite slope only in the gradient."""

    def __init__(self, step: int, kind: str = "loss", rank: int = 0) -> None:
        super().__init__(AugmentConfig(), 10)
        self.left, self.kind, self.bad_rank = step, kind, rank

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        loss = super().loss(model, image, prepared)
        self.left -= 1
        if self.left >= 0:
            return loss
        return loss * math.nan if self.kind == "loss" else loss + (loss - loss.detach()).sqrt()


def state_after(count: int, folder: Path, output: Path, optim: OptimConfig) -> dict[str, Tensor]:
    """The same run without a fault, left after `count` steps."""
    state = state_of(classifier(), Classification(AugmentConfig(), 10))
    real = Trainer.train_step

    class Enough(Exception):
        pass

    def counted(trainer: Trainer) -> None:
        if trainer.state.step == count:
            raise Enough
        real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        with pytest.raises(Enough):
            Trainer(state, setup_for(still_images(folder), output, optim)).run()
    return dict(state.model.state_dict())
