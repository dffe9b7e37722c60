"""Flags of `mae-dat tokenizer train` and `mae-dat tokenizer distill`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.groups import DEMO, data_root, default_num_workers, image_size


@dataclasses.dataclass(frozen=True)
class TokenizerTrainingConfig(CommandConfig):
    """Flags of every training of a light tokenizer: images, steps, output folder."""

    data_path: tuple[str, ...] = ()
    """Folders of images, with or without a subfolder train (default: $MAE_DAT_DATA, or `demo` for generated images)."""
    val_path: tuple[str, ...] = ()
    """Folders of other images, measured at the end; `demo` for generated images (default: none)."""
    output_dir: str = "output/tokenizer"
    """Folder for tokenizer.safetensors, its card tokenizer.json, and checkpoints. To resume, give it again."""
    input_size: tuple[int, ...] = (64,)
    """Side, or height and width, in pixels."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be decoded: stop and name it, or use the next image and count it."""
    width: int = 64
    """Channels of the tokenizer's blocks."""
    encoder_blocks: int = 2
    """Blocks of the encoder."""
    decoder_blocks: int = 4
    """Blocks of the decoder."""
    steps: int = 15000
    """Training steps."""
    batch_size: int = 32
    """Images in a batch."""
    lr: float = 2e-3
    """Highest learning rate."""
    save_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 100
    """Steps between two points in steps.jsonl and TensorBoard."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware supports it."""
    seed: int = 0
    """Seed of all random numbers."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint although they change the result, such as `steps lr`."""

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders of images: --data_path, $MAE_DAT_DATA or `demo`."""
        return self.data_path or (data_root(None, DEMO),)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return image_size(self.input_size)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(TokenizerTrainingConfig):
    """Train a light tokenizer on any folders of images. The defaults are those of the embedded tokenizer.

    The loss is reconstruction, vector quantization and a PatchGAN (Esser et al. 2021, eqs. 4-7) without the perceptual
    term. Codes that are no longer used restart at current latents. Use the result with `--tokenizer
    OUT/tokenizer.safetensors`. To resume, run the same command again.
    """

    verb = "tokenizer train"
    factor: int = 4
    """Pixels of a word along each side."""
    num_words: int = 512
    """Words in the codebook."""
    word_dim: int = 8
    """Dimensions of a code."""
    in_chans: int = 3
    """Channels of the images: 3 for color, 1 for gray."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    gan_weight: float = 0.1
    """Gradient of the PatchGAN's loss at the last layer, relative to that of the reconstruction."""
    gan_start: float = 0.6
    """Share of the steps before the PatchGAN starts."""
    restart_every: int = 100
    """Steps without use after which a code restarts."""


@dataclasses.dataclass(frozen=True)
class DistillConfig(TokenizerTrainingConfig):
    """Train a light student of a tokenizer, with the same words at a fraction of the cost.

    Factor, words and channels are those of the teacher. Use the result with `--tokenizer OUT/tokenizer.safetensors`. To
    resume, run the same command again.
    """

    verb = "tokenizer distill"
    teacher: str = "embedded"
    """Tokenizer to imitate: `embedded`, a released name, or a file."""
    width: int = 32
    """Channels of the tokenizer's blocks."""
    encoder_blocks: int = 1
    """Blocks of the encoder."""
    decoder_blocks: int = 2
    """Blocks of the decoder."""
    word_weight: float = 0.1
    """Weight of the cross-entropy of the words, relative to the distance to the teacher's latents."""
