"""Flags of `mae-dat compare`, `mae-dat demo` and `mae-dat proof`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO, check_limits, data_root
from mae_dat.config.protocols import ProtocolName
from mae_dat.config.variants import NONE, PLAIN, check_finetune_variants, check_pretrainings


@dataclasses.dataclass(frozen=True)
class CompareConfig(CommandConfig):
    """Pretrain, fine-tune every variant with every seed, and measure all models on the same images.

    Every training has its own folder below --output_dir and resumes there: to resume an interrupted comparison, run the
    same command again. Several processes can share the seeds (--seeds, --no_measure) before a last one measures.
    """

    verb = "compare"
    data_path: str | None = None
    """Folder with train/CLASS/* and val/CLASS/* (default: $MAE_DAT_DATA, or `demo` for generated images)."""
    output_dir: str = "output/compare"
    """Folder for all trainings, results.json and the report."""
    arms: tuple[str, ...] = ("plain", "random", "released", "paper")
    """Variants of fine-tuning: plain, reconstruction (the clean view and its reconstruction), random, released, paper,
    symbolic; cheaper forms of released: at_image, free, free_at_image, fifth (of the batch); extended forms: dat_jsd,
    split_norms, dat_augmix; without visual words: pixel_at, advprop, augmix."""
    pretrainings: tuple[str, ...] = (PLAIN,)
    """Variants of pretraining: plain (the recipe as it is); with --dat: released, paper, symbolic, random,
    reconstruction; words (--target both), released_words; NAME_in_time: NAME for as long as plain took; none: fine-tune
    from random weights."""
    cross_arms: tuple[str, ...] = ()
    """Variants of fine-tuning after pretrainings other than plain (default: all of --arms)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the fine-tunings. They share a pretraining, which has the seed of its recipe."""
    pretrain_config: str = "small_pretrain"
    """Recipe or YAML file of the pretrainings."""
    finetune_config: str = "small_finetune"
    """Recipe or YAML file of all fine-tunings; each variant changes only --dat and related flags."""
    pretrain_flags: str = ""
    """Flags that take precedence over the recipe, as one quoted text: --pretrain_flags="--epochs 10 --blr 1e-3"."""
    finetune_flags: str = ""
    """The same for all fine-tunings."""
    limit: int | None = None
    """Images of each suite, and of each corruption and severity (default: all)."""
    limit_corrupted: int | None = 400
    """At most this many images for each corruption and severity, and under each attack; None for as many as
    --limit."""
    suite: tuple[str, ...] = ()
    """Suites as in `mae-dat evaluate` (default: clean, generated, words-random, words-symbolic, and conflict if it
    exists)."""
    restrict_classes: bool = False
    """Measure predictions only among the classes that have images in a suite's folder (default: among all)."""
    protocol: ProtocolName = "native"
    """How the measurement resizes and crops images, as in `mae-dat evaluate`: native, imagenet-c, dat or timm."""
    measure: bool = True
    """Measure in float32 after the trainings, and write the report."""
    jobs: int = 1
    """Trainings at a time, each in its own process with its share of the CPU cores."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    title: str = "MAE pretraining, then fine-tuning with and without DAT"
    """Title of the report."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError("a comparison needs at least one of --arms and one of --seeds.")
        check_limits(self.limit, self.limit_corrupted)
        if self.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1 training at a time, got {self.jobs}.")
        check_pretrainings(self.pretrainings)
        check_finetune_variants((*self.arms, *self.cross_arms))

    @property
    def root(self) -> str:
        """The folder of images: --data_path, $MAE_DAT_DATA or `demo`."""
        return data_root(self.data_path, DEMO)

    def pretrainings_to_train(self) -> list[str]:
        """Return the names of the pretrainings, without `none`."""
        return [name for name in self.pretrainings if name != NONE]


@dataclasses.dataclass(frozen=True)
class DemoConfig(CompareConfig):
    """Run the whole toolkit: pretraining, fine-tuning with and without DAT, evaluation, report.

    The images are generated, so nothing is downloaded. The models are small: two idle CPU cores need 9 to 17 minutes.
    To resume an interrupted demo, run the same command again. The flags are those of `mae-dat compare` with other
    defaults.
    """

    verb = "demo"
    data_path: str | None = DEMO
    """Folder with train/CLASS/* and val/CLASS/*, or `demo` for generated images."""
    output_dir: str = "output/demo"
    """Folder for all trainings, results.json and the report."""
    arms: tuple[str, ...] = ("plain", "random", "released")
    """Variants of fine-tuning, as in `mae-dat compare`: plain, random words, and DAT as in the authors' code."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the fine-tunings."""
    pretrain_config: str = "demo_pretrain"
    """Recipe or YAML file of the pretraining."""
    finetune_config: str = "demo_finetune"
    """Recipe or YAML file of all fine-tunings."""
    limit_corrupted: int | None = 100
    """At most this many images for each corruption and severity, and under each attack; None for as many as
    --limit."""
    title: str = "mae_dat demo: fine-tuning with and without DAT"
    """Title of the report."""


PROOF_GROUPS = (
    "plain", "reconstruction", "random", "released", "symbolic", "pixel_at", "advprop", "augmix", "dat_augmix",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProofConfig(CommandConfig):
    """Train with every adversary and baseline, with and without pretraining, on several data sets and seeds.

    Writes the tables of all data sets to OUT/results.md. To resume, run the same command again.
    """

    verb = "proof"
    data_path: tuple[str, ...] = ()
    """Folders with train/CLASS/* and val/CLASS/* (default: $MAE_DAT_DATA, or `demo` for generated images)."""
    output_dir: str = "output/proof"
    """Folder for all trainings, the reports and results.md."""
    arms: tuple[str, ...] = PROOF_GROUPS
    """Variants of fine-tuning after the plain pretraining, as in `mae-dat compare`."""
    pretrainings: tuple[str, ...] = (PLAIN, NONE, "released")
    """Variants of pretraining, as in `mae-dat compare`; plain comes first."""
    cross_arms: tuple[str, ...] = ("plain", "released")
    """Variants of fine-tuning after the other pretrainings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the fine-tunings."""
    pretrain_config: str = "proof_pretrain"
    """Recipe or YAML file of the pretrainings."""
    finetune_config: str = "proof_finetune"
    """Recipe or YAML file of all fine-tunings."""
    limit: int | None = None
    """Images of each suite, and of each corruption and severity (default: all)."""
    limit_corrupted: int | None = None
    """At most this many images for each corruption and severity, and under each attack (default: as --limit)."""
    restrict_classes: bool = False
    """Measure predictions only among the classes that have images in a suite's folder (default: among all)."""
    protocol: ProtocolName = "native"
    """How the measurement resizes and crops images, as in `mae-dat evaluate`: native, imagenet-c, dat or timm."""
    jobs: int = 2
    """Trainings at a time, each in its own process with its share of the CPU cores."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    quick: bool = False
    """Use a few generated images, one epoch and one seed, only to check that everything works."""

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders of images: --data_path, $MAE_DAT_DATA or `demo`."""
        return self.data_path or (data_root(None, DEMO),)
