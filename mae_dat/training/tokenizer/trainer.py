"""What every training of a light tokenizer shares: settings, images, its variant of the training loop, the exported
file.

It counts steps instead of epochs: for the loop, each step is an epoch of its own, and checkpoints come every
`save_every` steps.
"""

import hashlib
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from mae_dat.config.commands.tokenizer import TokenizerTrainingConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flat_values
from mae_dat.config.groups import DEMO, DataConfig, LaunchConfig, OptimConfig, RunConfig
from mae_dat.config.parse import command_line
from mae_dat.data.decode import describe_decoding
from mae_dat.data.describe import describe_ignored, describe_root, describe_size, describe_split, split_details
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import Batch, ImageFolder, ImageSet, Sample
from mae_dat.data.loader import ImageLoader, eval_loader
from mae_dat.data.open import image_root
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.describe import describe_model
from mae_dat.models.tokenizer.light import LightTokenizer
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import InputSummary
from mae_dat.runtime.world import world_from_environment
from mae_dat.training.context import RunContext, run_context
from mae_dat.training.describe import add_on_bad
from mae_dat.training.export import TOKENIZER_FILE, write_export
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.base import Objective
from mae_dat.training.optim import set_lr
from mae_dat.training.session import TrainingRecord, run_training
from mae_dat.training.setup import Reporting
from mae_dat.training.state import TrainingState
from mae_dat.training.step_report import StepReport

logger = logging.getLogger(__name__)


class TokenizerObjective(Objective):
    """What a light tokenizer is trained for, with the tokenizer and all else that training changes."""

    tokenizer: LightTokenizer
    steps_done = 0

    def __init__(self, config: TokenizerTrainingConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def begin(self, epoch: float) -> None:
        """Start a step; an epoch is one step."""
        self.steps_done = round(epoch)

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, torch.Generator]:
        """Return the image, (B, C, H, W) in [0, 1], and the generator of the step."""
        return batch["image"], generator

    def loss(self, model: nn.Module, image: Tensor, context: torch.Generator) -> Tensor:
        """Compute the loss of an image (B, C, H, W), a float32 scalar."""
        return self.parts(model, image, context)["loss"]

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the tokenizer."""

    def changed_in_forward(self) -> Iterable[Tensor]:
        """Return the tensors that a forward pass changes."""
        return ()

    def after_update(self, skip: Tensor) -> None:
        """Train what has an optimizer of its own, except where `skip`, a scalar on the device, is 1."""

    def logged(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return what the log shows of metrics: the loss, the PSNR in dB and the norm of the gradient."""
        psnr = -10 * math.log10(max(means["squared_error"], 1e-10))
        return {"loss": means["loss"], "psnr": psnr, **{name: means[name] for name in ("grad_norm",) if name in means}}

    def teacher_in_words(self) -> str:
        """Describe the tokenizer that is imitated; empty if there is none."""
        return ""

    @abstractmethod
    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """Return figures on held-out images, for the card."""


class TokenizerState(TrainingState):
    """The state of a tokenizer's training."""

    def load_state_dict(self, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """Load the content of a checkpoint, also of the format that the tokenizers' own loop wrote before."""
        if "tokenizer" in state:
            state = {
                "model": state["tokenizer"],
                "optimizer": state["optimizer"],
                "objective": {name: state[name] for name in ("discriminator", "judge", "uses") if name in state},
                "ema": None,
                "step": state["step"],
                "ranks": [{"totals": {}, "heard": [], "statistics": {}}],
            }
        super().load_state_dict(state, rank, ranks)


class TokenizerTrainer(Trainer):
    """The training loop with a schedule, checkpoints and a log by steps."""

    advice = "Lower --lr, or use --precision fp32"
    last_metrics: Mapping[str, float]

    @property
    def objective(self) -> TokenizerObjective:
        """The objective, with the settings."""
        assert isinstance(self.state.objective, TokenizerObjective)
        return self.state.objective

    @property
    def epoch_is_over(self) -> bool:
        """Whether a checkpoint is due: every `save_every` steps, and at the end."""
        step = self.state.step
        return step % self.objective.config.save_every == 0 or step == self.setup.total_steps

    def set_learning_rate(self) -> None:
        """Set the rate of the current step: warm-up, then half a cosine to a hundredth of the peak."""
        config = self.objective.config
        set_lr(self.state.optimizer, cosine(self.state.step, config.steps, config.lr))

    def apply_gradient(self) -> Tensor:
        """Update the tokenizer, then what else the objective trains."""
        grad_norm = super().apply_gradient()
        self.objective.after_update(self.reports.skip_updates)
        return grad_norm

    def changed_in_forward(self) -> Iterable[Tensor]:
        """Return the buffers, and what the objective changes."""
        return [*super().changed_in_forward(), *self.objective.changed_in_forward()]

    def add_metrics(self, report: StepReport) -> None:
        """Log a step's metrics, and keep them for the progress bar."""
        super().add_metrics(report)
        self.last_metrics = report.metrics[-1]

    def progress_note(self) -> str:
        """Return loss and PSNR of the newest step that was read."""
        shown = self.objective.logged(self.last_metrics) if math.isfinite(self.loss) else {"psnr": math.nan}
        return f"loss {self.loss:.3f}  PSNR {shown['psnr']:.1f} dB"

    def end_epoch(self) -> None:
        """Start new totals: the log has points alone, and nothing is evaluated before the end."""
        self.state.totals = {}


def cosine(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2)


def train_transform(size: tuple[int, int]) -> v2.Transform:
    """Return crops at many scales, flips and color changes, to an image (C, H, W) in [0, 1].

    A tokenizer must also reconstruct images unlike its training set.
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class JoinedFolders(ImageSet):
    """The images of several folders, one folder after the other; without labels."""

    def __init__(self, folders: list[ImageFolder]) -> None:
        self.folders, self.classes = folders, []
        self.places = [(folder, index) for folder in folders for index in range(len(folder))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        folder, index = self.places[position]
        return {**folder[(epoch, index)], "index": position}

    def name_of(self, index: int) -> str:
        """Return the path of an image."""
        folder, number = self.places[index]
        return folder.name_of(number)

    def fingerprint(self) -> str:
        """Return a sha256 of the folders' fingerprints."""
        return hashlib.sha256("".join(folder.fingerprint() for folder in self.folders).encode()).hexdigest()


def training_folders(config: TokenizerTrainingConfig) -> JoinedFolders:
    """Open all images to train on; of a root with a `train` folder, those in it."""
    roots = [find_split(image_root(path), "train", labeled=False) for path in config.roots]
    transform = train_transform(config.image_size)
    return JoinedFolders(
        [ImageFolder(root, transform, labeled=False, on_bad=config.on_bad, seed=config.seed) for root in roots]
    )


def held_out_folder(config: TokenizerTrainingConfig, path: str) -> ImageFolder:
    """Open images to measure on, without augmentation."""
    root = image_root(path) / "val" if path == DEMO else Path(path)
    return ImageFolder(root, EvalTransform(config.image_size), labeled=False, on_bad=config.on_bad)


def train_to_file(
    config: TokenizerTrainingConfig,
    console: Console,
    objective_class: type[TokenizerObjective],
    trainer_class: type[TokenizerTrainer] = TokenizerTrainer,
) -> Path:
    """Train, or resume in the output folder, and write the tokenizer with its card; returns its path.

    Raises ConfigError under torchrun, and what `run_training` raises.
    """
    if world_from_environment().size > 1:
        raise ConfigError("a tokenizer is trained by one process: start the command without torchrun or srun.")
    run = RunConfig(
        output_dir=config.output_dir,
        device=config.device,
        seed=config.seed,
        precision=config.precision,
        allow_change=config.allow_change,
        log_every=config.log_every,
    )
    with run_context(run, LaunchConfig(), console) as context:
        start = time.monotonic()
        objective = objective_class(config, context.device)
        images = training_folders(config)
        record = run_training(
            TokenizerState(objective.tokenizer, objective.build_optimizer(), objective),
            images,
            context,
            data=DataConfig(num_workers=config.num_workers),
            optim=tokenizer_optim(config),
            settings=flat_values(config),
            inputs=lambda: tokenizer_inputs(config, objective, images),
            reporting=Reporting("train the tokenizer", by_epochs=False),
            trainer_class=trainer_class,
            epoch_steps=1,
        )
        return export_tokenizer(config, objective, context, record, seconds=time.monotonic() - start)


def tokenizer_inputs(
    config: TokenizerTrainingConfig, objective: TokenizerObjective, images: JoinedFolders
) -> InputSummary:
    """Return the summary of what the training of a tokenizer reads."""
    inputs = InputSummary(config.verb)
    inputs.add("data", *(describe_root(path, image_root(path)) for path in config.data_path))
    for path, folder in zip(config.data_path, images.folders, strict=True):
        root = image_root(path)
        inputs.add("training", describe_split(folder, root if len(images.folders) == 1 else root.parent))
        inputs.details[f"training on {path}"] = split_details(folder)
    inputs.add(
        "validation", *(str(Path(path).absolute()) if path != DEMO else f"{DEMO}, val/" for path in config.val_path)
    )
    inputs.add("left out", describe_ignored([folder.ignored_files for folder in images.folders], ""))
    inputs.add("decoding", describe_decoding())
    add_on_bad(inputs, config.on_bad)
    tokenizer = objective.tokenizer
    words = f"factor {tokenizer.factor}, {tokenizer.num_words:,} words"
    inputs.add("model", f"{describe_model('light tokenizer', tokenizer)}, {words}")
    inputs.add("weights", "random", objective.teacher_in_words())
    inputs.add(
        "pixels",
        f"{describe_size(config.image_size)}, no normalization",
        "training: random crop of 25 to 100 % of the area, bicubic, flip, color jitter",
    )
    return inputs


def tokenizer_optim(config: TokenizerTrainingConfig) -> OptimConfig:
    """Return the loop's settings; the learning rate follows `cosine` instead of the loop's own schedule."""
    return OptimConfig(batch_size=config.batch_size, epochs=config.steps, lr=config.lr, warmup_epochs=0, clip_grad=1.0)


def export_tokenizer(
    config: TokenizerTrainingConfig,
    objective: TokenizerObjective,
    context: RunContext,
    record: TrainingRecord,
    seconds: float,
) -> Path:
    """Write `tokenizer.safetensors` and its card: the settings that it was trained with and their changes within the
    training, figures on held-out images, sha256; return the path."""
    path, tokenizer = context.output / TOKENIZER_FILE, objective.tokenizer
    held_out = {}
    for root in config.val_path:
        folder = held_out_folder(config, root)
        loader = eval_loader(folder, config.batch_size, rank=0, world_size=1, num_workers=config.num_workers)
        held_out["/".join(Path(root).parts[-2:])] = figures = objective.measure(loader)
        logger.info("held out, %s: %s", root, figures)
    facts = {
        "command": command_line(),
        "settings": record.settings,
        **({"changes": record.changes} if record.changes else {}),
        "held_out": held_out,
        "seconds_of_the_last_session": round(seconds),
        "torch": str(torch.__version__),
    }
    write_export(path, dict(tokenizer.state_dict()), tokenizer.metadata, facts)
    return path
