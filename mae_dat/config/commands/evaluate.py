"""Flags of `mae-dat evaluate`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.groups import ClassOrder, default_num_workers
from mae_dat.config.protocols import ProtocolName, check_protocol


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """Benchmarks: which, where they are, and how many images."""

    data_path: str | None = None
    """Folder that contains the folders of the benchmarks, or val/CLASS; `demo` for generated images (default:
    $MAE_DAT_DATA)."""
    suite: tuple[str, ...] = ("all",)
    """all (every suite whose images are found), or names: imagenet, imagenet-real, imagenet-v2, imagenet-a, imagenet-r,
    imagenet-sketch, stylized, objnet-113, objnet-1000, imagenet-c, imagenet-c-bar, imagenet-3dcc, laion-c,
    cue-conflict, tiny-imagenet-c, cifar-10-c, cifar-100-c; clean (val/CLASS of
    your own classes); conflict (images of conflict/ named SHAPE-TEXTURE-*, each part one of your classes);
    generated (15 corruptions x 5 severities made from the clean images, reported separately); fgsm-1/255, pgd-5-1/255,
    pgd-20-l2-0.5, autoattack-4/255; words-random, words-symbolic."""
    shifts: tuple[str, ...] = ()
    """Shifted images of your own: folders or CSV files, each with or without a name: DIR or NAME=DIR. Layouts:
    GROUP/CLASS/*, CLASS/*, CORRUPTION/SEVERITY/CLASS/* (`mae-dat corrupt`), or a CSV with the columns file, class and
    group. With them, the default of --suite is the clean images alone."""
    partial: bool = False
    """Measure incomplete folders too; their rows are marked."""
    restrict_classes: bool = False
    """Predict only among the classes that have images in a suite's folder (default: among all outputs of the model, or
    the classes that a benchmark prescribes)."""
    classes: str | None = None
    """Text file with the names of the models' outputs, one on each line, which are those of the class folders: for
    ONNX files and weights without names (default: the names in the files)."""
    class_order: ClassOrder = "auto"
    """Which output a class folder is. auto: by name, WordNet id or number. text: folders sorted as text (0, 1, 10, 2),
    as torchvision's ImageFolder does, for weights trained with it."""
    subset: str | None = None
    """RobustBench's imagenet_test_image_ids.txt: measure only these 5,000 images of ImageNet and ImageNet-C."""
    limit: int | None = None
    """Images of each suite, and of each corruption and severity, drawn by --seed (default: all)."""
    limit_corrupted: int | None = None
    """At most this many images for each corruption and severity, and under each attack, which take many forward
    passes (default: as --limit)."""
    seed: int = 0
    """Seed of generated corruptions, random starts, random words and the choice of --limit."""
    held_out: bool = False
    """In generated suites, measure also the 4 extra corruptions, which count in no mean."""
    tokenizer: str = "embedded"
    """Tokenizer of the suites words-*, as in training."""
    rescore: int = 100
    """words-symbolic: candidates of each step whose loss is computed exactly, each by a forward pass; 0 for the faster
    first-order choice, which is a weaker adversary. `--suite all` includes words-symbolic only with 0."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(CommandConfig):
    """Evaluate models on every robustness benchmark in a folder, and write results.json and a report.

    Runs every benchmark found in --data_path and lists the ones that are missing: ImageNet's benchmarks in folders of
    their usual names, or DIR/val/CLASS/*.jpg for other classes. Several models become columns side by side. To resume
    an interrupted evaluation, run the same command again.
    """

    verb = "evaluate"
    checkpoint: tuple[str, ...] = ()
    """Models: output folders, weights files, released names (`mae-dat list`) or .onnx files."""
    model: tuple[str, ...] = ()
    """Architecture, if a file does not contain it: one for all, or one for each. With --pretrained: timm's names, also
    hf-hub:OWNER/NAME."""
    pretrained: bool = False
    """Evaluate the models of --model with timm's own weights."""
    output_dir: str = "output/evaluation"
    """Folder for results.json, the report, and cells/, the cache from which an interrupted evaluation resumes."""
    names: tuple[str, ...] = ()
    """Titles of the columns (default: names of the folders or files)."""
    baseline: str | None = None
    """Title of the column that the others are compared with; it comes first (default: the first model)."""
    suites: SuiteConfig = SuiteConfig()
    protocol: ProtocolName = "native"
    """How images are resized and cropped. native: as each model's own settings say, and stored images (ImageNet-C)
    unchanged. imagenet-c: as in hendrycks/robustness. dat: as in DAT's released figures, stored images cropped too.
    timm: as in timm's validate.py."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: each model's own)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Interpolation when images are resized (default: each model's own)."""
    crop: float | None = None
    """Side of the center crop divided by that of the resized image (default: with --pretrained timm's crop_pct, as in
    its published accuracies; otherwise 7/8 up to 224 px and 1 above)."""
    batch_size: int = 64
    """Images in a batch."""
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    """Processes that decode images; 0 decodes in the main process (default: the CPU cores, at most 10)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware supports it. Attacks always compute in float32."""
    hang_minutes: float = 30.0
    """After this time without a batch, stop with exit code 75; 0 for never."""
    require: str | None = None
    """YAML file of requirements, such as `accuracy: ">= 80"`; if one is not met, the exit code is 79. Writes
    requirements.xml (JUnit) and requirements.json."""
    undecided: Literal["fail", "pass"] = "fail"
    """What a requirement does whose bound lies inside of the 95 % interval."""
    title: str = "Robustness"
    """Title of the report."""

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> Self:
        """Return the defaults: beside shifts of the user's own, only the clean images are measured."""
        config = cls()
        return dataclasses.replace(config, suites=SuiteConfig(suite=())) if values.get("shifts") else config

    def __post_init__(self) -> None:
        check_protocol(self.protocol, self.crop, self.interpolation)
