"""Flags of `mae-dat pack`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class PackConfig(CommandConfig):
    """Pack a folder of images into tar shards, for data beyond one disk or on a network file system.

    Writes OUT/train and OUT/val from DIR/train/CLASS/* and DIR/val/CLASS/*, or OUT from any folder of unlabeled images,
    in random order. Every image is decoded once to check it. `--index DIR` only writes the index of existing shards.
    """

    verb = "pack"
    source: str = dataclasses.field(default="", metadata={"positional": "DIR"})
    """Folder of images: train/CLASS/* and val/CLASS/*, or images without labels."""
    out: str = dataclasses.field(default="", metadata={"positional": "OUT"})
    """New folder for the shards."""
    index: str | None = None
    """Write only the index of existing shards: a folder of *.tar files, or of train and val with such files."""
    classes: str | None = None
    """With --index: text file with the names of the classes, one on each line, from class 0."""
    shard_mb: float = 256.0
    """Size of a shard in MB (10^6 bytes)."""
    size: int | None = None
    """Shrink larger images to this shorter side in pixels and store them as JPEG, which training reads several times
    as fast; 256 is usual for --input_size 224 (default: the files as they are)."""
    quality: int = 90
    """JPEG quality of the images that --size stores, from 1 to 100."""
    labeled: bool = True
    """Take the subfolders of train and val as classes."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be decoded: stop and name it, or leave it out."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""

    def __post_init__(self) -> None:
        if not self.shard_mb > 0 or (self.size is not None and self.size < 1) or not 1 <= self.quality <= 100:
            raise ConfigError("--shard_mb and --size must be above 0, --quality from 1 to 100.")
