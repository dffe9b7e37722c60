"""Settings of adversarial training: the discrete adversary of DAT, and the baselines that it is compared with.

Importing this module does not import torch.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from mae_dat.config.errors import ConfigError, suggest

AttackKind = Literal["released", "paper", "symbolic", "random", "reconstruction"]
ATTACK_KINDS: tuple[str, ...] = get_args(AttackKind)
ATTACKS: dict[str, str] = {
    "released": "attacks.discrete:released_attack",
    "paper": "attacks.discrete:paper_attack",
    "symbolic": "attacks.discrete:symbolic_attack",
    "random": "attacks.discrete:random_attack",
    "reconstruction": "attacks.discrete:no_attack",
}
"""The function of each kind, `MODULE:NAME` below `mae_dat`, imported at its first use."""
STORED_PREFIX = "stored:"
PUBLISHED_EPS, PUBLISHED_SHARE = 0.1, 0.038
"""Mao et al. 2022, Table 8: with VQGAN f8 at 224 px, an L2 step of 0.1 changes this share of the words."""
NO_STRENGTH = 1e-6
"""The factor of a strength that changes nothing; a strength of 0 would be no valid attack."""


def strength_at(epoch: float, hold_epochs: float, ramp_epochs: float) -> float:
    """Return the factor of an adversary's strength at a fractional epoch: none for `hold_epochs`, then linear over
    `ramp_epochs`, then 1."""
    if epoch >= hold_epochs + ramp_epochs:
        return 1.0
    return NO_STRENGTH if epoch < hold_epochs else max((epoch - hold_epochs) / ramp_epochs, NO_STRENGTH)


@dataclasses.dataclass(frozen=True)
class _AttackSettings:
    """Every setting of a discrete adversary, once for the flags (DatConfig) and for Python (AttackConfig).

    The two differ where the flags may leave a value open: `--dat none`, and no `--dat_eps`. `flag` in the metadata of a
    field is its name on the command line and in YAML files. The docstrings of the fields are the help of the flags.
    """

    kind: Literal["none", AttackKind, "stored:DIR"] = dataclasses.field(
        default="none", metadata={"flag": "dat", "bare": "released"}
    )
    """The adversary: none; released, that of the authors' code, also chosen by --dat alone; paper, that of Algorithm 1;
    symbolic, which chooses the words themselves; a control: random (random words), reconstruction (no word changed); or
    stored:DIR, the adversarial images that mae-dat attack has written to DIR."""
    eps: float | None = dataclasses.field(default=None, metadata={"flag": "dat_eps"})
    """released: radius and step in L2; paper: factor of the gradient; for pixels in [0, 1] (default: 0.1, which the
    authors chose for vqgan_f8_16384 at 224 px)."""
    share: float | None = dataclasses.field(default=None, metadata={"flag": "dat_share"})
    """released, paper: share of the words to change; eps is adjusted to hold it, and it carries over between image
    sizes and tokenizers (default for the embedded tokenizer without --dat_eps: 0.038, as eps 0.1 changed in the paper).
    symbolic, random: share of the words to replace (default: 0.05)."""
    random_start: float = dataclasses.field(default=0.8, metadata={"flag": "dat_random_start"})
    """released: probability that the attack of a batch starts from a random point."""
    steps: int = dataclasses.field(default=1, metadata={"flag": "dat_steps"})
    """released, symbolic: number of gradient steps."""
    nearest: int | None = dataclasses.field(default=None, metadata={"flag": "dat_nearest"})
    """symbolic, random: replace a word only by one of the N words with the nearest codes (default: by any word)."""
    rescore: int = dataclasses.field(default=0, metadata={"flag": "dat_rescore"})
    """symbolic: candidates of each step whose loss is computed exactly, each by a decoding and a forward pass; 0 for
    the first-order choice. Classification only."""
    at: Literal["reconstruction", "image"] = dataclasses.field(default="reconstruction", metadata={"flag": "dat_at"})
    """released: attack the reconstruction Q(x), or the image x itself, which saves one reconstruction."""
    free: bool = dataclasses.field(default=False, metadata={"flag": "dat_free"})
    """released: take the gradient of the attack from the backward pass of the clean view, which saves a forward and a
    backward pass."""
    fourth_pass: bool = dataclasses.field(default=False, metadata={"flag": "dat_fourth_pass"})
    """released: also pass the attacked image, before it is reconstructed, through the model and discard the result, as
    the released code does; matters only to BatchNorm's running statistics, which then see four batches per step."""
    batch_share: float = dataclasses.field(default=1.0, metadata={"flag": "dat_batch_share"})
    """Share of each batch that is attacked: its first images."""
    hold_epochs: float = dataclasses.field(default=0.0, metadata={"flag": "adversary_hold"})
    """First epochs, in which the adversary (--dat or --at) has no strength."""
    ramp_epochs: float = dataclasses.field(default=0.0, metadata={"flag": "adversary_ramp"})
    """Epochs after --adversary_hold in which the strength (eps, or the share of words) grows linearly to its full
    value."""

    @property
    def has_schedule(self) -> bool:
        """Whether the strength depends on the epoch."""
        return self.hold_epochs > 0 or self.ramp_epochs > 0

    @property
    def moves_pixels(self) -> bool:
        """Whether eps is the strength: a step in pixels, of which the quantizer makes a share of changed words.

        The other kinds choose the words themselves, or change none.
        """
        return self.kind in ("released", "paper")


def check_schedule(hold_epochs: float, ramp_epochs: float) -> None:
    """Raise ConfigError for a schedule of an adversary's strength that cannot be."""
    for flag, epochs in (("--adversary_hold", hold_epochs), ("--adversary_ramp", ramp_epochs)):
        if not 0 <= epochs < math.inf:
            raise ConfigError(f"{flag} must be 0 epochs or more, got {epochs}.")


def describe_schedule(hold_epochs: float, ramp_epochs: float) -> list[str]:
    """Return the schedule of an adversary's strength in words; empty for full strength throughout."""
    hold, ramp = f"no strength for {hold_epochs:g} epochs", f"growing over {ramp_epochs:g} epochs"
    return [hold] * (hold_epochs > 0) + [ramp] * (ramp_epochs > 0)


@dataclasses.dataclass(frozen=True)
class AttackConfig(_AttackSettings):
    """A discrete adversary (Mao et al. 2022): which one, and how strong.

    kind: `released` is the adversary of the authors' code, `paper` that of the paper's Algorithm 1.
    eps: for `released` the radius of the L2 ball per image and the length of a step, for `paper` alpha, the factor of
        the gradient; pixels in [0, 1]. The default is 0.1. Leave it out if you give a share: `WithDAT` and the
        trainer choose it.
    share: for `released` and `paper` the share of changed words in (0, 1). `WithDAT` and the trainer search the eps for
        it on the first batch, and adjust it after every batch; the share of single batches varies around it.
        `discrete_adversary` attacks one batch and needs an eps. For `symbolic` and `random` the share of words replaced
        (0.05 if None).
    random_start: probability in [0, 1], drawn once per batch and rank, of starting from a random point of the ball.
    hold_epochs, ramp_epochs: epochs without strength, then epochs in which it grows linearly: `scaled(ramp(epoch))`.

    The other fields are those of the flags `--dat_*`. Raises ConfigError for values that cannot work.

    Examples:
        >>> import mae_dat
        >>> mae_dat.AttackConfig(share=0.04).kind  # holds 4 % of the words changed
        'released'
        >>> mae_dat.AttackConfig("random", share=0.1).word_share  # a control: 10 % of the words, at random
        0.1
    """

    kind: AttackKind = "released"
    eps: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.eps) and (self.share is None or not self.moves_pixels):
            object.__setattr__(self, "eps", PUBLISHED_EPS)
        if self.kind not in ATTACK_KINDS:
            raise ConfigError(f"unknown attack {self.kind!r}: {suggest(self.kind, ATTACK_KINDS)}")
        self._check_numbers()
        for flag, is_set in (
            ("--dat_at image", self.at == "image"),
            ("--dat_free", self.free),
            ("--dat_fourth_pass", self.fourth_pass),
        ):
            if is_set and self.kind != "released":
                raise ConfigError(f"{flag} works with --dat released only; leave it out with --dat {self.kind}.")
        if self.rescore and self.kind != "symbolic":
            raise ConfigError(f"--dat_rescore works with --dat symbolic only; leave it out with --dat {self.kind}.")
        if self.free and self.steps > 1:
            raise ConfigError(f"--dat_free has one gradient, and so one step: leave out --dat_steps {self.steps}.")

    def _check_numbers(self) -> None:
        for name, is_valid, rule in (
            ("share", self.share is None or 0 < self.share < 1, "lie between 0 and 1 (3.8 % is 0.038)"),
            ("eps", not self.eps <= 0, "be above 0"),
            ("steps", self.steps >= 1, "be at least 1"),
            ("random_start", 0 <= self.random_start <= 1, "be in [0, 1]"),
            ("nearest", self.nearest is None or self.nearest >= 1, "be at least 1"),
            ("rescore", self.rescore >= 0, "be 0 or more"),
            ("batch_share", 0 < self.batch_share <= 1, "be in (0, 1]"),
        ):
            if not is_valid:
                raise ConfigError(f"--dat_{name} must {rule}, got {getattr(self, name)}.")
        check_schedule(self.hold_epochs, self.ramp_epochs)

    @property
    def clean_weight(self) -> float:
        """Weight of the clean loss beside the adversarial one: 1 in the released code, 0 in the paper's Algorithm 1."""
        return 0.0 if self.kind == "paper" else 1.0

    @property
    def word_share(self) -> float:
        """Share of the words that `symbolic` and `random` replace."""
        return 0.05 if self.share is None else self.share

    def describe(self) -> str:
        """Return the adversary and its strength in words."""
        if self.kind == "reconstruction":
            strength = "no word changed"
        elif not self.moves_pixels:
            strength = f"{100 * self.word_share:g} % of the words replaced"
        elif self.share is not None:
            strength = f"{100 * self.share:g} % of the words changed, by adjusting eps"
        else:
            strength = f"eps {self.eps:g}"
        parts = [
            strength,
            f"{self.steps} steps" if self.steps > 1 else "",
            "at the image" if self.at == "image" else "",
        ]
        parts += [f"{self.rescore} exact losses a step"] * (self.rescore > 0)
        parts += ["free gradient"] * self.free
        parts += ["fourth pass"] * self.fourth_pass
        parts += [f"{100 * self.batch_share:g} % of each batch"] * (self.batch_share < 1)
        parts += describe_schedule(self.hold_epochs, self.ramp_epochs)
        return f"{self.kind} DAT: {', '.join(filter(None, parts))}"

    def ramp(self, epoch: float) -> float:
        """Return the factor of the strength at a fractional epoch (`strength_at`)."""
        return strength_at(epoch, self.hold_epochs, self.ramp_epochs)

    def scaled(self, factor: float) -> "AttackConfig":
        """Return a weaker attack: eps, or the share of words, multiplied by `factor`."""
        share = self.share if self.moves_pixels else factor * self.word_share
        return dataclasses.replace(self, eps=factor * self.eps, share=share)


@dataclasses.dataclass(frozen=True)
class DatConfig(_AttackSettings):
    """Discrete Adversarial Training: --dat alone means --dat released."""

    tokenizer: str = "embedded"
    """`embedded` (light, for 64 px), a light tokenizer's .safetensors file, a VQGAN of taming, latent-diffusion or
    easyrobust, or a released name such as vqgan_f8_16384."""
    tokenizer_precision: Literal["auto", "fp32", "fp16", "bf16_decoder", "bf16"] = "auto"
    """Precision of the inner layers of the tokenizer. auto: fp32 on a CPU; fp16 on a GPU, unless it changes more than
    1 % of the words of generated images."""
    tokenizer_compile: bool = False
    """Compile the tokenizer (torch.compile): faster, after first steps that take a minute longer."""

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise ConfigError(f"--dat_eps must be above 0, got {self.eps}.")
        check_schedule(self.hold_epochs, self.ramp_epochs)
        _ = self.attack  # which checks the other values

    @property
    def stored(self) -> Path | None:
        """The folder of stored adversaries, None without."""
        if not self.kind.startswith(STORED_PREFIX):
            return None
        return Path(self.kind.removeprefix(STORED_PREFIX)).expanduser()

    @property
    def attack(self) -> AttackConfig | None:
        """The attack of every step; None for `--dat none` and for stored adversaries. Raises ConfigError."""
        if self.kind == "none" or self.stored is not None:
            return None
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(_AttackSettings)}
        if self.eps is None:
            settings["eps"] = PUBLISHED_EPS
            # eps does not carry over to the embedded tokenizer: there the published strength is the share of words.
            if self.moves_pixels and self.share is None and self.tokenizer == "embedded":
                settings["share"] = PUBLISHED_SHARE
        return AttackConfig(**settings)


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """Baselines and extensions: pixel adversaries, separate norms, consistency losses."""

    at: Literal["none", "pgd", "advprop"] = "none"
    """Adversarial training on pixels: pgd (Madry et al. 2018) without the clean view, or advprop (Xie et al. 2020)
    beside the clean view and with separate norms."""
    at_norm: Literal["linf", "l2"] = "linf"
    """Norm that --at_eps limits: linf (each pixel) or l2 (the whole image)."""
    at_eps: float | None = None
    """Radius of the pixel attack, for pixels in [0, 1] (default: 4/255 for linf, 0.5 for l2)."""
    at_steps: int = 3
    """Gradient steps of the pixel attack, from a random start."""
    at_step: float | None = None
    """Length of a step of the pixel attack, in the same norm (default: 2 eps / steps)."""
    at_clean_weight: float | None = None
    """Weight of the loss of the clean view (default: 0 for pgd, 1 for advprop)."""
    split_norms: bool = False
    """With --dat: the attack and the adversarial images use norms of their own (BatchNorm, LayerNorm and similar), as
    in advprop. The norms of the clean images are evaluated and exported."""
    dat_jsd: float = 0.0
    """With --dat: weight of the Jensen-Shannon divergence between the predictions for an image, its reconstruction and
    its adversarial image."""
    teacher: str | None = None
    """Classifier whose predictions are learned beside the labels: an output folder, weights file or released name. It
    predicts every view that the model is trained on; without --dat or with --dat stored:DIR."""
    teacher_weight: float = 1.0
    """Weight of the divergence from the teacher's predictions."""
    teacher_temperature: float = 1.0
    """Temperature that softens the predictions of teacher and model before they are compared."""
    jsd: float = 0.0
    """Weight of the same divergence between a crop and two views of it by --aa (AugMix of Hendrycks et al. 2020: 12,
    with --aa augmix-m3-w3). Each image is used in three views."""

    def __post_init__(self) -> None:
        for name in ("at_eps", "at_steps", "at_step"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be above 0, got {value}.")
        if self.at_norm == "linf" and self.eps >= 1:
            raise ConfigError(
                f"--at_eps {self.eps:g} lets every pixel in [0, 1] take any value: 4/255 is given as 0.0157."
            )
        if not 0 < self.teacher_temperature < math.inf:
            raise ConfigError(f"--teacher_temperature must be above 0, got {self.teacher_temperature}.")
        for name in ("at_clean_weight", "dat_jsd", "teacher_weight", "jsd"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"--{name} must be 0 or more, got {value}.")
        if self.at == "advprop" and self.clean_weight == 0:
            raise ConfigError(
                "--at advprop learns from both views: leave out --at_clean_weight 0, or give --at pgd to train on the "
                "adversarial view alone."
            )

    @property
    def eps(self) -> float:
        """Radius of the pixel adversary's ball, in the norm `at_norm`, pixels in [0, 1]."""
        return self.at_eps or {"linf": 4 / 255, "l2": 0.5}[self.at_norm]

    @property
    def step(self) -> float:
        """Length of the pixel adversary's steps, in the same norm."""
        return self.at_step or 2 * self.eps / self.at_steps

    @property
    def clean_weight(self) -> float:
        """Weight of the clean view's loss in training with a pixel adversary."""
        return float(self.at == "advprop") if self.at_clean_weight is None else self.at_clean_weight

    def describe(self) -> str:
        """Return the baseline and its strength in words; empty without one."""
        parts = []
        if self.at != "none":
            eps = f"{255 * self.eps:.3g}/255" if self.at_norm == "linf" else f"{self.eps:g}"
            parts.append(
                f"{self.at} on pixels: {self.at_norm} eps {eps}, {self.at_steps} step{'s' * (self.at_steps != 1)}"
            )
        parts += ["split norms"] * self.splits_norms
        parts += [f"JSD of the adversary's views, weight {self.dat_jsd:g}"] * bool(self.dat_jsd)
        parts += [f"AugMix JSD, weight {self.jsd:g}"] * bool(self.jsd)
        if self.teacher:
            parts.append(f"teacher {self.teacher}, weight {self.teacher_weight:g}, T {self.teacher_temperature:g}")
        return ", ".join(parts)

    @property
    def splits_norms(self) -> bool:
        """Whether adversarial views pass through separate norms."""
        return self.split_norms or self.at == "advprop"
