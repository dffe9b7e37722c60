"""Flags of `mae-dat detect`."""

import dataclasses
from dataclasses import field
from typing import Literal

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DataConfig, LaunchConfig, OptimConfig, RunConfig
from mae_dat.config.runs import check_groups

TRANSFORMERS = "vit_base_patch16, vit_large_patch16, vit_huge_patch14, vit_demo_patch8"


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Model: a torchvision detector, or Faster R-CNN on one of MAE's vision transformers."""

    model: str = "fasterrcnn_resnet50_fpn"
    """Any box detector of torchvision, or vit_{base,large}_patch16, vit_huge_patch14 or vit_demo_patch8 with a simple
    feature pyramid."""
    finetune: str | None = None
    """Weights to start the transformer from: the folder of a pretraining run, a weights file, or a released name
    (`mae-dat list`)."""
    pretrained: bool = False
    """Start a torchvision detector from its backbone's ImageNet weights, with frozen BatchNorm."""
    width: int = 256
    """Transformers: channels of the feature pyramid."""
    anchor_size: float = 32.0
    """Transformers: side of the smallest anchors in pixels; it doubles from map to map. 32 suits images of 800 px."""
    regions: int = 512
    """Transformers: regions of an image from which the box head learns in a step."""
    drop_path: float = 0.1
    """Probability of skipping the last block (stochastic depth); it falls linearly to 0 at the first block."""
    opt: Literal["adamw", "sgd"] = "adamw"
    """Optimizer; sgd has Nesterov momentum 0.9."""
    layer_decay: float = 0.75
    """Transformers: factor of the learning rate from each layer to the one below it."""
    scale_jitter: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale in training; 1 1 for none."""

    def __post_init__(self) -> None:
        is_transformer = self.model.startswith("vit_")
        if self.finetune and not is_transformer:
            raise ConfigError(
                f"--finetune starts a vision transformer ({TRANSFORMERS}), not {self.model}: use --pretrained for that."
            )
        if self.pretrained and is_transformer:
            raise ConfigError(
                f"{self.model} has no weights of its own: give --finetune FILE, or a torchvision detector's name."
            )
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ConfigError(f"--scale_jitter takes two positive factors, smaller first, got {self.scale_jitter}.")


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """Evaluation: mean average precision by COCO's rules."""

    eval: bool = False
    """Train nothing, and evaluate the weights of --resume."""
    corrupted: bool = False
    """With --eval: measure also under 15 corruptions, and write OUT/detection.json."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities of the corruptions."""
    limit: int | None = None
    """Images to measure on, evenly spread (default: all validation images)."""
    eval_every: int = 1
    """Epochs between evaluations in training; the last one is always evaluated."""


@dataclasses.dataclass(frozen=True)
class DetectConfig(CommandConfig):
    """Train an object detector, with --dat by Discrete Adversarial Training; --eval measures one.

    --data_path holds images with annotations in COCO's format. The adversary of --dat raises the total loss of the
    detector. To resume, run the same command again. `--eval --resume OUT` measures the mAP, with --corrupted also
    under 15 corruptions.
    """

    verb = "detect"
    data: DataConfig = field(default_factory=lambda: DataConfig(input_size=(800,)))
    run: RunConfig = field(default_factory=RunConfig)
    detector: DetectorConfig = DetectorConfig()
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(2, 50, blr=4e-4, warmup_epochs=1, weight_decay=0.1))
    dat: DatConfig = field(default_factory=DatConfig)
    measure: MeasureConfig = MeasureConfig()
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check_groups(self.dat, self.launch)
