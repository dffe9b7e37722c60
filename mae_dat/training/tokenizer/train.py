"""Trains a light tokenizer on any folders of images: `python -m mae_dat train_tokenizer --data_path DIR ...
--output_dir OUT`.

Reconstruction + vector quantization + a PatchGAN (Esser et al. 2021, eqs. 4-7, without the perceptual term, whose
network would have to be downloaded), with codes that fell out of use restarted on current latents. A rerun of the same
command resumes. The result, `OUT/tokenizer.safetensors` with its card `OUT/tokenizer.json`, is used as `--tokenizer
OUT/tokenizer.safetensors`.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mae_dat.config.errors import InterruptError, NumericsError
from mae_dat.config.groups import image_size
from mae_dat.config.parse import command_line, load_config
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageFolder, Sample
from mae_dat.data.loader import ImageLoader, eval_loader, train_loader
from mae_dat.data.open import DEMO, image_root
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.modes import autocast
from mae_dat.models.tokenizer.light import LightConfig, LightTokenizer
from mae_dat.models.tokenizer.quantize import look_up, straight_through, vq_loss
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import step_generator
from mae_dat.runtime.signals import stop_requests
from mae_dat.storage.checkpoint import delete_unfinished, newest_checkpoint, save_checkpoint
from mae_dat.storage.files import prepare_output_folder, sha256_of
from mae_dat.storage.output_lock import lock_output_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FoldersConfig:
    """What every training of a light tokenizer needs: pictures, steps, place."""

    command: ClassVar[str]
    """Of the command."""
    data_path: tuple[str, ...] = ("demo",)
    """Folders of images, or `demo` for the generated ones; DIR/train is taken where it exists."""
    val_path: tuple[str, ...] = ()
    """Held-out folders, measured at the end as they are; `demo` for the generated ones."""
    output_dir: str = "./output_tokenizer"
    input_size: tuple[int, ...] = (64,)
    on_bad: Literal["fail", "skip"] = "fail"
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 4
    steps: int = 15000
    batch_size: int = 32
    lr: float = 2e-3
    save_every: int = 500
    num_workers: int = 2
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_size(self.input_size)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(FoldersConfig):
    """Training of a light tokenizer. The defaults made the embedded one."""

    command = "train_tokenizer"
    factor: int = 4
    """Pixels per word along a side."""
    num_words: int = 512
    word_dim: int = 8
    in_chans: int = 3
    beta: float = 0.25
    """Weight of the commitment loss."""
    gan_weight: float = 0.1
    """Gradient of the PatchGAN term relative to the reconstruction's at the last layer."""
    gan_start: float = 0.6
    """Share of the steps after which the PatchGAN joins."""
    restart_every: int = 100
    """Steps without use after which a code is restarted."""


class Trainer(Protocol):
    """What `train_to_file` trains."""

    tokenizer: LightTokenizer

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the step number."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""

    def step(self, step: int, image: Tensor) -> dict[str, float]:
        """One update on images (B, C, H, W) in [0, 1]; `loss` and `psnr`."""

    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """Figures on held-out pictures, for the card."""


class TokenizerTrainer:
    """Tokenizer, discriminator and their optimizers; `step` does one update of both."""

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        size = {field.name: getattr(config, field.name) for field in dataclasses.fields(LightConfig)}
        self.tokenizer = LightTokenizer(LightConfig(**size)).to(device)
        self.discriminator = NLayerDiscriminator(config.in_chans, ndf=32, n_layers=2).apply(weights_init).to(device)
        self.optimizer = torch.optim.Adam(self.tokenizer.parameters(), betas=(0.9, 0.99))
        self.judge = torch.optim.Adam(self.discriminator.parameters(), lr=config.lr / 4, betas=(0.5, 0.9))
        self.uses_K = torch.zeros(config.num_words, device=device)
        self.precision = amp_dtype(config.precision, device)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs beside the step number."""
        parts = {
            "tokenizer": self.tokenizer,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "judge": self.judge,
        }
        return {**{name: part.state_dict() for name, part in parts.items()}, "uses": self.uses_K}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        for name in ("tokenizer", "discriminator", "optimizer", "judge"):
            getattr(self, name).load_state_dict(state[name])
        self.uses_K = state["uses"].to(self.device)

    def step(self, step: int, image: Tensor) -> dict[str, float]:
        """One update on images (B, C, H, W) in [0, 1]. Raises NumericsError on a loss that is not finite, before the
        weights change."""
        config, tokenizer = self.config, self.tokenizer.train()
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(step, config.steps, config.lr)
        with autocast(self.device, self.precision):
            latent = tokenizer.latent(image).float()
            self.restart_codes(step, latent.detach())
            words = tokenizer.words_of(latent.detach())
            quantized = look_up(words, tokenizer.codebook)
            output = tokenizer.pixels(straight_through(latent, quantized)).float()
            self.uses_K += torch.bincount(words.flatten(), minlength=config.num_words)
            squared = F.mse_loss(output, image)
            reconstruction = F.l1_loss(output, image) + 5 * squared
            loss = reconstruction + vq_loss(latent, quantized, config.beta)
            if step >= config.gan_start * config.steps:
                loss = loss + self.adversarial(reconstruction, output)
        if not math.isfinite(loss.item()):
            raise NumericsError(
                f"the tokenizer's loss is {loss.item()} at step {step}: lower --lr (now {config.lr}). "
                "The last checkpoint is intact."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        self.optimizer.step()
        if step >= config.gan_start * config.steps:
            self.judge_step(image, output.detach())
        return {"loss": loss.item(), "psnr": -10 * math.log10(max(squared.item(), 1e-10))}

    def adversarial(self, reconstruction: Tensor, output: Tensor) -> Tensor:
        """The generator's loss, weighted so that at the last layer its gradient is `gan_weight` times the
        reconstruction's (eq. 7)."""
        self.discriminator.eval()
        fooling = -self.discriminator(2 * output - 1).float().mean()
        last = self.tokenizer.decoder[-2].weight
        assert isinstance(last, Tensor)
        (by_reconstruction,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (by_fooling,) = torch.autograd.grad(fooling, last, retain_graph=True)
        balance = (by_reconstruction.norm() / (by_fooling.norm() + 1e-6)).clamp(max=1e4).detach()
        return self.config.gan_weight * balance * fooling

    def judge_step(self, image: Tensor, output: Tensor) -> None:
        """One update of the PatchGAN discriminator with the hinge loss."""
        self.discriminator.train()
        with autocast(self.device, self.precision):
            real, fake = self.discriminator(2 * image - 1).float(), self.discriminator(2 * output - 1).float()
        self.judge.zero_grad(set_to_none=True)
        ((1 - real).relu().mean() + (1 + fake).relu().mean()).div(2).backward()
        self.judge.step()

    def restart_codes(self, step: int, latent: Tensor) -> None:
        """Places unused codes on random latents of this batch: all of them at step 0, later those unused for
        `restart_every` steps."""
        if step % self.config.restart_every or step > 0.8 * self.config.steps:
            return
        if not latent.isfinite().all():  # the loss will tell; until then the codes stay as they were
            return
        unused = self.uses_K == 0 if step else torch.ones_like(self.uses_K, dtype=torch.bool)
        flat = latent.permute(0, 2, 3, 1).flatten(0, 2)
        generator = step_generator(self.config.seed, step, 0, self.device)
        chosen = torch.randint(len(flat), (int(unused.sum()),), generator=generator, device=self.device)
        with torch.no_grad():
            self.tokenizer.codes[unused] = flat[chosen]
        self.uses_K.zero_()

    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """Figures on held-out pictures."""
        return measure_reconstruction(self.tokenizer, loader, self.device)


def cosine(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2)


@torch.no_grad()
def measure_reconstruction(tokenizer: LightTokenizer, loader: ImageLoader, device: torch.device) -> dict[str, float]:
    """PSNR in dB (mean over pictures, pixels in [0, 1]), L1, and the share of the codebook in use on held-out
    pictures."""
    tokenizer.eval()
    psnr, absolute, used, count = 0.0, 0.0, torch.zeros(tokenizer.num_words, device=device), 0
    for batch in loader:
        image = batch["image"].to(device)
        words = tokenizer.encode(image)
        error = tokenizer.decode(words) - image
        psnr += float((-10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()).sum())
        absolute += float(error.abs().mean((1, 2, 3)).sum())
        used += torch.bincount(words.flatten(), minlength=tokenizer.num_words)
        count += len(image)
    return {
        "psnr_db": psnr / count,
        "l1": absolute / count,
        "codebook_in_use": float((used > 0).float().mean()),
        "pictures": count,
    }


def train_transform(size: tuple[int, int]) -> v2.Transform:
    """Crops at many scales, flips and colour changes: a tokenizer must also draw pictures unlike its training set."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


class JoinedFolders(Dataset[Sample]):
    """The pictures of several folders, one after the other; keys as `ImageFolder`'s."""

    def __init__(self, folders: list[ImageFolder]) -> None:
        self.places = [(folder, index) for folder in folders for index in range(len(folder))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        folder, index = self.places[position]
        return folder[(epoch, index)]


def training_folders(config: FoldersConfig) -> JoinedFolders:
    """All pictures to train on; of a root with a `train_tokenizer` folder, those in it."""
    roots = [find_split(image_root(path), "train", labelled=False) for path in config.data_path]
    transform = train_transform(config.image_size)
    return JoinedFolders(
        [ImageFolder(root, transform, labelled=False, on_bad=config.on_bad, seed=config.seed) for root in roots]
    )


def held_out_folder(config: FoldersConfig, path: str) -> ImageFolder:
    """Pictures to measure on, as they are."""
    root = image_root(path) / "val" if path == DEMO else Path(path)
    return ImageFolder(root, EvalTransform(config.image_size), labelled=False, on_bad=config.on_bad)


def train_tokenizer(config: TokenizerConfig, console: Console) -> Path:
    """Trains a tokenizer and writes it with its card."""
    return train_to_file(TokenizerTrainer(config, pick_device(config.device)), config, console)


def train_to_file(trainer: Trainer, config: FoldersConfig, console: Console) -> Path:
    """Trains, or goes on where `output_dir` stands, and writes the tokenizer with its card. Raises InterruptError after
    a signal, once what was learned is saved."""
    output, data = prepare_output_folder(Path(config.output_dir)), training_folders(config)
    with lock_output_folder(output):
        delete_unfinished(output)
        found = newest_checkpoint(output)
        first = found.step if found else 0
        if found:
            logger.info("resuming from %s", found.path)
            trainer.load_state(found.load())
        start = time.monotonic()
        train_steps(trainer, data, first, config, console)
        return export(config, trainer, output, time.monotonic() - start)


def train_steps(trainer: Trainer, data: JoinedFolders, first: int, config: FoldersConfig, console: Console) -> None:
    """The steps from `first` to the last."""
    output, device = Path(config.output_dir), next(trainer.tokenizer.parameters()).device
    sampler = TrainSampler(len(data), config.batch_size, 0, 1, config.seed, first, config.steps)
    loader = train_loader(data, sampler, config.num_workers, pin_memory=device.type == "cuda")
    log, start = RunLog(output, resumed_step=first), time.monotonic()
    with console.task("train the tokenizer", config.steps, completed=first) as task, stop_requests() as stop:
        for step, batch in enumerate(loader, first):
            facts = trainer.step(step, batch["image"].to(device))
            rate = config.batch_size * (step + 1 - first) / (time.monotonic() - start)
            task.advance(f"{rate:.0f} images/s  loss {facts['loss']:.3f}  PSNR {facts['psnr']:.1f} dB")
            if (step + 1) % 100 == 0:
                log.record({"step": step + 1, **facts})
                log.scalars({f"tokenizer/{key}": value for key, value in facts.items()}, step + 1)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop.signal:
                save_checkpoint(output, step + 1, trainer.state())
            if stop.signal:
                raise InterruptError(f"stopped at step {step + 1}; saved in {output}.", stop.exit_code)
    log.close()


def export(config: FoldersConfig, trainer: Trainer, output: Path, seconds: float) -> Path:
    """Writes `tokenizer.safetensors` and its card: settings, held-out figures, sha256."""
    path = output / "tokenizer.safetensors"
    trainer.tokenizer.save(path)
    held_out = {}
    for root in config.val_path:
        loader = eval_loader(held_out_folder(config, root), config.batch_size, 0, 1, config.num_workers)
        held_out["/".join(Path(root).parts[-2:])] = facts = trainer.measure(loader)
        logger.info("held out, %s: %s", root, facts)
    card = {
        "sha256": sha256_of(path),
        "command": command_line(config.command),
        "settings": dataclasses.asdict(config),
        "held_out": held_out,
        "seconds_of_the_last_session": round(seconds),
        "torch": str(torch.__version__),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    logger.info("wrote %s", path)
    return path


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = Console()
    console.start_logging()
    train_tokenizer(load_config(TokenizerConfig, arguments, __doc__ or ""), console)
