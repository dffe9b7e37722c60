"""Flags of `mae-dat visualize`: one configuration for each kind of gallery."""

import dataclasses
from typing import Literal

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO

_RELEASED_DAT = DatConfig("released")


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Images and galleries: what is drawn, and where it is written."""

    images: str = DEMO
    """An image, a folder of images of any depth, or `demo` for generated images."""
    output_dir: str = "output/images"
    """Folder for the PNG files."""
    log_dir: str | None = None
    """Folder for TensorBoard's files (default: the output folder)."""
    limit: int | None = 6
    """Number of images, evenly spread over the folder; None for all."""
    per_page: int = 6
    """Images in one gallery."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: those of the model)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    seed: int = 0
    """Seed of masks and attacks."""

    def __post_init__(self) -> None:
        for name in ("limit", "per_page"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Model: of this package, MAE, timm, easyrobust and others."""

    checkpoint: str = ""
    """Output folder, weights file, or released name (`mae-dat list`)."""
    model: str | None = None
    """Architecture, if the file does not contain it: mae_vit_base_patch16, vit_base_patch16, or any timm name."""


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Masked autoencoders: how an image is masked."""

    mask_ratio: float = 0.75
    """Share of the patches that are removed."""
    norm_pix_loss: bool | None = None
    """The decoder predicts normalized pixels (default: as the checkpoint records, otherwise off)."""


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig(CommandConfig):
    """Draw what a masked autoencoder fills in: masked image, prediction pasted into the visible patches, original."""

    verb = "visualize reconstruction"
    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    masking: MaskingConfig = MaskingConfig()


@dataclasses.dataclass(frozen=True)
class AttentionConfig(CommandConfig):
    """Draw where a vision transformer looks: the attention of one block, per head and averaged, over the image."""

    verb = "visualize attention"
    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    block: int | None = None
    """Number of the block, from 1 (default: the last)."""
    query: Literal["auto", "class", "mean"] = "auto"
    """Attention of the class token, or the mean over the patches; auto: as the model pools its tokens."""
    rollout: bool = False
    """Draw one map for all blocks up to --block, with the residual connections (Abnar & Zuidema 2020)."""


@dataclasses.dataclass(frozen=True)
class WordsConfig(CommandConfig):
    """Draw visual words: decoded images, each word alone, index maps, the most used words, the codebook."""

    verb = "visualize words"
    images: ImagesConfig = ImagesConfig()
    tokenizer: str = "embedded"
    """`embedded` (light, for 64 px), a light tokenizer's .safetensors file, a VQGAN of taming, latent-diffusion or
    easyrobust, or a released name such as vqgan_f8_16384."""


@dataclasses.dataclass(frozen=True)
class AdversaryConfig(CommandConfig):
    """Draw clean and adversarial images, their amplified difference, the changed words, and the model's predictions.

    The attack raises the loss of a classifier for the class of the image if its folder names one, otherwise for the
    predicted class, and the reconstruction loss of a masked autoencoder.
    """

    verb = "visualize adversary"
    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    dat: DatConfig = _RELEASED_DAT
    masking: MaskingConfig = MaskingConfig()
    amplify: float = 4.0
    """Factor by which the difference is amplified."""
