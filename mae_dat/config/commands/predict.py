"""Flags of `mae-dat predict`."""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Predict the classes of new images with their probabilities, or boxes with a detector.

    Writes predictions.csv and predictions.jsonl (predictions.parquet too, if pyarrow is installed). A detector also
    writes its boxes as COCO JSON and draws them. Unreadable files are listed in unreadable.txt. Give the images first,
    or after a flag of one value.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Files, folders of any depth, and shards (`mae-dat pack`), mixed; `demo` for generated images."""
    checkpoint: str = ""
    """Output folder, weights file, released name (`mae-dat list`) or .onnx file of a classifier or a detector."""
    model: str | None = None
    """Architecture, if the file does not contain it. With --pretrained: timm's name, or hf-hub:OWNER/NAME."""
    pretrained: bool = False
    """Predict with --model and timm's own weights, without --checkpoint."""
    classes: str | None = None
    """Text file with the name of the first class in its first line, and so on (default: names in the checkpoint;
    ImageNet's names for 1000 outputs; else numbers)."""
    output_dir: str = "output/predictions"
    """Folder for the results."""
    top_k: int = 5
    """Classes in each row, the most probable first."""
    temperature: float = 1.0
    """Divide the logits by this number before the softmax."""
    calibrate: str | None = None
    """Fit the temperature to the labeled images of DIR/val/CLASS, so that probabilities match the accuracy."""
    abstain_below: float | None = None
    """Mark images whose highest probability is lower as abstained."""
    score_threshold: float = 0.5
    """Lowest score of a box (detectors)."""
    draw: int = 100
    """Images to draw boxes on, the first ones (detectors)."""
    no_draw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw no boxes."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: the model's own)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of resizing (default: the model's own)."""
    crop: float | None = None
    """The center crop's side over the resized image's (default: that of `mae-dat evaluate`)."""
    batch_size: int = 64
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware has it."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top_k {self.top_k}: give at least 1 class.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature:g}: give a number above 0.")
        if self.temperature != 1 and self.calibrate is not None:
            raise ConfigError("--temperature and --calibrate: give one of them.")
        for name in ("abstain_below", "score_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"--{name} {value:g}: give a number from 0 to 1.")
        if self.draw < 0:
            raise ConfigError(f"--draw {self.draw}: give 0 or more images.")
