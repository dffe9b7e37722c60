"""Flags of `mae-dat corrupt`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError, listing
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class CorruptConfig(CommandConfig):
    """Write corrupted copies of a folder of images, with the corruptions of ImageNet-C.

    Writes OUT/CORRUPTION/SEVERITY/CLASS/* from DIR/CLASS/*, and OUT/manifest.jsonl with the sha256 of every file. The
    same images, flags and versions give the same bytes, for any number of workers. To resume an interrupted run, run
    the same command again.
    """

    verb = "corrupt"
    source: str = dataclasses.field(metadata={"positional": "DIR"})
    """Folder of images, usually one folder per class, or shards."""
    output_dir: str = "output/corrupted"
    """Folder for the copies. With more --corruptions or --severities later, only the missing copies are made."""
    corruptions: tuple[str, ...] = ("all",)
    """all (the 15 corruptions of ImageNet-C), extra (its 4 extra ones), or names such as fog gaussian_noise."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities, from 1 (weak) to 5 (strong)."""
    png: bool = False
    """Store lossless PNG files instead of JPEG, in which ImageNet-C is stored."""
    quality: int = 85
    """JPEG quality from 1 to 100; ImageNet-C has 85."""
    shards: bool = False
    """Write tar shards instead of single files: OUT/CORRUPTION/SEVERITY/*.tar."""
    shard_mb: float = 256.0
    """Size of a shard in MB (10^6 bytes)."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels to which images are resized and cropped before they are corrupted, as an
    evaluation does (default: images keep their size)."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of --input_size."""
    crop: float | None = None
    """Side of the center crop of --input_size divided by that of the resized image (default: 7/8 up to 224 px and 1
    above)."""
    seed: int = 0
    """Seed of the random draws. Each image draws from the seed and its position in DIR."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or not self.shard_mb > 0:
            raise ConfigError("--quality must be from 1 to 100, --shard_mb above 0.")
        if not self.severities or set(self.severities) - {1, 2, 3, 4, 5}:
            raise ConfigError(f"--severities {listing([*map(str, self.severities)])}: choose among 1, 2, 3, 4, 5.")
        if not self.corruptions:
            raise ConfigError("--corruptions is empty: give all, or names such as fog.")
        if self.crop is not None and not (0 < self.crop <= 1 and self.input_size):
            raise ConfigError(f"--crop {self.crop:g}: give a share above 0 and at most 1, together with --input_size.")
