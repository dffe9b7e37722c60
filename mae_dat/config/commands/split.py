"""Flags of `mae-dat split`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SplitConfig(CommandConfig):
    """Split a folder of class folders into train and val.

    Writes OUT/train/CLASS/* and OUT/val/CLASS/* from DIR/CLASS/*. Every class keeps its share in both. The choice is
    random, and the same for the same files and seed. Copies of an image in one class stay in one split. DIR is not
    changed.
    """

    verb = "split"
    source: str = dataclasses.field(metadata={"positional": "DIR"})
    """Folder with one folder of images per class."""
    out: str = dataclasses.field(metadata={"positional": "OUT"})
    """New folder for train and val."""
    val: float = 0.2
    """Share of each class for validation, at least one image."""
    link: bool = False
    """Make symbolic links to the images instead of copies."""
    seed: int = 0
    """Random seed of the choice."""

    def __post_init__(self) -> None:
        if not 0 < self.val < 1:
            raise ConfigError(f"--val {self.val:g}: the share must be above 0 and below 1, for instance 0.2.")
