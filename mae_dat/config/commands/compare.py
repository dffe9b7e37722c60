"""Flags of `mae-dat compare`, `mae-dat demo` and `mae-dat proof`."""

import dataclasses

from mae_dat.config.errors import ConfigError
from mae_dat.config.variants import NONE, PLAIN, check_finetune_variants, check_pretrainings


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Pretrain, fine-tune every variant with every seed, and measure all models on the same images.

    Every training has its own folder below --output_dir and resumes there: to resume an interrupted comparison, run the
    same command again. Several processes can share the seeds (--seeds, --no_measure) before a last one measures.
    """

    data_path: str = "demo"
    """Folder with train/CLASS/* and val/CLASS/*, or `demo`."""
    output_dir: str = "output/compare"
    arms: tuple[str, ...] = ("plain", "random", "released", "paper")
    """Fine-tunings: plain, reconstruction (the clean view and its reconstruction), random, released, paper, symbolic;
    cheaper forms of released: at_image, free, free_at_image, fifth (of the batch); extended forms: dat_jsd,
    split_norms, dat_augmix; without visual words: pixel_at, advprop, augmix (docs/reference/adversaries.md)."""
    pretrainings: tuple[str, ...] = (PLAIN,)
    """plain (the recipe as it is), with --dat released, paper, symbolic, random, reconstruction; words (--target
    both), released_words; NAME_in_time: NAME for as long as plain took; none: fine-tuned from random weights."""
    cross_arms: tuple[str, ...] = ()
    """Fine-tunings after pretrainings other than plain (default: all of --arms)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the fine-tunings; a pretraining is shared and has its config's seed."""
    pretrain: str = "small_pretrain"
    """Recipe of the pretraining, a name or a file."""
    finetune: str = "small_finetune"
    """Recipe of all fine-tunings, a name or a file; each of --arms changes --dat and related flags only."""
    pretrain_flags: str = ""
    """Flags over the recipe, as one quoted text: --pretrain_flags="--epochs 10 --blr 1e-3"."""
    finetune_flags: str = ""
    """The same for all fine-tunings."""
    limit: int | None = 400
    """Images for each corruption and severity, and under attack (None: all of the validation split). Clean accuracy and
    shape bias always use all."""
    suite: tuple[str, ...] = ()
    """As --suite of evaluate (default: clean, generated, words-random, words-symbolic, and conflict if it exists).
    """
    measure: bool = True
    """Measure and report at the end, in float32 whatever the recipe's --precision; --no_measure only trains."""
    jobs: int = 1
    """Trainings at a time, each in its own process with its share of the cores."""
    title: str = "MAE pretraining, then fine-tuning with and without DAT"

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError("a comparison needs at least one of --arms and one of --seeds.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: give at least 1 image.")
        if self.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1 training at a time, got {self.jobs}.")
        check_pretrainings(self.pretrainings)
        check_finetune_variants((*self.arms, *self.cross_arms))

    def pretrainings_to_train(self) -> list[str]:
        """Return the names of the pretrainings, without `none`."""
        return [name for name in self.pretrainings if name != NONE]


PROOF_GROUPS = (
    "plain", "reconstruction", "random", "released", "symbolic", "pixel_at", "advprop", "augmix", "dat_augmix",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ProofConfig:
    """Train with every adversary and baseline, with and without pretraining, on several data sets and seeds.

    Writes one table for each data set into OUT/results.md. To resume, run the same command again.
    """

    data_paths: tuple[str, ...] = ("demo",)
    """Folders with train/CLASS/* and val/CLASS/*, or `demo` for the generated images."""
    output_dir: str = "output/proof"
    arms: tuple[str, ...] = PROOF_GROUPS
    """Fine-tunings after the plain pretraining; as --arms of compare."""
    pretrainings: tuple[str, ...] = (PLAIN, NONE, "released")
    """As --pretrainings of compare: plain first, none, with --dat released, ..."""
    cross_arms: tuple[str, ...] = ("plain", "released")
    """Fine-tunings after the other pretrainings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain: str = "proof_pretrain"
    """Recipe of the pretrainings, a name or a file."""
    finetune: str = "proof_finetune"
    """Recipe of all fine-tunings, a name or a file."""
    limit: int | None = None
    """Images for each corruption and severity, and under attack (None: all)."""
    jobs: int = 2
    """Trainings at a time."""
    quick: bool = False
    """A few generated images, one epoch and one seed: only checks that everything works."""


DEMO_COMPARISON = CompareConfig(
    data_path="demo",
    output_dir="output/demo",
    arms=("plain", "random", "released"),
    seeds=(0,),
    pretrain="demo_pretrain",
    finetune="demo_finetune",
    limit=100,
    title="mae_dat demo: generated shapes and textures",
)
"""Defaults of `mae-dat demo`."""
