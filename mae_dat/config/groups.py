"""Every flag and its default, by the names of MAE's scripts.

A run's configuration is a frozen dataclass of groups: `OptimConfig.blr` is `--blr` and the YAML key `blr`. Importing
this module does not import torch.
"""

import dataclasses
import logging
import math
import os
from typing import Literal

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import suggest

logger = logging.getLogger(__name__)

DATA_VARIABLE = "MAE_DAT_DATA"
PUBLISHED_EPS, PUBLISHED_SHARE = 0.1, 0.038  # Mao et al. 2022, Table 8: what VQGAN f8 makes of an L2 step of 0.1
ATTACK_KINDS = ("released", "paper", "symbolic", "random", "reconstruction")


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """A discrete adversary (Mao et al. 2022): which one, and how strong."""

    kind: Literal["released", "paper", "symbolic", "random", "reconstruction"] = "released"
    eps: float = math.nan
    """`released`: radius of the L2 ball per image, pixels in [0, 1], and size of the step. `paper`: alpha, the factor
    of the gradient. Where none is given: 0.1; with a share, nan, which is to be found."""
    share: float | None = None
    """`symbolic`, `random`: the share of words replaced (0.05 if None). `released`, `paper`: the share of changed words
    in (0, 1) that a `ShareController` (WithDAT has one) holds from batch to batch by adjusting eps; a single attack
    changes what its eps changes."""
    random_start: float = 0.8
    """`released`: probability, drawn once per batch and rank, of starting from a random point of the ball."""
    steps: int = 1
    """`released`, `symbolic`: gradient steps."""
    nearest: int | None = None
    """`symbolic`, `random`: a word becomes one of so many whose codes are nearest to its own (None: any word)."""
    at: Literal["reconstruction", "image"] = "reconstruction"
    """`released`: what is attacked, Q(x) or x."""
    free: bool = False
    """`released`: the attack takes its gradient from the clean view's backward pass."""
    batch_share: float = 1.0
    """Share of each batch that is attacked."""
    warmup: float = 0.0
    """Epochs in which the strength grows from 0: `scaled(ramp(epoch))`."""

    def __post_init__(self) -> None:
        if math.isnan(self.eps) and (self.share is None or not self.moves_pixels):
            object.__setattr__(self, "eps", PUBLISHED_EPS)
        if self.kind not in ATTACK_KINDS:
            raise ConfigError(f"unknown attack {self.kind!r}: {suggest(self.kind, ATTACK_KINDS)}")
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(
                f"the share of changed words must lie between 0 and 1, got {self.share} (3.8 % is 0.038)."
            )
        if self.eps <= 0 or self.steps < 1 or not 0 <= self.random_start <= 1:
            raise ConfigError(f"an attack needs eps > 0, steps >= 1 and random_start in [0, 1], got {self}.")
        if self.nearest is not None and self.nearest < 1:
            raise ConfigError(f"an attack needs at least 1 nearest code to change a word into, got {self.nearest}.")
        if not 0 < self.batch_share <= 1:
            raise ConfigError(f"--dat_batch_share must lie in (0, 1], got {self.batch_share}.")
        if self.warmup < 0:
            raise ConfigError(f"--dat_warmup must be 0 epochs or more, got {self.warmup}.")
        for flag, given in (("--dat_at image", self.at == "image"), ("--dat_free", self.free)):
            if given and self.kind != "released":
                raise ConfigError(f"{flag} is a form of --dat released; leave it out with --dat {self.kind}.")
        if self.free and self.steps > 1:
            raise ConfigError(f"--dat_free has one gradient, so one step: leave out --dat_steps {self.steps}.")

    @property
    def clean_weight(self) -> float:
        """Weight of the clean loss beside the adversarial one: 1 in the released code, 0 in the paper's Algorithm 1."""
        return 0.0 if self.kind == "paper" else 1.0

    @property
    def moves_pixels(self) -> bool:
        """Whether eps is the strength: a step in pixels, of which the quantizer makes a share of changed words. The
        others choose the words themselves, or change none."""
        return self.kind in ("released", "paper")

    @property
    def word_share(self) -> float:
        """Share of the words that `symbolic` and `random` replace."""
        return 0.05 if self.share is None else self.share

    def ramp(self, epoch: float) -> float:
        """Share of the strength at a fractional epoch: linear over the warm-up, from a millionth, which changes
        nothing, because no strength at all is no attack."""
        return 1.0 if epoch >= self.warmup else max(epoch / self.warmup, 1e-6)

    def scaled(self, factor: float) -> "AttackConfig":
        """A weaker attack: a part of the step, or of the share of words."""
        share = self.share if self.moves_pixels else factor * self.word_share
        return dataclasses.replace(self, eps=factor * self.eps, share=share)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run: where to, on what, from where. Of these only `seed`, `precision`, `device` and `compile` change the
    result."""

    output_dir: str = "./output_dir"
    """Checkpoints, log.txt, weights and reports. A rerun into the same folder resumes."""
    log_dir: str | None = None
    """TensorBoard files (default: output_dir)."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA if there is any."""
    seed: int = 0
    resume: str | None = None
    """A checkpoint of ours, or a folder with some (default: the newest in output_dir); with --eval also a weights
    file or a released name."""
    start_epoch: int = 0
    """First epoch, when there is no checkpoint to resume."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """auto: bfloat16 autocast where the hardware has it. fp32 is float32 throughout; with tf32 a GPU multiplies its
    matrices in TF32, but for a tokenizer's."""
    compile: bool = False
    """torch.compile for each block of the network, which takes a minute or more at the start."""
    checkpoint_activations: bool = False
    """Compute each block's activations again in the backward pass: less memory for one forward
    pass more; the same bits."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, also on a GPU (slower; the CPU's always do)."""
    save_minutes: float = 10.0
    """A checkpoint at least this often, besides the one at every epoch's end."""
    keep: int = 2
    """Newest checkpoints kept, besides the best one by the epoch's score ..."""
    keep_every: int | None = None
    """... and those of every n-th epoch (default: none)."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's although they change the result, such as `epochs blr`."""
    hang_minutes: float = 15.0
    """Without a step for so long, the stacks of all ranks are logged and the run stops with code 75; 0 for never."""
    pictures_every: int = 1
    """Epochs between pictures in TensorBoard and output_dir/pictures; 0 for none."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data: DIR/{train,val}/CLASS/*.jpg; for pretraining any folder of images."""

    data_path: str | None = None
    """Folder of images or of shards (`python -m mae_dat pack`), the https:// address of shards, or `demo` for the
    generated ones (default: the environment variable MAE_DAT_DATA)."""
    input_size: tuple[int, ...] = (224,)
    """Side, or height and width, in pixels."""
    in_chans: int = 3
    on_bad: Literal["fail", "skip"] = "fail"
    """A file that cannot be decoded: stop and name it, or put the next image in its place and count it."""
    num_workers: int = 10
    pin_mem: bool = True
    """Pin host memory for faster transfer to a GPU (--no_pin_mem to turn off)."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(f"--num_workers must be 0 (decode in the main process) or more, got {self.num_workers}.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
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
    """Rate that the warm-up starts from."""
    cooldown_epochs: int = 0
    """Further epochs at min_lr, after --epochs."""
    weight_decay: float = 0.05
    clip_grad: float | None = None
    """Largest norm of the gradient (default: no clipping; the norm is logged all the same)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "accum_iter"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lr", "blr", "min_lr", "warmup_lr", "warmup_epochs", "cooldown_epochs", "weight_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"--{name} must be 0 or more, got {value}.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ConfigError(f"--clip_grad must be above 0, got {self.clip_grad}: leave it out to clip nothing.")

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the cool-down included."""
        return self.epochs + self.cooldown_epochs


@dataclasses.dataclass(frozen=True)
class DatConfig:
    """Discrete adversarial training: bare `--dat` is `--dat released`."""

    dat: Literal["none", "released", "paper", "symbolic", "random", "reconstruction"] = "none"
    """The adversary: none, released (the code's, the default of --dat), paper (Algorithm 1), symbolic (chooses the
    words themselves); or what stands beside the clean view without one: random (random words), reconstruction (no
    word changed)."""
    dat_eps: float | None = None
    """released: L2 radius and step; paper: factor of the gradient; pixels in [0, 1] (default: 0.1, which was chosen for
    vqgan_f8_16384 at 224 px)."""
    dat_share: float | None = None
    """Target share of changed words, held by adjusting eps (the strength that carries over between sizes and
    tokenizers; default for the embedded tokenizer without --dat_eps: 0.038, what eps 0.1 changed in the paper).
    symbolic, random: the share of words replaced (default: 0.05)."""
    dat_random_start: float = 0.8
    """released: probability per batch of a random start."""
    dat_steps: int = 1
    """released, symbolic: gradient steps."""
    dat_nearest: int | None = None
    """symbolic, random: a word becomes one of so many whose codes are nearest to its own (default: any word)."""
    dat_at: Literal["reconstruction", "image"] = "reconstruction"
    """released: attack the reconstruction Q(x), or the image x itself, which saves a reconstruction."""
    dat_free: bool = False
    """released: take the attack's gradient from the clean view's backward pass, which saves a forward and a backward
    pass."""
    dat_batch_share: float = 1.0
    """Share of each batch that is attacked, its first images."""
    dat_warmup: float = 0.0
    """Epochs over which the adversary's strength (eps or the share of words) grows linearly from 0."""
    tokenizer: str = "embedded"
    """`embedded` (light, for 64 px), a light tokenizer's .safetensors, a VQGAN of taming, latent-diffusion or
    easyrobust, or a released name such as vqgan_f8_16384."""
    tokenizer_precision: Literal["auto", "fp32", "fp16", "bf16_decoder", "bf16"] = "auto"
    """Of the tokenizer's inner layers; auto: fp32 on a CPU; on a GPU fp16, unless more than 1 % of the words of drawn
    pictures differ from fp32's. What each does to the words: docs/visual-words.md."""
    tokenizer_compile: bool = False
    """Compile the tokenizer (torch.compile): fuses norms and activations; the first steps take a minute longer."""

    def __post_init__(self) -> None:
        if self.dat_eps is not None and not 0 < self.dat_eps < math.inf:
            raise ConfigError(f"--dat_eps must be above 0, got {self.dat_eps}.")

    @property
    def attack(self) -> AttackConfig | None:
        """The attack that these flags mean."""
        if self.dat == "none":
            return None
        eps = PUBLISHED_EPS if self.dat_eps is None else self.dat_eps
        strength = (eps, self.dat_share, self.dat_random_start, self.dat_steps, self.dat_nearest)
        attack = AttackConfig(self.dat, *strength, self.dat_at, self.dat_free, self.dat_batch_share, self.dat_warmup)
        if attack.moves_pixels and self.dat_share is None and self.dat_eps is None and self.tokenizer == "embedded":
            return dataclasses.replace(attack, share=PUBLISHED_SHARE)
        return attack


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """What DAT is compared with, and joined with: pixel adversaries, norms of their own, consistent predictions."""

    at: Literal["none", "pgd", "advprop"] = "none"
    """Adversarial training on pixels: pgd (Madry et al. 2018: no clean view), or advprop (Xie et al. 2020: beside it,
    and through norms of its own)."""
    at_norm: Literal["linf", "l2"] = "linf"
    """What eps limits: each pixel, or the picture."""
    at_eps: float | None = None
    """Radius of the ball, pixels in [0, 1] (default: 4/255 for linf, 0.5 for l2)."""
    at_steps: int = 3
    """Gradient steps, from a random start."""
    at_step: float | None = None
    """Length of a step, in the same norm (default: 2 eps / steps)."""
    at_clean_weight: float | None = None
    """Weight of the clean view's loss (default: 0 for pgd, 1 for advprop)."""
    split_norms: bool = False
    """With --dat: the attack and its outcome pass through norms of their own (BatchNorm, LayerNorm and their kin), as
    in advprop. The others are evaluated and exported."""
    dat_jsd: float = 0.0
    """With --dat: weight of the Jensen-Shannon divergence between the predictions for a picture, its reconstruction
    and its adversary."""
    jsd: float = 0.0
    """Weight of the same between a crop and two views of it by --aa, each picture in three views (AugMix, Hendrycks et
    al. 2020: 12, with --aa augmix-m3-w3)."""

    def __post_init__(self) -> None:
        for name in ("at_eps", "at_steps", "at_step"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be above 0, got {value}.")
        if self.at_norm == "linf" and self.eps >= 1:
            raise ConfigError(
                f"--at_eps {self.eps:g} lets every pixel in [0, 1] become any other: 4/255 is given as 0.0157."
            )
        for name in ("at_clean_weight", "dat_jsd", "jsd"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"--{name} must be 0 or more, got {value}.")
        if self.at == "advprop" and self.clean_weight == 0:
            raise ConfigError(
                "--at advprop learns from both views: leave out --at_clean_weight 0, or give --at pgd for the "
                "adversarial one alone."
            )

    @property
    def eps(self) -> float:
        """Radius of the pixel adversary's ball."""
        return self.at_eps or {"linf": 4 / 255, "l2": 0.5}[self.at_norm]

    @property
    def step(self) -> float:
        """Length of its steps."""
        return self.at_step or 2 * self.eps / self.at_steps

    @property
    def clean_weight(self) -> float:
        """Weight of the clean view beside a pixel adversary."""
        return float(self.at == "advprop") if self.at_clean_weight is None else self.at_clean_weight

    @property
    def splits_norms(self) -> bool:
        """Whether adversarial views have norms of their own."""
        return self.split_norms or self.at == "advprop"


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
    """What is predicted at removed patches: pixels, the visual words of --tokenizer (with or without --dat), or
    both."""
    words_weight: float = 0.1
    """Of the words' loss (nats a word) beside the pixels', with --target both."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"--mask_ratio must lie between 0 and 1, got {self.mask_ratio}.")
        if self.words_weight <= 0:
            raise ConfigError(
                f"--words_weight must be positive, got {self.words_weight}; without words: --target pixels."
            )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Model: any timm model; vit_{base,large}_patch16 and vit_huge_patch14 mean MAE's form of them."""

    model: str = "vit_large_patch16"
    """MAE's names, vit_demo_patch8, or any timm name."""
    nb_classes: int | None = None
    """Classes (default: the number of class folders)."""
    drop_path: float = 0.1
    global_pool: bool = True
    """Classify the mean of the patch tokens ..."""
    cls_token: bool = False
    """... or, with --cls_token, the class token."""
    finetune: str | None = None
    """Weights to start from: a pretraining folder of ours, a weights file, or a released name (`python -m mae_dat
    fetch` lists them)."""
    pretrained: bool = False
    """Start from timm's weights for a timm model."""
    linear_probe: bool = False
    """Train a new head alone, behind a BatchNorm, on the frozen network. The defaults become MAE's linear probe: class
    token, LARS, blr 0.1, batch_size 512, 90 epochs, 10 of warm-up, no weight decay, crops and flips only."""
    opt: Literal["adamw", "lars", "sgd"] = "adamw"
    """Optimizer; lars and sgd with momentum 0.9. lars is for batches of some thousand images."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each layer to the one below."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, evaluated and exported in their place (default: none)."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"--{name} must lie in [0, 1), got {value}.")
        if self.pretrained and self.finetune:
            raise ConfigError(f"--pretrained and --finetune {self.finetune}: give one of them to start from.")

    @property
    def mean_pool(self) -> bool:
        """Whether the patch tokens' mean is classified, not the class token."""
        return self.global_pool and not self.cls_token


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation, with timm's names."""

    color_jitter: float | None = None
    """Only without --aa."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment policy; None for crops and flips only."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the cropped area's share."""
    smoothing: float = 0.1
    reprob: float = 0.25
    """Probability of random erasing."""
    remode: str = "pixel"
    """const, rand or pixel, filled inside [0, 1]; pixel_raw writes N(0, 1) into the pixels as DAT's released code
    did: neither for --dat nor for --at."""
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
                raise ConfigError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation: exact counts, no padding."""

    eval: bool = False
    """Evaluate only, the weights of --resume."""
    dist_eval: bool = False
    """Accepted for MAE's sake; evaluation is always shared by the ranks and exact."""
    suite: tuple[str, ...] = ("clean",)
    """With --eval: clean accuracy; `corruptions`, also 15 corruptions x 5 severities and a report; or the suites of
    `python -m mae_dat robustness`."""
    limit: int | None = None
    """Images per corruption (default: all of the validation split)."""


ImageSize = tuple[int, int]
"""Height and width in pixels."""


def image_size(sides: tuple[int, ...]) -> ImageSize:
    """(height, width) of `--input_size`. Raises ConfigError."""
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ConfigError(
            f"--input_size takes a side or height and width in pixels, got {' '.join(map(str, sides)) or 'nothing'}."
        )
    return sides[0], sides[-1]


def data_root(data_path: str | None) -> str:
    """The folder of images: the flag, else MAE_DAT_DATA. Raises ConfigError when neither is given."""
    root = data_path or os.environ.get(DATA_VARIABLE)
    if not root:
        raise ConfigError(
            f"no images: give --data_path DIR (with train/CLASS/*.jpg and val/CLASS/*.jpg), set {DATA_VARIABLE}, "
            "or try --data_path demo for generated ones."
        )
    return root
