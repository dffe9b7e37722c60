"""Reject flags that were typed without the switch that makes them matter.

A YAML file or recipe may contain such flags: the command line may then add the switch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mae_dat.config.errors import UsageError

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Effect:
    """When flags of a verb have an effect."""

    flags: tuple[str, ...]
    matters: Callable[[Values], Any]
    """Whether they have one, given the values of all flags."""
    fix: str
    """What to do, so that they have one."""


def _kind_of_dat(flags: tuple[str, ...], *kinds: str) -> Effect:
    """Return when flags of --dat have an effect: with one of these kinds of adversary."""
    return Effect(flags, lambda values: values["dat"] in ("none", *kinds), f"give --dat {' or '.join(kinds)}")


def _needs(switch: str, *flags: str, fix: str = "") -> Effect:
    """Return that flags have an effect only with a switch or another flag that has a value."""
    return Effect(flags, lambda values: values[switch], f"give {fix or f'--{switch}'}")


_DAT_FLAGS = tuple(
    f"dat_{name}"
    for name in (
        "eps",
        "share",
        "random_start",
        "steps",
        "nearest",
        "rescore",
        "at",
        "free",
        "fourth_pass",
        "batch_share",
    )
)
_TOKENIZER_FLAGS = ("tokenizer", "tokenizer_precision", "tokenizer_compile")
_SCHEDULE_FLAGS = ("adversary_hold", "adversary_ramp")
_DAT = (
    Effect(_DAT_FLAGS, lambda values: values["dat"] != "none", "give --dat"),
    _kind_of_dat(("dat_eps",), "released", "paper"),
    _kind_of_dat(("dat_share",), "released", "paper", "symbolic", "random"),
    _kind_of_dat(("dat_random_start", "dat_at", "dat_free", "dat_fourth_pass"), "released"),
    _kind_of_dat(("dat_steps",), "released", "symbolic"),
    _kind_of_dat(("dat_nearest",), "symbolic", "random"),
    _kind_of_dat(("dat_rescore",), "symbolic"),
    _kind_of_dat(_SCHEDULE_FLAGS, "released", "paper", "symbolic", "random"),
)
_DAT_ALONE = (
    *_DAT,
    Effect((*_TOKENIZER_FLAGS, *_SCHEDULE_FLAGS), lambda values: values["dat"] != "none", "give --dat"),
)
_RATE = (Effect(("blr",), lambda values: values["lr"] is None, "leave out --lr, which sets the rate itself"),)


def _is_transformer(values: Values) -> bool:
    return values["model"].startswith("vit_")


def _mixes(values: Values) -> bool:
    return values["mixup"] > 0 or values["cutmix"] > 0 or values["cutmix_minmax"] is not None


def _suites(*starts: str) -> Callable[[Values], bool]:
    """Return whether one of the suites is `all` or starts with one of these words."""
    return lambda values: any(suite == "all" or suite.startswith(starts) for suite in values["suite"])


def _views(*starts: str) -> Callable[[Values], bool]:
    return lambda values: any(view.startswith(starts) for view in values["views"])


EFFECTS: dict[str, tuple[Effect, ...]] = {
    "pretrain": (
        *_DAT,
        Effect(_SCHEDULE_FLAGS, lambda values: values["dat"] != "none", "give --dat"),
        Effect(
            _TOKENIZER_FLAGS,
            lambda values: values["dat"] != "none" or values["target"] != "pixels",
            "give --dat, or --target words or both",
        ),
        Effect(("words_weight",), lambda values: values["target"] == "both", "give --target both"),
        Effect(("norm_pix_loss",), lambda values: values["target"] != "words", "give --target pixels or both"),
        Effect(("decoder_warmup",), lambda values: values["init"] or values["resume"], "give --init WEIGHTS"),
        *_RATE,
    ),
    "finetune": (
        *_DAT,
        Effect((*_TOKENIZER_FLAGS, "dat_jsd", "split_norms"), lambda values: values["dat"] != "none", "give --dat"),
        Effect(
            _SCHEDULE_FLAGS, lambda values: values["dat"] != "none" or values["at"] != "none", "give --dat, or --at pgd"
        ),
        Effect(
            ("at_norm", "at_eps", "at_steps", "at_step", "at_clean_weight"),
            lambda values: values["at"] != "none",
            "give --at pgd or advprop",
        ),
        _needs("jsd", "resplit", fix="--jsd 12"),
        Effect(("color_jitter",), lambda values: values["aa"] is None, "give --aa None"),
        _needs("reprob", "remode", "recount", fix="--reprob 0.25"),
        Effect(("mixup_prob", "mixup_mode"), _mixes, "give --mixup 0.8 or --cutmix 1"),
        Effect(
            ("mixup_switch_prob",),
            lambda values: values["mixup"] > 0 and (values["cutmix"] > 0 or values["cutmix_minmax"] is not None),
            "give both --mixup 0.8 and --cutmix 1",
        ),
        Effect(
            ("cutmix",), lambda values: values["cutmix_minmax"] is None, "leave out --cutmix_minmax, which replaces it"
        ),
        Effect(
            ("layer_decay", "drop_path"),
            lambda values: not values["linear_probe"] and values["train"] != "head",
            "leave out --linear_probe and --train head, which freeze the rest",
        ),
        _needs("eval", "suite", "restrict_classes", "limit"),
        Effect(
            ("limit_corrupted",),
            lambda values: values["eval"] and set(values["suite"]) != {"clean"},
            "give --eval --suite corruptions",
        ),
        *_RATE,
    ),
    "detect": (
        *_DAT_ALONE,
        Effect(("width", "anchor_size", "regions", "layer_decay"), _is_transformer, "give --model vit_base_patch16"),
        _needs("eval", "corrupted"),
        _needs("corrupted", "severities", fix="--eval --corrupted"),
        Effect(("eval_every",), lambda values: not values["eval"], "leave out --eval"),
        *_RATE,
    ),
    "tokenizer train": (_needs("gan_weight", "gan_start", fix="--gan_weight 0.1"),),
    "features": (
        _needs("knn", "knn_temperature", fix="--knn 20"),
        _needs("output_dir", "format", "split", fix="--output_dir DIR"),
    ),
    "evaluate": (
        Effect(("rescore",), _suites("words-symbolic"), "give --suite words-symbolic"),
        Effect(("tokenizer",), _suites("words"), "give --suite words-random words-symbolic"),
    ),
    "analyze": (
        Effect(("pixel_eps", "pixel_steps"), _views("pixel"), "give --views pixel"),
        Effect(("share",), _views("random", "released", "symbolic"), "give --views released, symbolic or random"),
    ),
    "pack": (_needs("size", "quality", fix="--size 256"), _needs("index", "classes", fix="--index DIR")),
    "corrupt": (
        _needs("shards", "shard_mb"),
        _needs("input_size", "interpolation", "crop", fix="--input_size"),
        Effect(("quality",), lambda values: not values["png"], "leave out --png, which is lossless"),
    ),
    "visualize adversary": (
        *_DAT,
        Effect(_SCHEDULE_FLAGS, lambda values: False, "give it to a training"),
    ),
    "convert": (Effect(("license",), lambda values: values["to"] == "hf", "give --to hf"),),
    "doctor": (
        Effect(
            ("model", "input_size", "precision", "checkpoint_activations"),
            lambda values: not values["quick"],
            "leave out --quick, which measures nothing",
        ),
    ),
    "compare": (
        _needs("measure", "suite", "limit", "limit_corrupted", "title", fix="--measure"),
        Effect(("cross_arms",), lambda values: len(values["pretrainings"]) > 1, "give --pretrainings plain released"),
    ),
}
"""The flags of each verb that depend on others. MAE's flags that are accepted and ignored are not among them, nor what
only the images, the weights or the machine decide."""


def flags_without_effect(verb: str, values: Values, given: Values) -> dict[str, str]:
    """Return the given flags that have no effect with the `values` of all flags, each with its fix.

    A given value that turns something off is left out.
    """
    return {
        flag: effect.fix
        for effect in reversed(EFFECTS.get(verb, ()))
        for flag in effect.flags
        if flag in given and given[flag] not in (None, False) and not effect.matters(values)
    }


def reject_flags_without_effect(verb: str, values: Values, typed: Values) -> None:
    """Raise UsageError, with the fix, for a typed flag that has no effect with the `values` of all flags."""
    for flag, fix in flags_without_effect(verb, values, typed).items():
        raise UsageError(f"--{flag} has no effect here: {fix}, or leave out --{flag}.")
