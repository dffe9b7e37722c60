"""Flags of `mae-dat predict`."""

import dataclasses
import math
from typing import Literal

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


def _check_shares(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{name} {value:g}: give a number from 0 to 1.")


@dataclasses.dataclass(frozen=True)
class ProbabilityConfig:
    """Classifiers."""

    top_k: int = 5
    """Classes in each row, the most probable first."""
    classes: str | None = None
    """Text file with the names of the classes, one on each line (default: the names in the checkpoint; ImageNet's for
    1000 outputs; else numbers)."""
    temperature: float = 1.0
    """Divide the logits by this number before the softmax."""
    calibrate: str | None = None
    """Fit the temperature to the labeled images in DIR/val/CLASS, so that the probabilities match the accuracy."""
    abstain_below: float | None = None
    """Mark an image as abstained if its highest probability is lower than this."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top_k {self.top_k}: give at least 1 class.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature:g}: give a number above 0.")
        if self.temperature != 1 and self.calibrate is not None:
            raise ConfigError("--temperature and --calibrate: give one of them.")
        _check_shares(self, "abstain_below")


@dataclasses.dataclass(frozen=True)
class BoxConfig:
    """Detectors."""

    score_threshold: float = 0.5
    """Lowest score of a box."""
    draw: int = 100
    """Number of images to draw boxes on, from the first one on."""
    no_draw: bool = False
    """Draw no boxes."""

    def __post_init__(self) -> None:
        if self.draw < 0:
            raise ConfigError(f"--draw {self.draw}: give 0 or more images.")
        _check_shares(self, "score_threshold")

    @property
    def images_to_draw(self) -> int:
        """The number of images to draw boxes on."""
        return 0 if self.no_draw else self.draw


@dataclasses.dataclass(frozen=True)
class PredictConfig(CommandConfig):
    """Predict the classes of new images with their probabilities, or boxes with a detector.

    Writes predictions.csv and predictions.jsonl (also predictions.parquet, if pyarrow is installed). A detector also
    writes its boxes as COCO JSON and draws them. Unreadable files are listed in unreadable.txt.
    """

    verb = "predict"
    images: tuple[str, ...] = dataclasses.field(metadata={"positional": "IMAGES"})
    """Image files, folders of any depth and shards (`mae-dat pack`), in any mixture; `demo` for generated images."""
    checkpoint: str = ""
    """Classifier or detector: an output folder, a weights file, a released name (`mae-dat list`) or an .onnx file."""
    model: str | None = None
    """Architecture, if the file does not contain it. With --pretrained: timm's name, or hf-hub:OWNER/NAME."""
    pretrained: bool = False
    """Use --model with timm's own weights, without --checkpoint."""
    output_dir: str = "output/predictions"
    """Folder for the results."""
    probabilities: ProbabilityConfig = ProbabilityConfig()
    boxes: BoxConfig = BoxConfig()
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: the model's own)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation when images are resized (default: the model's own)."""
    crop: float | None = None
    """Side of the center crop divided by that of the resized image (default: as in `mae-dat evaluate`)."""
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
