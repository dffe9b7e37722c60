"""Flags of `mae-dat pack`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Pack a folder of images into tar shards, for data beyond one disk or on a network file system.

    Writes OUT/train and OUT/val from DIR/train/CLASS/* and DIR/val/CLASS/*, or OUT from any folder of unlabeled images,
    in random order; every image is decoded once to check it. `--index DIR` only writes the index of existing shards.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of images: train/CLASS/* and val/CLASS/*, or any images at all."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = ""
    """New folder for the shards."""
    index: str | None = None
    """Instead: folder of *.tar shards that are there already, or of train and val with some; write their index."""
    classes: str | None = None
    """With --index: text file with the name of class 0 in its first line, of 1 in the second, and so on."""
    shard_mb: float = 256.0
    """Size of a shard, in MB (10^6 bytes)."""
    size: int | None = None
    """Shrink larger images to this shorter side in pixels and store them as JPEG (default: the files as they are).
    Training reads them several times as fast; 256 is usual for --input_size 224."""
    quality: int = 90
    """Quality of the JPEGs that --size stores."""
    labelled: bool = True
    """--no_labelled takes train and val as they are, without classes."""
    on_bad: Literal["fail", "skip"] = "fail"
    """An image that cannot be decoded: stop and name it, or leave it out."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""

    def __post_init__(self) -> None:
        if not self.shard_mb > 0 or (self.size is not None and self.size < 1) or not 1 <= self.quality <= 100:
            raise ConfigError("--shard_mb and --size must be above 0, --quality from 1 to 100.")
