"""Flags of `mae-dat features`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class FeaturesConfig(CommandConfig):
    """Extract features of images with any model, or classify images by their nearest neighbors.

    The model is a pretraining or a classifier; nothing is trained. The command runs in one process on one device.
    """

    verb = "features"
    checkpoint: str = ""
    """Output folder, weights file or released name of a pretraining or a classifier."""
    model: str | None = None
    """Architecture, if the file does not contain it."""
    data_path: str | None = None
    """Folder of images, or `demo` for generated images (default: $MAE_DAT_DATA)."""
    output_dir: str | None = None
    """Folder for features.npz or features.safetensors: features, labels (-1 for none) and paths (default: no file)."""
    format: Literal["npz", "safetensors"] = "npz"
    """Format of the file."""
    split: Literal["val", "train", "all"] = "val"
    """Images whose features are written: one split, or all images below the folder, without labels."""
    pool: Literal["cls", "mean", "tokens"] = "mean"
    """Features of an image: the class token, the mean over the patches, or the features of every patch."""
    knn: int | None = None
    """Classify the images of val by this number of nearest neighbors in train, usually 20."""
    knn_temperature: float = 0.07
    """With --knn: the vote of a neighbor is exp(cosine similarity / knn_temperature)."""
    corruptions: tuple[str, ...] = ()
    """Measure how stable the features and their nearest neighbors are under corruptions, without labels: all (the 15 of
    ImageNet-C), extra (its 4 extra ones), or names such as fog."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities of the corruptions."""
    neighbors: int = 10
    """Nearest neighbors that --corruptions compares."""
    limit: int | None = None
    """With --corruptions: number of images, drawn by --seed (default: all)."""
    seed: int = 0
    """Seed of the corruptions and of --limit."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: those of the model)."""
    batch_size: int = 64
    """Images in a batch."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware supports it."""

    def __post_init__(self) -> None:
        if self.neighbors < 1 or (self.limit is not None and self.limit < self.neighbors + 2):
            raise ConfigError("--neighbors must be at least 1, and --limit at least 2 more than --neighbors.")
        if self.corruptions and (self.pool == "tokens" or not set(self.severities) <= {1, 2, 3, 4, 5}):
            raise ConfigError("--corruptions needs --severities among 1 to 5, and --pool mean or cls.")
        if self.knn is not None and (self.knn < 1 or self.knn_temperature <= 0 or self.pool == "tokens"):
            raise ConfigError("--knn needs at least 1 neighbor, --knn_temperature above 0, and --pool mean or cls.")
