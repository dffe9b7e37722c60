"""The pretrainings that a comparison sets side by side, for the same steps or for the same time."""

import shlex
from pathlib import Path

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import ATTACK_KINDS
from mae_dat.config.parse import load_config, suggest
from mae_dat.config.runs import PretrainConfig
from mae_dat.runtime.run_log import read_log

PLAIN, NONE, IN_TIME = "plain", "none", "_in_time"
FLAGS = {
    PLAIN: "",
    **{kind: f"--dat {kind}" for kind in ATTACK_KINDS},
    "words": "--target both",
    "released_words": "--dat released --target both",
}
TITLES = {
    "released": "DAT",
    "paper": "DAT by Algorithm 1",
    "symbolic": "symbolic DAT",
    "random": "random words",
    "reconstruction": "reconstructions",
    "words": "words as a target",
    "released_words": "DAT and words as a target",
}


def check_pretrainings(names: tuple[str, ...]) -> None:
    """Raises ConfigError for an unknown one, and for `NAME_in_time` before what its time is measured by."""
    for number, name in enumerate(names):
        base = name.removesuffix(IN_TIME)
        if base not in FLAGS and name != NONE:
            raise ConfigError(f"unknown pretraining {name!r}: {suggest(base, [*FLAGS, NONE])}")
        if base != name and not {PLAIN, base} <= set(names[:number]):
            raise ConfigError(
                f"--pretrainings {name} needs {PLAIN} and {base} before it: it has to know their seconds."
            )


def title_of(name: str) -> str:
    """What a report calls it, behind `after pretraining with`."""
    base = name.removesuffix(IN_TIME)
    return TITLES[base] + (" in the plain one's time" if base != name else "")


def folder_of(output: Path, name: str) -> Path:
    """Its output folder below a comparison's."""
    return output / ("pretrain" if name == PLAIN else f"pretrain-{name}")


def pretraining(output: Path, recipe: list[str], name: str) -> PretrainConfig:
    """Settings of a pretraining: a recipe's flags, and its own over them.

    `NAME_in_time` is NAME for as many epochs as plain's seconds suffice for, by the seconds a step that both took, and
    with as large a part of them for the warm-up of the rate. It asks for their finished logs.
    """
    base = name.removesuffix(IN_TIME)
    flags = [*recipe, *shlex.split(FLAGS[base]), "--output_dir", str(folder_of(output, name))]
    config = load_config(PretrainConfig, flags)
    if base == name:
        return config
    part = seconds_a_step(folder_of(output, PLAIN)) / seconds_a_step(folder_of(output, base))
    epochs = max(1, round(part * config.optim.epochs))
    warmup = config.optim.warmup_epochs * epochs / config.optim.epochs
    return load_config(PretrainConfig, [*flags, "--epochs", str(epochs), "--warmup_epochs", str(warmup)])


def seconds_a_step(folder: Path) -> float:
    """Seconds of training an update, from a finished run's log: without evaluating and saving."""
    records = read_log(folder / "log.txt")
    return sum(record["seconds"] for record in records) / records[-1]["step"]
