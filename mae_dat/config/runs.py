"""The configuration of each kind of training: groups of flags, and the combinations that are rejected."""

import dataclasses
from collections.abc import Sequence

from mae_dat.config.adversaries import BaselineConfig, DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import (
    AugmentConfig,
    ClassifierConfig,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
)
from mae_dat.config.parse import load_config


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Masked-autoencoder pretraining, with `--dat` on adversarially changed visual words."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    mae: MaskConfig = MaskConfig()
    optim: OptimConfig = OptimConfig()
    dat: DatConfig = DatConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        check_groups(self.dat, self.launch)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of a classifier, with `--dat` by Discrete Adversarial Training; `--eval` measures one."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig(epochs=50, min_lr=1e-6, warmup_epochs=5)
    dat: DatConfig = DatConfig()
    baselines: BaselineConfig = BaselineConfig()
    evaluation: EvalConfig = EvalConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        check_groups(self.dat, self.launch)
        check_views(self)


def check_groups(dat: DatConfig, launch: LaunchConfig) -> None:
    """Raises ConfigError for groups that do not go together."""
    if dat.free and launch.fsdp:
        raise ConfigError("--dat_free does not go with --fsdp, whose gradients lie in shards: leave out one of them.")


def check_views(config: FinetuneConfig) -> None:
    """Raises ConfigError for views of a picture that do not go together."""
    own, augment, attack = config.baselines, config.augment, config.dat.attack
    given = [f"--at {own.at}"] * (own.at != "none") + [f"--dat {config.dat.kind}"] * (attack is not None)
    if len(given) == 2:
        raise ConfigError(f"{' and '.join(given)}: give one of them, one adversary at a time.")
    if given and augment.remode == "pixel_raw" and augment.reprob > 0:
        raise ConfigError(
            f"{given[0]} takes pixels in [0, 1], and --remode pixel_raw erases with N(0, 1): give --remode pixel, or "
            "--reprob 0."
        )
    for flag in [f"--dat_jsd {own.dat_jsd:g}"] * (own.dat_jsd > 0) + ["--split_norms"] * own.split_norms:
        if attack is None:
            raise ConfigError(f"{flag} is a form of --dat: give --dat, or leave it out.")
        if config.dat.free:
            raise ConfigError(f"{flag} does not go with --dat_free, whose attack is the clean view's: leave out one.")
    if own.jsd and (given or augment.aa is None or augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax):
        raise ConfigError(
            f"--jsd {own.jsd:g} compares views of single, clean pictures: give --aa (such as augmix-m3-w3), and leave "
            "out --mixup, --cutmix, --cutmix_minmax, --dat and --at."
        )
    if own.splits_norms:
        name = "--split_norms" if own.split_norms else "--at advprop"
        if attack is not None and not attack.clean_weight:
            raise ConfigError(f"{name} evaluates norms that --dat {attack.kind}, without clean view, never trains.")
        for flag, there in (
            ("--fsdp", config.launch.fsdp),
            ("--checkpoint_activations", config.run.checkpoint_activations),
            ("--linear_probe", config.classifier.linear_probe),
        ):
            if there:
                raise ConfigError(f"{name} does not go with {flag}: leave out one of them.")


LINEAR_PROBE = FinetuneConfig(
    classifier=ClassifierConfig(linear_probe=True, cls_token=True, drop_path=0.0, layer_decay=1.0, opt="lars"),
    augment=AugmentConfig(aa=None, reprob=0.0, smoothing=0.0),
    optim=OptimConfig(batch_size=512, epochs=90, blr=0.1, warmup_epochs=10, weight_decay=0.0),
)


def load_finetune_config(arguments: Sequence[str]) -> FinetuneConfig:
    """As `load_config`, where `--linear_probe` brings defaults of its own."""
    config = load_config(FinetuneConfig, arguments)
    return load_config(FinetuneConfig, arguments, default=LINEAR_PROBE) if config.classifier.linear_probe else config
