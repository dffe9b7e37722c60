"""Flags of `mae-dat evaluate`."""

import dataclasses
from typing import Literal

from mae_dat.config.groups import default_num_workers


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """Benchmarks: which, from where, and how many images."""

    suite: tuple[str, ...] = ("all",)
    """all (whatever is present), or names: imagenet, imagenet-real, imagenet-v2, imagenet-a, imagenet-r,
    imagenet-sketch, stylized, objnet-113, objnet-1000, imagenet-c, imagenet-c-bar, cue-conflict; clean (val/CLASS of
    other classes); conflict (conflict/**/SHAPE-TEXTURE-*.png or .jpg of two of those); generated (15 corruptions x 5
    severities made from the clean images, reported apart); fgsm-1/255, pgd-5-1/255, pgd-20-l2-0.5, autoattack-4/255;
    words-random, words-symbolic."""
    data_path: str | None = None
    """Folder that holds the benchmarks' folders, or val/CLASS; `demo` for generated images (default: the environment
    variable MAE_DAT_DATA)."""
    partial: bool = False
    """Measure incomplete folders; their rows are marked."""
    subset: str | None = None
    """RobustBench's imagenet_test_image_ids.txt: of ImageNet and ImageNet-C, measure these 5,000 images alone."""
    limit: int | None = None
    """Images of each cell, drawn by --seed (default: all)."""
    seed: int = 0
    """Seed of all random draws: generated corruptions, random starts, random words, --limit."""
    held_out: bool = False
    """Also the 4 extra corruptions, which never count in a mean, where corruptions are made here."""
    tokenizer: str = "embedded"
    """Tokenizer of the words-* suites, as in training."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate models on every robustness benchmark in a folder, and write results.json and a report.

    Runs every benchmark found in --data_path and lists the ones that are missing: ImageNet's benchmarks in folders of
    their usual names, or DIR/val/CLASS/*.jpg for other classes. Several models become columns side by side. To resume
    an interrupted evaluation, run the same command again.
    """

    checkpoint: tuple[str, ...] = ()
    """Output folders, weights files, released names (`mae-dat list`) or .onnx files."""
    model: tuple[str, ...] = ()
    """Architecture, if a file does not contain it: one for all, or one each. With --pretrained: timm's names,
    hf-hub:OWNER/NAME too."""
    pretrained: bool = False
    """Evaluate the models of --model with timm's own weights."""
    names: tuple[str, ...] = ()
    """Titles of the columns (default: names of the folders or files)."""
    baseline: str | None = None
    """The column that others are compared with, which comes first (default: the first given)."""
    suites: SuiteConfig = SuiteConfig()
    output_dir: str = "output/evaluation"
    """Folder of results.json, the report, and cells/, the cache from which an interrupted evaluation resumes."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: each model's own)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation of resizing (default: each model's own)."""
    crop: float | None = None
    """The center crop's side over the resized image's (default: for --pretrained timm's crop_pct, with which its
    accuracies are published; else 7/8 up to 224 px, and 1 above)."""
    batch_size: int = 64
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images (default: the CPU cores of this process, at most 10; 0: the main process)."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware has it; attacks always compute in float32."""
    hang_minutes: float = 30.0
    """After so long without a batch, the run stops with code 75; 0 for never."""
    title: str = "Robustness"
    """Title of the report."""
