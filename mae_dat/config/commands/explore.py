"""Flags of `mae-dat explore`."""

import dataclasses

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO


@dataclasses.dataclass(frozen=True)
class ExploreConfig:
    """Explore an image on a local page: corrupt it or change its visual words, and compare classifiers' predictions.

    The page is served to this machine only, and it loads nothing from elsewhere.
    """

    checkpoint: tuple[str, ...] = ("mae_dat_demo",)
    """Classifiers, shown side by side: output folders, weights files or released names (`mae-dat list`)."""
    model: str | None = None
    """Their architecture, if the files do not contain it."""
    tokenizer: str = "embedded"
    """`embedded` (for 64 px), a light tokenizer's .safetensors, or a VQGAN."""
    images: str = DEMO
    """Folder of images to choose from, an image, or `demo` for generated ones."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: each checkpoint's)."""
    device: str = "auto"
    port: int = 0
    """Port of 127.0.0.1; 0 for any free one. Nothing is served to other machines."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint needs at least one classifier.")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port must lie between 0 and 65535, got {self.port}.")
