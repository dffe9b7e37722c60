"""Configurations of pretraining and fine-tuning: their groups of flags, and the combinations that are rejected."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mae_dat.config.adversaries import AttackConfig, BaselineConfig, DatConfig
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import (
    AugmentConfig,
    ClassifierConfig,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    LossConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(CommandConfig):
    """Pretrain a masked autoencoder; with --dat on images whose visual words an adversary changes.

    To resume, run the same command again.

    Examples:
        >>> import mae_dat
        >>> config = mae_dat.PretrainConfig.from_yaml("small_pretrain", data_path="photos", output_dir="pre")
        >>> config.mae.model, config.data.data_path
        ('mae_vit_demo_patch8', 'photos')
    """

    verb = "pretrain"
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    mae: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    dat: DatConfig = DatConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        check_groups(self.dat, self.launch)
        check_initial_weights(self)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(CommandConfig):
    """Fine-tune a classifier, with --dat by Discrete Adversarial Training; --eval evaluates one.

    To resume, run the same command again.

    Examples:
        >>> import mae_dat
        >>> config = mae_dat.FinetuneConfig.from_flags(data_path="photos", epochs=3, dat=True)
        >>> config.optim.epochs
        3
        >>> config.command()
        'mae-dat finetune --data_path photos --epochs 3 --dat released'
    """

    verb = "finetune"
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    optim: OptimConfig = OptimConfig(epochs=50, min_lr=1e-6, warmup_epochs=5)
    dat: DatConfig = DatConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    baselines: BaselineConfig = BaselineConfig()
    evaluation: EvalConfig = EvalConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        check_groups(self.dat, self.launch)
        check_probe(self)
        check_views(self)

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> "FinetuneConfig":
        """Return the defaults of fine-tuning, or of MAE's linear probe if `linear_probe` is among the values."""
        return LINEAR_PROBE if values.get("linear_probe") else cls()


def check_groups(dat: DatConfig, launch: LaunchConfig) -> None:
    """Raise ConfigError for groups that cannot be combined."""
    if dat.stored is not None and dat.has_schedule:
        raise ConfigError(
            "--adversary_hold and --adversary_ramp do not go with stored adversaries, whose strength is fixed: leave "
            "them out."
        )
    if dat.free and launch.fsdp:
        raise ConfigError("--dat_free does not go with --fsdp, whose gradients are sharded: leave out one of them.")


def check_initial_weights(config: PretrainConfig) -> None:
    """Raise ConfigError for a warm-up of the decoder that cannot be."""
    warmup = config.mae.decoder_warmup
    if not warmup or not (config.mae.init or config.run.resume):
        return
    flag = f"--decoder_warmup {warmup:g}"
    if warmup >= config.optim.total_epochs:
        raise ConfigError(f"{flag} would train only the decoder in all {config.optim.total_epochs} epochs: lower it.")
    if config.launch.fsdp:
        raise ConfigError(f"{flag} does not go with --fsdp: leave out one of them.")


def check_probe(config: FinetuneConfig) -> None:
    """Raise ConfigError for first epochs of the head that cannot be."""
    probe = config.classifier.probe_epochs
    flag = f"--probe_epochs {probe:g}"
    if probe and probe >= config.optim.epochs:
        raise ConfigError(f"{flag} takes all {config.optim.epochs} epochs: lower it, or give --train head.")
    if probe and config.launch.fsdp:
        raise ConfigError(f"{flag} does not go with --fsdp: leave out one of them.")


def check_views(config: FinetuneConfig) -> None:
    """Raise ConfigError for views of an image that cannot be combined."""
    baselines, augment, dat = config.baselines, config.augment, config.dat
    attack = dat.attack
    adversaries = [f"--at {baselines.at}"] * (baselines.at != "none") + [f"--dat {dat.kind}"] * (dat.kind != "none")
    if len(adversaries) == 2:
        raise ConfigError(f"{' and '.join(adversaries)}: give one of them, as a run has one adversary at a time.")
    if adversaries and augment.remode == "pixel_raw" and augment.reprob > 0:
        raise ConfigError(
            f"{adversaries[0]} takes pixels in [0, 1], and --remode pixel_raw erases with N(0, 1): give --remode "
            "pixel, or --reprob 0."
        )
    if config.data.in_chans not in (1, 3):
        if dat.stored is not None:
            raise ConfigError(f"--dat {dat.kind} holds color images: leave out --in_chans {config.data.in_chans}.")
        _check_bands(config)
    _check_extensions_of_dat(baselines, dat)
    if baselines.jsd and (
        adversaries or augment.aa is None or augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax
    ):
        raise ConfigError(
            f"--jsd {baselines.jsd:g} compares views of single, clean images: give --aa (such as augmix-m3-w3), and "
            "leave out --mixup, --cutmix, --cutmix_minmax, --dat and --at."
        )
    if baselines.jsd and (config.loss.loss != "ce" or config.loss.class_weights):
        raise ConfigError(
            f"--jsd {baselines.jsd:g} has cross-entropy without weights: leave out --loss and --class_weights."
        )
    if baselines.teacher and (baselines.jsd or baselines.at != "none" or attack is not None):
        raise ConfigError(
            "--teacher goes with --dat stored:DIR or without an adversary: leave out --teacher, or --jsd, --at and "
            "other kinds of --dat."
        )
    if baselines.splits_norms:
        _check_split_norms(config, attack)


def _check_bands(config: FinetuneConfig) -> None:
    """Raise ConfigError for augmentations that are defined for color images alone."""
    augment, data = config.augment, config.data
    for flag, is_set, fix in (
        (f"--aa {augment.aa}", augment.aa is not None, "--aa None"),
        (f"--color_jitter {augment.color_jitter}", augment.color_jitter, "no --color_jitter"),
        (f"--jsd {config.baselines.jsd:g}", config.baselines.jsd, "no --jsd"),
    ):
        if is_set:
            raise ConfigError(f"{flag} changes colors, and --in_chans {data.in_chans} are other channels: give {fix}.")


def _check_extensions_of_dat(baselines: BaselineConfig, dat: DatConfig) -> None:
    extensions = [f"--dat_jsd {baselines.dat_jsd:g}"] * (baselines.dat_jsd > 0)
    for flag in extensions + ["--split_norms"] * baselines.split_norms:
        if dat.kind == "none":
            raise ConfigError(f"{flag} is an extension of --dat: give --dat, or leave it out.")
        if dat.stored is not None and flag != "--split_norms":
            raise ConfigError(f"{flag} needs the reconstruction, which stored adversaries lack: leave out one of them.")
        if dat.free:
            raise ConfigError(
                f"{flag} does not go with --dat_free, whose attack uses the clean view's backward pass: leave out one."
            )


def _check_split_norms(config: FinetuneConfig, attack: AttackConfig | None) -> None:
    name = "--split_norms" if config.baselines.split_norms else "--at advprop"
    if attack is not None and not attack.clean_weight:
        raise ConfigError(
            f"{name} evaluates the norms of the clean view, and --dat {attack.kind} has no clean view to train them: "
            "leave out one of them."
        )
    for flag, is_set in (
        ("--fsdp", config.launch.fsdp),
        ("--checkpoint_activations", config.run.checkpoint_activations),
        ("--linear_probe", config.classifier.linear_probe),
        (f"--train {config.classifier.train}", config.classifier.train != "all"),
        (f"--probe_epochs {config.classifier.probe_epochs:g}", config.classifier.probe_epochs),
    ):
        if is_set:
            raise ConfigError(f"{name} does not go with {flag}: leave out one of them.")


LINEAR_PROBE = FinetuneConfig(
    classifier=ClassifierConfig(linear_probe=True, cls_token=True, drop_path=0.0, layer_decay=1.0, opt="lars"),
    augment=AugmentConfig(aa=None, reprob=0.0, smoothing=0.0),
    optim=OptimConfig(batch_size=512, epochs=90, blr=0.1, warmup_epochs=10, weight_decay=0.0),
)
