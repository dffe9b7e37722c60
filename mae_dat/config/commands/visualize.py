"""Flags of `mae-dat visualize`: one configuration for each kind of gallery."""

import dataclasses
from typing import Literal

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO

_RELEASED_DAT = DatConfig("released")


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Images: which, and where the galleries go."""

    images: str = DEMO
    """An image, a folder of any depth, or `demo` for generated ones."""
    limit: int | None = 6
    """Images, evenly spread over the folder (None: all)."""
    per_page: int = 6
    """Images in one gallery."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: the checkpoint's)."""
    output_dir: str = "output/images"
    """Folder for the PNG files."""
    log_dir: str | None = None
    """TensorBoard files (default: output_dir)."""
    device: str = "auto"
    seed: int = 0
    """Seed of masks and attacks."""

    def __post_init__(self) -> None:
        for name in ("limit", "per_page"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint: ours, or MAE's, timm's, easyrobust's, ..."""

    checkpoint: str = ""
    """Output folder, weights file, or released name (`mae-dat list`)."""
    model: str | None = None
    """Architecture, if the file does not contain it: mae_vit_base_patch16, vit_base_patch16, or any timm name."""


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Masked autoencoding."""

    mask_ratio: float = 0.75
    """Share of patches removed."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalized patches (default: as recorded in the checkpoint, else False)."""


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """Draw what a masked autoencoder fills in: masked image, prediction pasted into the visible patches, original."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    masking: MaskingConfig = MaskingConfig()


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Draw where a vision transformer looks: the attention of one block, per head and averaged, over the image."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    block: int | None = None
    """Block, from 1 (default: the last)."""
    query: Literal["auto", "class", "mean"] = "auto"
    """Whose attention: the class token's, the mean over the patches', or auto: what the model pools."""
    rollout: bool = False
    """One map of all blocks up to --block instead, through the residual connections (Abnar & Zuidema 2020)."""


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """Draw visual words: decoded images, each word alone, index maps, the most used words, the codebook."""

    images: ImagesConfig = ImagesConfig()
    tokenizer: str = "embedded"
    """`embedded` (for 64 px), a light tokenizer's .safetensors, or a VQGAN of taming, latent-diffusion or
    easyrobust."""


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """Draw clean and adversarial images, their amplified difference, the changed words, and the model's predictions.

    A classifier is attacked at the class of the image, if its folder names one, else at the predicted class; a
    masked autoencoder at its reconstruction loss."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    dat: DatConfig = _RELEASED_DAT
    masking: MaskingConfig = MaskingConfig()
    amplify: float = 4.0
    """Factor of the difference that is shown."""
