"""Groups of flags with their defaults, named as in MAE's scripts. Those of adversarial training are in adversaries.py.

The configuration of a run (runs.py) is a frozen dataclass of groups. A field is a flag and a key of YAML files:
`OptimConfig.blr` is `--blr` and `blr`; its docstring is the flag's help. Importing this module does not import torch.
"""

import dataclasses
import math
import os
import re
from typing import Literal

from mae_dat.config.errors import ConfigError
from mae_dat.config.limits import available_cores
from mae_dat.config.protocols import ProtocolName

DATA_VARIABLE = "MAE_DAT_DATA"
DEMO = "demo"
"""As --data_path or --images: the generated images."""
MAX_DEFAULT_WORKERS = 10
ImageSize = tuple[int, int]
"""Height and width in pixels."""
ClassOrder = Literal["auto", "text"]
"""How class folders without known names become outputs: by number, or sorted as text."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Output and hardware: of these flags only --seed, --precision, --device and --compile change the result."""

    output_dir: str = "./output_dir"
    """Folder for checkpoints, log.txt, weights and reports. To resume a run, give the same folder again."""
    log_dir: str | None = None
    """Folder for TensorBoard's files (default: the output folder)."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    seed: int = 0
    """Seed of all random numbers: weights, order of the images, augmentation, masks and attacks."""
    resume: str | None = None
    """Checkpoint of this package, or folder of them (default: the newest in the output folder). With --eval, and in
    pretraining, also a weights file or a released name; a pretraining then starts at epoch 0, as with --init."""
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
    """Settings that may differ from those of the checkpoint although they change the result, such as `epochs blr`;
    also `images` and `validation`."""
    hang_minutes: float = 15.0
    """After this time without a step, log the stacks of all ranks and stop with exit code 75; 0 for never."""
    log_every: int = 50
    """Steps between two points in steps.jsonl and TensorBoard; there are at least five in an epoch."""
    images_every: int = 1
    """Epochs between two galleries of images in TensorBoard and in OUT/images; 0 for none."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data: images in DIR/train/CLASS and DIR/val/CLASS; any images for pretraining; COCO's format for detection."""

    data_path: str | None = None
    """Folder of images or of shards (`mae-dat pack`), the https:// address of shards, or `demo` for generated images
    (default: $MAE_DAT_DATA)."""
    input_size: tuple[int, ...] = (224,)
    """Side, or height and width, in pixels."""
    in_chans: int = 3
    """Channels of the images: 3 for color, 1 for gray; in pretraining and fine-tuning also 2 (gray with alpha), 4
    (RGBA), or as many bands as TIFF files have."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do with a file that cannot be decoded: stop and name it, or use the next image and count it."""
    num_workers: int = dataclasses.field(default_factory=lambda: default_num_workers())
    """Processes that decode images, per rank; 0 decodes in the main process (default: the CPU cores, at most 10)."""
    pin_mem: bool = True
    """Pin host memory, for faster transfers to a GPU."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"--num_workers must be 0 (decode in the main process) or more, got {self.num_workers}.")
        if self.in_chans < 1:
            raise ConfigError(f"--in_chans must be at least 1, got {self.in_chans}.")
        image_size(self.input_size)

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the input in pixels."""
        return image_size(self.input_size)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimization: AdamW, warm-up and half a cosine per iteration."""

    batch_size: int = 64
    """Images in a batch of one rank. The effective batch is batch_size x accum_iter x ranks."""
    epochs: int = 400
    """Passes over the training images."""
    accum_iter: int = 1
    """Batches whose gradients are added up for one update."""
    lr: float | None = None
    """Highest learning rate (default: blr x effective batch / 256)."""
    blr: float = 1e-3
    """Highest learning rate for an effective batch of 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the last epoch."""
    warmup_epochs: float = 40
    """Epochs in which the learning rate rises linearly."""
    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_schedule: Literal["iteration", "epoch"] = "iteration"
    """iteration: the learning rate changes in every step, and its cosine starts after the warm-up (MAE). epoch: it is
    constant within an epoch, and its cosine counts all epochs (timm, DAT's released code)."""
    cooldown_epochs: int = 0
    """Further epochs at --min_lr, after --epochs."""
    weight_decay: float = 0.05
    """Weight decay of all weights except biases and norms."""
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
    """Distributed training: ranks are read from the environment that torchrun or srun sets."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer over the ranks (FSDP2), for models too large for one GPU."""
    world_size: int = 1
    """MAE's flag, accepted and ignored."""
    local_rank: int = -1
    """MAE's flag, accepted and ignored."""
    dist_on_itp: bool = False
    """MAE's flag, accepted and ignored."""
    dist_url: str = "env://"
    """MAE's flag, accepted and ignored."""


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Model: a masked autoencoder."""

    model: str = "mae_vit_large_patch16"
    """mae_vit_{tiny,small,base,large}_patch16, mae_vit_huge_patch14, or mae_vit_demo_patch8 for 64 px."""
    mask_ratio: float = 0.75
    """Share of the patches that are removed."""
    norm_pix_loss: bool = False
    """Predict pixels that are normalized by the mean and standard deviation of their patch."""
    target: Literal["pixels", "words", "both"] = "pixels"
    """Prediction target at the removed patches: pixels, the visual words of --tokenizer (with or without --dat), or
    both."""
    words_weight: float = 0.1
    """With --target both: weight of the words' loss (nats per word), added to that of the pixels."""
    init: str | None = None
    """Weights to start from: a file, the folder of a run, a released name (`mae-dat list`) or a timm ViT's name. What
    has another image size, patch or number of channels is resampled (default: random weights)."""
    decoder_warmup: float = 0.0
    """With --init: first epochs, in which the decoder alone is trained."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask_ratio must lie between 0 and 1, got {self.mask_ratio}.")
        if not 0 <= self.decoder_warmup < math.inf:
            raise ConfigError(f"--decoder_warmup must be 0 epochs or more, got {self.decoder_warmup}.")
        if self.words_weight <= 0:
            raise ConfigError(
                f"--words_weight must be above 0, got {self.words_weight}; for no words, give --target pixels."
            )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Model: one of MAE's vision transformers, or any timm model."""

    model: str = "vit_large_patch16"
    """vit_{tiny,small,base,large}_patch16, vit_huge_patch14, vit_demo_patch8 for 64 px, or any timm name."""
    nb_classes: int | None = None
    """Number of classes (default: the number of class folders)."""
    drop_path: float = 0.1
    """Probability of skipping the last block (stochastic depth); it falls linearly to 0 at the first block."""
    global_pool: bool = True
    """Classify the mean of the patch tokens."""
    cls_token: bool = False
    """Classify the class token instead of the mean."""
    finetune: str | None = None
    """Weights to start from: the folder of a pretraining run, a weights file, or a released name (`mae-dat list`)."""
    pretrained: bool = False
    """Start from timm's weights for a timm model."""
    train: str = "all"
    """What is trained: all; head, the last layer; last:K, the last K layers (blocks of a transformer) and what follows
    them; or norms, every norm and the head. The rest is frozen."""
    probe_epochs: float = 0.0
    """First epochs, in which only the head is trained, at the highest learning rate. Warm-up and cosine follow."""
    linear_probe: bool = False
    """--train head, with a new head behind a BatchNorm. The defaults become those of MAE's linear probe: class token,
    LARS, blr 0.1, batch_size 512, 90 epochs, 10 of them warm-up, no weight decay, crops and flips only."""
    opt: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimizer; lars and sgd have momentum 0.9, sgd Nesterov's as in timm. lars is meant for batches of several
    thousand images."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each layer to the one below it."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and exported in their place (default:
    no average)."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"--{name} must be in [0, 1), got {value}.")
        if not re.fullmatch(r"all|head|norms|last:[1-9]\d{0,3}", self.train):
            raise ConfigError(f"--train must be all, head, norms or last:K with K from 1 on, got {self.train}.")
        if self.linear_probe and self.train not in ("all", "head"):
            raise ConfigError(f"--linear_probe trains the head, and --train {self.train} more: leave out one of them.")
        if not 0 <= self.probe_epochs < math.inf:
            raise ConfigError(f"--probe_epochs must be 0 or more, got {self.probe_epochs}.")
        if self.probe_epochs and self.trains_head_alone:
            raise ConfigError(
                f"--probe_epochs {self.probe_epochs:g}: the head alone is trained in any case; leave it out."
            )
        if self.pretrained and self.finetune:
            raise ConfigError(f"--pretrained and --finetune {self.finetune}: give one of them to start from.")

    @property
    def trains_head_alone(self) -> bool:
        """Whether everything but the head is frozen in all epochs."""
        return self.linear_probe or self.train == "head"

    @property
    def mean_pool(self) -> bool:
        """Whether the mean of the patch tokens is classified, and not the class token."""
        return self.global_pool and not self.cls_token


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation: timm's flags."""

    color_jitter: float | None = None
    """Strength of random changes of brightness, contrast and saturation; used only without --aa (default: none)."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """Policy of AutoAugment, RandAugment or AugMix in timm's notation; None for crops and flips only."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the share of the image's area that a crop covers."""
    train_interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Interpolation of the crops of training images; random draws one of the two for each image (timm, DAT's released
    code)."""
    smoothing: float = 0.1
    """Label smoothing."""
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """What random erasing fills in: const, rand or pixel, values in [0, 1]; pixel_raw, N(0, 1) as in DAT's released
    code, works with neither --dat nor --at."""
    recount: int = 1
    """Number of regions that random erasing erases."""
    resplit: bool = False
    """With --jsd: erase nothing in the clean view."""
    mixup: float = 0.0
    """Alpha of Mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 for none."""
    cutmix_minmax: tuple[float, float] | None = None
    """Range of the share of an image that CutMix replaces; it takes the place of --cutmix."""
    mixup_prob: float = 1.0
    """Probability of Mixup or CutMix in a batch."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than Mixup, if both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """What shares one mixing factor: the batch, a pair of images, or each image has its own."""

    def __post_init__(self) -> None:
        for name in ("smoothing", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} must be in [0, 1], got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Loss, and what to do about classes with few images."""

    loss: Literal["ce", "bce"] = "ce"
    """ce: cross-entropy. bce: binary cross-entropy of each class, averaged over the classes."""
    class_weights: str | None = None
    """Weights of the classes in the loss: balanced (inverse to their numbers of images), or a YAML or JSON file with
    `class: weight` (default: no weights)."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """shuffle: every image once in an epoch. balanced: as many images of each class, repeated or left out at random."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: the validation images, each counted once."""

    eval: bool = False
    """Train nothing, and evaluate the weights of --resume."""
    dist_eval: bool = False
    """MAE's flag, accepted and ignored: evaluation is always distributed over the ranks, and exact."""
    suite: tuple[str, ...] = ("clean",)
    """With --eval: clean (the accuracy), generated (15 corruptions x 5 severities, with a report), or other suites of
    `mae-dat evaluate`."""
    limit: int | None = None
    """With --eval: images of each suite, and of each corruption and severity (default: all)."""
    limit_corrupted: int | None = None
    """With --eval: at most this many images for each corruption and severity, and under each attack (default: as
    --limit)."""
    restrict_classes: bool = False
    """With --eval: predict only among the classes that have validation images (default: among all outputs)."""
    classes: str | None = None
    """With --eval: text file with the names of the outputs, one on each line, which are those of the class folders
    (default: the names in the weights file)."""
    class_order: ClassOrder = "auto"
    """With --eval: which output a class folder is. auto: by name, WordNet id or number. text: folders sorted as text
    (0, 1, 10, 2), as torchvision's ImageFolder does, for weights trained with it."""
    protocol: ProtocolName = "native"
    """With --eval: how images are resized and cropped, as in `mae-dat evaluate`. native: as the model's own settings
    say. dat, imagenet-c, timm: as in published evaluations."""


def check_limits(limit: int | None, limit_corrupted: int | None) -> None:
    """Raise ConfigError for a limit below one image."""
    for flag, count in (("--limit", limit), ("--limit_corrupted", limit_corrupted)):
        if count is not None and count < 1:
            raise ConfigError(f"{flag} {count}: give at least 1 image, or None for all.")


def default_num_workers() -> int:
    """Return how many processes decode images by default: the CPU cores for this process, at most 10."""
    return min(MAX_DEFAULT_WORKERS, available_cores())


def image_size(sides: tuple[int, ...]) -> ImageSize:
    """Return height and width in pixels of `--input_size`, one or two sides. Raises ConfigError for anything else."""
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError(
            f"--input_size takes a side, or height and width, in pixels, got {' '.join(map(str, sides)) or 'nothing'}."
        )
    return sides[0], sides[-1]


def data_root(data_path: str | None, default: str | None = None) -> str:
    """Return the folder of images: the flag, else $MAE_DAT_DATA, else `default`. Raises ConfigError without any."""
    root = data_path or os.environ.get(DATA_VARIABLE) or default
    if not root:
        raise ConfigError(
            f"no images: give --data_path DIR (with train/CLASS/*.jpg and val/CLASS/*.jpg), set {DATA_VARIABLE}, "
            "or try --data_path demo for generated images."
        )
    return os.path.expanduser(root) if root.startswith("~/") else root
