"""Groups of flags with their defaults, named as in MAE's scripts. Those of adversarial training are in adversaries.py.

The configuration of a run (runs.py) is a frozen dataclass of groups. A field is a flag and a key of YAML files:
`OptimConfig.blr` is `--blr` and `blr`; its docstring is the flag's help. Importing this module does not import torch.
"""

import dataclasses
import math
import os
from typing import Literal

from mae_dat.config.errors import ConfigError

DATA_VARIABLE = "MAE_DAT_DATA"
DEMO = "demo"
"""As --data_path or --images: the generated images."""
MAX_DEFAULT_WORKERS = 10
ImageSize = tuple[int, int]
"""Height and width in pixels."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run: output, hardware and resuming. Of these only `seed`, `precision`, `device` and `compile` change the
    result."""

    output_dir: str = "./output_dir"
    """Checkpoints, log.txt, weights and reports. Running again with the same folder resumes."""
    log_dir: str | None = None
    """TensorBoard files (default: output_dir)."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA if there is any."""
    seed: int = 0
    resume: str | None = None
    """A checkpoint of this package, or a folder of them (default: the newest in output_dir); with --eval also a weights
    file or a released name."""
    start_epoch: int = 0
    """First epoch, if there is no checkpoint to resume from."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware supports it. fp32: float32 throughout. tf32: as fp32, but a GPU
    multiplies matrices in TF32, except the tokenizer's."""
    compile: bool = False
    """Compile each block of the model (torch.compile), which takes a minute or more at the start."""
    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass: less memory for one more forward pass; results are
    identical."""
    deterministic: bool = False
    """Use only algorithms that give bit-identical results on every run, also on a GPU (slower; on a CPU always)."""
    save_minutes: float = 10.0
    """Longest time between two checkpoints, besides the one at the end of every epoch."""
    keep: int = 2
    """Number of newest checkpoints to keep. The best one by the score of its epoch is kept too."""
    keep_every: int | None = None
    """Keep the checkpoint of every n-th epoch too (default: none)."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint although they change the result, such as `epochs blr`."""
    hang_minutes: float = 15.0
    """After this time without a step, log the stacks of all ranks and stop with exit code 75; 0 for never."""
    pictures_every: int = 1
    """Epochs between two galleries of images in TensorBoard and output_dir/pictures; 0 for none."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data: DIR/{train,val}/CLASS/*.jpg; for pretraining any folder of images."""

    data_path: str | None = None
    """Folder of images or of shards (`mae-dat pack`), the https:// address of shards, or `demo` for generated images
    (default: the environment variable MAE_DAT_DATA)."""
    input_size: tuple[int, ...] = (224,)
    """Side, or height and width, in pixels."""
    in_chans: int = 3
    on_bad: Literal["fail", "skip"] = "fail"
    """For a file that cannot be decoded: stop and name it, or use the next image in its place and count it."""
    num_workers: int = dataclasses.field(default_factory=lambda: default_num_workers())
    """Processes that decode images, per rank (default: the CPU cores of this process, at most 10; 0: none)."""
    pin_mem: bool = True
    """Pin host memory for faster transfers to a GPU (--no_pin_mem to turn off)."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"--num_workers must be 0 (decode in the main process) or more, got {self.num_workers}.")

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the input in pixels."""
        return image_size(self.input_size)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimization: AdamW, warm-up and half a cosine per iteration."""

    batch_size: int = 64
    """Per rank; the effective batch is batch_size x accum_iter x ranks."""
    epochs: int = 400
    accum_iter: int = 1
    """Micro-batches per update."""
    lr: float | None = None
    """Absolute peak rate (default: blr x effective batch / 256)."""
    blr: float = 1e-3
    """Peak rate for an effective batch of 256."""
    min_lr: float = 0.0
    warmup_epochs: float = 40
    warmup_lr: float = 0.0
    """Rate at the start of the warm-up."""
    cooldown_epochs: int = 0
    """Further epochs at min_lr, after --epochs."""
    weight_decay: float = 0.05
    clip_grad: float | None = None
    """Largest norm of the gradient (default: no clipping; the norm is logged in any case)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "accum_iter"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lr", "blr", "min_lr", "warmup_lr", "warmup_epochs", "cooldown_epochs", "weight_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"--{name} must be 0 or more, got {value}.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ConfigError(f"--clip_grad must be above 0, got {self.clip_grad}: leave it out for no clipping.")

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the cool-down included."""
        return self.epochs + self.cooldown_epochs


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Distributed: read from torchrun's or srun's environment; MAE's flags are accepted and need not be set."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2), for models too large for one GPU."""
    world_size: int = 1
    local_rank: int = -1
    dist_on_itp: bool = False
    dist_url: str = "env://"


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Model: a masked autoencoder."""

    model: str = "mae_vit_large_patch16"
    """mae_vit_{base,large}_patch16, mae_vit_huge_patch14, or mae_vit_demo_patch8 for 64 px."""
    mask_ratio: float = 0.75
    """Share of patches removed."""
    norm_pix_loss: bool = False
    """Predict pixels normalized by each patch's mean and deviation."""
    target: Literal["pixels", "words", "both"] = "pixels"
    """Prediction target at the removed patches: pixels, the visual words of --tokenizer (with or without --dat), or
    both."""
    words_weight: float = 0.1
    """With --target both: weight of the words' loss (nats per word), added to that of the pixels."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask_ratio must lie between 0 and 1, got {self.mask_ratio}.")
        if self.words_weight <= 0:
            raise ConfigError(
                f"--words_weight must be positive, got {self.words_weight}; without words: --target pixels."
            )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Model: any timm model; vit_{base,large}_patch16 and vit_huge_patch14 are MAE's variants of them."""

    model: str = "vit_large_patch16"
    """MAE's names, vit_demo_patch8, or any timm name."""
    nb_classes: int | None = None
    """Classes (default: the number of class folders)."""
    drop_path: float = 0.1
    global_pool: bool = True
    """Classify the mean of the patch tokens (default)."""
    cls_token: bool = False
    """Classify the class token instead."""
    finetune: str | None = None
    """Weights to start from: the folder of a pretraining run, a weights file, or a released name (`mae-dat list`)."""
    pretrained: bool = False
    """Start from timm's weights for a timm model."""
    linear_probe: bool = False
    """Train only a new head, behind a BatchNorm, on the frozen model. The defaults become MAE's linear probe: class
    token, LARS, blr 0.1, batch_size 512, 90 epochs, 10 of warm-up, no weight decay, crops and flips only."""
    opt: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimizer; lars and sgd have momentum 0.9. lars is meant for batches of several thousand images."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each layer to the one below it."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and exported instead of them (default:
    none)."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"--{name} must be in [0, 1), got {value}.")
        if self.pretrained and self.finetune:
            raise ConfigError(f"--pretrained and --finetune {self.finetune}: give one of them to start from.")

    @property
    def mean_pool(self) -> bool:
        """Whether the mean of the patch tokens is classified, and not the class token."""
        return self.global_pool and not self.cls_token


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation, with timm's names."""

    color_jitter: float | None = None
    """Only without --aa."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment policy; None for crops and flips only."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the share of the image's area that a crop covers."""
    smoothing: float = 0.1
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """const, rand or pixel fill with values in [0, 1]; pixel_raw fills with N(0, 1) as DAT's released code does, and
    works with neither --dat nor --at."""
    recount: int = 1
    resplit: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"

    def __post_init__(self) -> None:
        for name in ("smoothing", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} must be in [0, 1], got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: exact counts, no padding."""

    eval: bool = False
    """Only evaluate the weights of --resume."""
    dist_eval: bool = False
    """Accepted for compatibility with MAE; evaluation is always distributed over the ranks, and exact."""
    suite: tuple[str, ...] = ("clean",)
    """With --eval: clean accuracy; `corruptions`, also 15 corruptions x 5 severities and a report; or the suites of
    `mae-dat evaluate`."""
    limit: int | None = None
    """Images per corruption (default: all of the validation split)."""


def default_num_workers() -> int:
    """Return how many processes decode images by default: the CPU cores of this process, at most 10."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_DEFAULT_WORKERS, cores)


def image_size(sides: tuple[int, ...]) -> ImageSize:
    """Return height and width in pixels of `--input_size`, one or two sides. Raises ConfigError for anything else."""
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError(
            f"--input_size takes a side, or height and width, in pixels, got {' '.join(map(str, sides)) or 'nothing'}."
        )
    return sides[0], sides[-1]


def data_root(data_path: str | None) -> str:
    """Return the folder of images: the flag, or else $MAE_DAT_DATA. Raises ConfigError if neither is given."""
    root = data_path or os.environ.get(DATA_VARIABLE)
    if not root:
        raise ConfigError(
            f"no images: give --data_path DIR (with train/CLASS/*.jpg and val/CLASS/*.jpg), set {DATA_VARIABLE}, "
            "or try --data_path demo for generated images."
        )
    return root
