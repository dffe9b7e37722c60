"""Flags of `mae-dat attack`."""

import dataclasses
import math

from mae_dat.config.adversaries import AttackConfig, AttackKind
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers

_DETERMINISTIC = ("paper", "symbolic", "reconstruction")


@dataclasses.dataclass(frozen=True)
class AttackFolderConfig(CommandConfig):
    """Attack all training images of a folder once, and store the adversarial images.

    A trained classifier, the teacher, is attacked through the visual words of a tokenizer. `finetune --dat stored:OUT`
    and `pretrain --dat stored:OUT` then train on each image and its stored adversary, without a tokenizer in the step,
    as in Zhou et al. 2023 (arXiv 2311.01441). OUT also gets the words, and examples.png. Run the same command again to
    resume; several ranks share the work.
    """

    verb = "attack"
    checkpoint: str = ""
    """The teacher: output folder, weights file or released name of a classifier."""
    model: str | None = None
    """Architecture of the teacher, if the file does not contain it."""
    data_path: str | None = None
    """Folder with train/CLASS/*, or `demo` for generated images (default: $MAE_DAT_DATA)."""
    output_dir: str = "output/adversaries"
    """Folder for the adversarial images."""
    kind: AttackKind = "released"
    """The adversary: released, paper, symbolic, random (random words) or reconstruction (no word changed)."""
    share: float = 0.05
    """Share of the words to change. For released and paper, the eps that changes it is searched on 32 images."""
    eps: float | None = None
    """released, paper: the strength, instead of a share."""
    steps: int = 1
    """released, symbolic: number of gradient steps."""
    nearest: int | None = None
    """symbolic, random: replace a word only by one of the N words with the nearest codes."""
    rescore: int = 0
    """symbolic: candidates of each step whose loss is computed exactly."""
    variants: int = 1
    """Adversaries of each image, from different random starts or words. Training takes another one in every epoch."""
    tokenizer: str = "embedded"
    """Tokenizer: embedded, a file, or a released name."""
    size: int | None = None
    """Shorter side of the adversarial images in pixels (default: that of the teacher's images, divided by its crop)."""
    shards: bool = False
    """Store the images in tar shards with an index, instead of single files under the names of the originals."""
    quality: int = 95
    """Quality of the JPEG files, at full color resolution."""
    batch_size: int = 32
    """Images in a batch."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    seed: int = 0
    """Seed of the attacks."""

    def __post_init__(self) -> None:
        if self.variants < 1 or self.batch_size < 1:
            raise ConfigError("--variants and --batch_size must be at least 1.")
        if self.variants > 1 and self.kind in _DETERMINISTIC:
            raise ConfigError(f"--variants {self.variants}: --kind {self.kind} draws nothing at random; leave it out.")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"--quality must be from 1 to 100, got {self.quality}.")
        if self.size is not None and self.size < 8:
            raise ConfigError(f"--size must be at least 8 pixels, got {self.size}.")
        _ = self.attack  # which checks the other values

    @property
    def attack(self) -> AttackConfig:
        """The attack; its eps is not known yet where a share is to be held. Raises ConfigError."""
        moves_pixels = self.kind in ("released", "paper")
        if self.eps is not None and not moves_pixels:
            raise ConfigError(f"--eps is for --kind released and paper; with {self.kind} give --share.")
        try:
            return AttackConfig(
                self.kind,
                eps=math.nan if self.eps is None else self.eps,
                share=self.share if self.eps is None else None,
                steps=self.steps,
                nearest=self.nearest,
                rescore=self.rescore,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("--dat_", "--")) from error
