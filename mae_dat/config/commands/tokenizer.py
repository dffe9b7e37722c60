"""Flags of `mae-dat tokenizer train` and `mae-dat tokenizer distill`."""

import dataclasses
from typing import Literal

from mae_dat.config.groups import default_num_workers, image_size


@dataclasses.dataclass(frozen=True)
class TokenizerTrainingConfig:
    """Flags of every training of a light tokenizer: images, steps, output folder."""

    data_path: tuple[str, ...] = ("demo",)
    """Folders of images, or `demo` for the generated ones; DIR/train is taken where it exists."""
    val_path: tuple[str, ...] = ()
    """Held-out folders, without a split of their own, measured at the end; `demo` for the generated ones."""
    output_dir: str = "output/tokenizer"
    input_size: tuple[int, ...] = (64,)
    on_bad: Literal["fail", "skip"] = "fail"
    width: int = 64
    encoder_blocks: int = 2
    decoder_blocks: int = 4
    steps: int = 15000
    batch_size: int = 32
    lr: float = 2e-3
    save_every: int = 500
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's although they change the result, such as `steps lr`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_size(self.input_size)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(TokenizerTrainingConfig):
    """Train a light tokenizer on any folders of images. The defaults made the embedded one.

    The loss is reconstruction, vector quantization and a PatchGAN (Esser et al. 2021, eqs. 4-7) without the perceptual
    term. Codes that fall out of use restart on current latents. Writes OUT/tokenizer.safetensors, which is used as
    `--tokenizer OUT/tokenizer.safetensors`, and its card OUT/tokenizer.json. To resume, run the same command again.
    """

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


@dataclasses.dataclass(frozen=True)
class DistillConfig(TokenizerTrainingConfig):
    """Train a light student of a tokenizer, with the same words at a fraction of the cost.

    Factor, words and channels are the teacher's. Writes OUT/tokenizer.safetensors and its card. To resume, run the same
    command again.
    """

    teacher: str = "embedded"
    """Tokenizer to imitate: `embedded`, a released name, or a file."""
    width: int = 32
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    word_weight: float = 0.1
    """Weight of the words' cross-entropy beside the distance to the teacher's latents."""
