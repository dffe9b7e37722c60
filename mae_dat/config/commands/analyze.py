"""Flags of `mae-dat analyze`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.groups import ClassOrder, default_num_workers

ANALYZED_VIEWS = (
    "reconstruction", "random", "released", "symbolic", "pixel", "pixel_length", "noise_length", "pixel_decoded",
)  # fmt: skip
"""Versions of an image that can be compared with the clean one."""
MIN_ANALYZED_IMAGES = 4  # two in each half: the variance of a single value is 0, which correlates with nothing
_MATCHED = ("pixel_length", "noise_length", "pixel_decoded")


@dataclasses.dataclass(frozen=True)
class AnalyzeConfig(CommandConfig):
    """Measure why discrete adversaries help, as Mao et al. 2022 explain it.

    Attacks each classifier with discrete and pixel adversaries on validation images. Measures how far the statistics
    inside the model (Fig. 2) and its features are from those of clean images, and what the perturbations look like
    (Fig. 3). The views pixel_length and noise_length change an image by the same L2 distance as DAT; pixel_decoded
    starts from the reconstruction and goes as far from it as DAT does. Writes analysis.json, analysis.html and
    figures/*.png.
    """

    verb = "analyze"
    checkpoint: tuple[str, ...] = ()
    """Classifiers: output folders, weights files or released names."""
    model: tuple[str, ...] = ()
    """Architecture, if a file does not contain it: one for all, or one for each. With --pretrained: timm's names."""
    pretrained: bool = False
    """Analyze the models of --model with timm's own weights."""
    names: tuple[str, ...] = ()
    """Titles of the models in the report (default: names of the folders or files)."""
    data_path: str | None = None
    """Folder with val/CLASS/*, or `demo` for generated images (default: $MAE_DAT_DATA)."""
    classes: str | None = None
    """Text file with the names of the models' outputs, one on each line (default: the names in the files)."""
    class_order: ClassOrder = "auto"
    """Which output a class folder is, as in `mae-dat evaluate`."""
    output_dir: str = "output/analysis"
    """Folder for analysis.json, analysis.html and figures/*.png."""
    limit: int | None = 256
    """Number of images, evenly spread; None for all."""
    views: tuple[str, ...] = ANALYZED_VIEWS
    """Versions of the images to compare with the clean ones: reconstruction, random, released, symbolic, pixel,
    pixel_length, noise_length, pixel_decoded (default: all)."""
    share: float = 0.05
    """Share of the words that the discrete adversaries change."""
    pixel_eps: float = 4 / 255
    """Radius of the pixel attack in Linf, for pixels in [0, 1]."""
    pixel_steps: int = 10
    """Gradient steps of the pixel attack."""
    tokenizer: str = "embedded"
    """Tokenizer of the discrete adversaries, as in training."""
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
        for view in self.views:
            if view not in ANALYZED_VIEWS:
                raise ConfigError(f"--views: unknown view {view!r}: {suggest(view, ANALYZED_VIEWS)}")
        if set(_MATCHED) & set(self.views) and "released" not in self.views:
            raise ConfigError(f"--views {', '.join(_MATCHED)} need released, whose length they match.")
        if self.limit is not None and self.limit < MIN_ANALYZED_IMAGES:
            raise ConfigError(f"--limit must be at least {MIN_ANALYZED_IMAGES}, got {self.limit}.")
