"""The variants that a comparison trains: pretrainings, and groups of fine-tunings that differ in their seed alone.

A group is named by its variant of fine-tuning (`released`), after a pretraining other than plain `PRETRAINING-VARIANT`
(`none-released`). `NAME_in_time` is the pretraining NAME for as many epochs as fit into plain's training time.
"""

from dataclasses import dataclass
from pathlib import Path

from mae_dat.config.errors import ConfigError, suggest

PLAIN, NONE, IN_TIME = "plain", "none", "_in_time"


@dataclass(frozen=True)
class FinetuneVariant:
    """A way to fine-tune: its title in the report, its flags, and its cost in units of a plain training."""

    title: str
    flags: str
    cost: float


@dataclass(frozen=True)
class PretrainVariant:
    """A way to pretrain: what the report calls it after "pretrained with", and its flags."""

    title: str
    flags: str


# The costs are used for the remaining time alone. A plain step and those of the plain kinds of --dat were measured on
# two cores, tokenizer included. For cheaper forms of `released` passes were counted; without a tokenizer, passes of the
# network: 3 for each view that is learned from, 2 for each step of an attack.
FINETUNE_VARIANTS = {
    "plain": FinetuneVariant("plain", "--dat none", 1.0),
    "reconstruction": FinetuneVariant("reconstructions", "--dat reconstruction", 2.4),
    "random": FinetuneVariant("random words", "--dat random", 2.4),
    "released": FinetuneVariant("DAT", "--dat released", 3.6),
    "paper": FinetuneVariant("DAT, Algorithm 1", "--dat paper", 2.6),
    "symbolic": FinetuneVariant("symbolic DAT", "--dat symbolic", 3.6),
    "at_image": FinetuneVariant("DAT at the image", "--dat released --dat_at image", 3.2),
    "free": FinetuneVariant("DAT, free gradient", "--dat released --dat_free", 3.0),
    "free_at_image": FinetuneVariant(
        "DAT, free gradient at the image", "--dat released --dat_free --dat_at image", 2.5
    ),
    "fifth": FinetuneVariant("DAT on a fifth of the batch", "--dat released --dat_batch_share 0.2", 1.6),
    "dat_jsd": FinetuneVariant("DAT with consistent predictions", "--dat released --dat_jsd 12", 4.6),
    "split_norms": FinetuneVariant("DAT with split norms", "--dat released --split_norms", 3.6),
    "pixel_at": FinetuneVariant("adversarial training on pixels", "--dat none --at pgd", 3.0),
    "advprop": FinetuneVariant("AdvProp", "--dat none --at advprop", 4.0),
    "augmix": FinetuneVariant("AugMix", "--dat none --aa augmix-m3-w3 --jsd 12", 3.0),
    "dat_augmix": FinetuneVariant("DAT with AugMix and JSD", "--dat released --aa augmix-m3-w3 --dat_jsd 12", 5.0),
}
PRETRAIN_VARIANTS = {
    PLAIN: PretrainVariant("", ""),
    "released": PretrainVariant("DAT", "--dat released"),
    "paper": PretrainVariant("DAT by Algorithm 1", "--dat paper"),
    "symbolic": PretrainVariant("symbolic DAT", "--dat symbolic"),
    "random": PretrainVariant("random words", "--dat random"),
    "reconstruction": PretrainVariant("reconstructions", "--dat reconstruction"),
    "words": PretrainVariant("words as a target", "--target both"),
    "released_words": PretrainVariant("DAT and words as a target", "--dat released --target both"),
}


def check_finetune_variants(names: tuple[str, ...]) -> None:
    """Check the names of --arms. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in FINETUNE_VARIANTS:
            raise ConfigError(f"--arms: unknown variant {name!r}: {suggest(name, list(FINETUNE_VARIANTS))}")


def check_pretrainings(names: tuple[str, ...]) -> None:
    """Check the names of --pretrainings.

    Raises ConfigError where plain is not the first, for an unknown name, and for a `NAME_in_time` that comes before
    plain or NAME, whose times it needs.
    """
    if PLAIN not in names[:1]:
        given = " ".join(names) or "nothing"
        raise ConfigError(f"--pretrainings must start with {PLAIN}, the baseline of all others, got {given}.")
    for position, name in enumerate(names):
        base = name.removesuffix(IN_TIME)
        if base not in PRETRAIN_VARIANTS and name != NONE:
            raise ConfigError(f"--pretrainings: unknown variant {name!r}: {suggest(base, [*PRETRAIN_VARIANTS, NONE])}")
        if base != name and not {PLAIN, base} <= set(names[:position]):
            raise ConfigError(
                f"--pretrainings {name} needs {PLAIN} and {base} before it: their training times decide its epochs."
            )


def pretraining_title(name: str) -> str:
    """Return what the report calls a pretraining, after "pretrained with"."""
    base = name.removesuffix(IN_TIME)
    return PRETRAIN_VARIANTS[base].title + (" in the plain one's time" if base != name else "")


def pretraining_folder(output: Path, name: str) -> Path:
    """Return the output folder of a pretraining, below the comparison's."""
    return output / ("pretrain" if name == PLAIN else f"pretrain-{name}")


def split_group_name(group: str) -> tuple[str, str]:
    """Split a group's name into its pretraining and its variant of fine-tuning."""
    pretraining, _, variant = group.rpartition("-")
    return pretraining or PLAIN, variant


def group_label(group: str) -> str:
    """Return what the report calls a group."""
    pretraining, variant = split_group_name(group)
    title = FINETUNE_VARIANTS[variant].title
    if pretraining == PLAIN:
        return title
    return (
        f"{title}, not pretrained"
        if pretraining == NONE
        else f"{title}, pretrained with {pretraining_title(pretraining)}"
    )
