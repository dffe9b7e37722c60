"""Flags of `mae-dat features`."""

import dataclasses
from typing import Literal

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Extract features of images with any model, or classify images by their nearest neighbors.

    The model is a pretraining or a classifier; nothing is trained. The command runs in one process on one device.
    """

    checkpoint: str = ""
    """Output folder, weights file or released name of a pretraining or a classifier."""
    model: str | None = None
    """Architecture, if the file does not contain it."""
    data_path: str | None = None
    """Folder of images, or `demo` (default: the environment variable MAE_DAT_DATA)."""
    split: Literal["val", "train", "all"] = "val"
    """Images for --output_dir: a split, or everything below data_path, unlabelled."""
    pool: Literal["cls", "mean", "tokens"] = "mean"
    """Class token, mean over the patches, or the features of every patch."""
    output_dir: str | None = None
    """Folder for features.npz or features.safetensors: features, labels (-1: none) and paths."""
    format: Literal["npz", "safetensors"] = "npz"
    """Format of that file."""
    knn: int | None = None
    """Neighbors, usually 20: classify the val split by the train split's images."""
    temperature: float = 0.07
    """A neighbor's vote is exp(cosine similarity / temperature)."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: the model's)."""
    batch_size: int = 64
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self) -> None:
        if self.knn is not None and (self.knn < 1 or self.temperature <= 0 or self.pool == "tokens"):
            raise ConfigError("--knn needs at least 1 neighbor, a temperature above 0, and --pool mean or cls.")
