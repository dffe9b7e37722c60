"""Flags of `mae-dat explore`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO


@dataclasses.dataclass(frozen=True)
class ExploreConfig(CommandConfig):
    """Explore an image on a local page: corrupt it or change its visual words, and compare predictions of classifiers.

    The page is served to this machine only, and it loads nothing from elsewhere.
    """

    verb = "explore"
    checkpoint: tuple[str, ...] = ("mae_dat_demo",)
    """Classifiers, shown side by side: output folders, weights files or released names (`mae-dat list`)."""
    model: str | None = None
    """Architecture of the classifiers, if the files do not contain it."""
    images: str = DEMO
    """Folder of images to choose from, one image, or `demo` for generated images."""
    tokenizer: str = "embedded"
    """`embedded` (light, for 64 px), a light tokenizer's .safetensors file, or a VQGAN."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: those of each classifier)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    port: int = 0
    """Port on 127.0.0.1; 0 for any free one."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("--checkpoint needs at least one classifier.")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port must lie between 0 and 65535, got {self.port}.")
