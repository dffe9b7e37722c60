"""A comparison, from images to a report: pretrain, fine-tune every arm with every seed, measure all on the same
pictures.

`python -m mae_dat compare --data_path DIR --output_dir OUT`. Every run has a folder of its own below OUT and resumes
there, so an interrupted comparison goes on where it stood, and several processes can share the seeds before a last one
measures.
"""

import dataclasses
import functools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import flat_values, load_config, suggest
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.open import image_root, training_images
from mae_dat.experiments.parallel_runs import Stage, check_jobs, train_all
from mae_dat.experiments.pretrainings import IN_TIME, NONE, PLAIN, check_pretrainings, folder_of, pretraining, title_of
from mae_dat.robustness.corruptions import CORRUPTIONS, SEVERITIES
from mae_dat.robustness.evaluate_run import require_color
from mae_dat.robustness.evaluation import EvaluationSetup, run_evaluation
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_network
from mae_dat.robustness.report.comparison import caution, value_text
from mae_dat.robustness.report.groups import groups_of
from mae_dat.robustness.report.metrics import metrics_of
from mae_dat.robustness.scores.results import Results, TrainingCurve, TrainingFacts, TrainingGallery, TrainingRun
from mae_dat.robustness.suites.choose import CLEAN, CONFLICT, GENERATED, WORDS, SuiteSettings
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import pick_device
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.files import prepare_output_folder

CONFIGS = Path(__file__).parents[2] / "configs"
GROUP_TITLES = {
    "plain": "plain",
    "reconstruction": "reconstructions",
    "random": "random words",
    "released": "DAT",
    "paper": "DAT, Algorithm 1",
    "symbolic": "symbolic DAT",
    "at_image": "DAT at the image",
    "free": "DAT, free gradient",
    "free_at_image": "DAT, free gradient at the image",
    "fifth": "DAT on a fifth of the batch",
    "dat_jsd": "DAT with consistent predictions",
    "split_norms": "DAT with split norms",
    "pixel_at": "adversarial training on pixels",
    "advprop": "AdvProp",
    "augmix": "AugMix",
    "dat_augmix": "DAT with AugMix and JSD",
}
# Of arms that are not simply a kind of --dat.
GROUP_FLAGS = {
    "plain": "--dat none",
    "at_image": "--dat released --dat_at image",
    "free": "--dat released --dat_free",
    "free_at_image": "--dat released --dat_free --dat_at image",
    "fifth": "--dat released --dat_batch_share 0.2",
    "dat_jsd": "--dat released --dat_jsd 12",
    "split_norms": "--dat released --split_norms",
    "pixel_at": "--dat none --at pgd",
    "advprop": "--dat none --at advprop",
    "augmix": "--dat none --aa augmix-m3-w3 --jsd 12",
    "dat_augmix": "--dat released --aa augmix-m3-w3 --dat_jsd 12",
}
# Passes through the network and the tokenizer beside a plain step's, measured on two cores; only the time left depends
# on them. Of the cheaper forms of released they are counted.
GROUP_COSTS = {"plain": 1.0, "reconstruction": 2.4, "random": 2.4, "released": 3.6, "paper": 2.6, "symbolic": 3.6}
GROUP_COSTS |= {"at_image": 3.2, "free": 3.0, "free_at_image": 2.5, "fifth": 1.6, "dat_jsd": 4.6, "split_norms": 3.6}
# Passes of the network alone: 3 a view that is learned from, 2 a step of an attack.
GROUP_COSTS |= {"pixel_at": 3.0, "advprop": 4.0, "augmix": 3.0, "dat_augmix": 5.0}
PRETRAIN_COST = 0.5
MEASURE_COST, CORRUPT_COST = 0.2, 1.0


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison of fine-tunings."""

    data_path: str = "demo"
    """Folder with train/CLASS/* and val/CLASS/*, or `demo`."""
    output_dir: str = "output/compare"
    arms: tuple[str, ...] = ("plain", "random", "released", "paper")
    """plain, reconstruction (the clean view and its reconstruction), random, released, paper, symbolic; cheaper forms
    of released: at_image, free, free_at_image, fifth (of the batch); with more to it: dat_jsd, split_norms,
    dat_augmix; without words: pixel_at, advprop, augmix (docs/adversaries.md)."""
    pretrainings: tuple[str, ...] = (PLAIN,)
    """plain (the recipe as it is), with --dat released, paper, symbolic, random, reconstruction; words (--target
    both), released_words; NAME_in_time: NAME for as long as plain took; none: fine-tuned from random weights."""
    cross_arms: tuple[str, ...] = ()
    """The arms after pretrainings other than plain (default: all of --arms)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the fine-tunings; a pretraining is shared and has its config's seed."""
    pretrain: str = str(CONFIGS / "small_pretrain.yaml")
    """Recipe of the pretraining."""
    finetune: str = str(CONFIGS / "small_finetune.yaml")
    """Recipe of all fine-tunings; an arm changes --dat and its kin alone."""
    pretrain_flags: str = ""
    """Flags over the recipe, as one quoted text: --pretrain_flags="--epochs 10 --blr 1e-3"."""
    finetune_flags: str = ""
    """The same for all fine-tunings."""
    limit: int | None = 400
    """Images for each corruption and severity, and under attack (None: all of the validation split). Clean accuracy and
    shape bias are of all."""
    suite: tuple[str, ...] = ()
    """As --suite of robustness (default: clean, generated, words-random, words-symbolic, and conflict if it is there).
    """
    measure: bool = True
    """Measure and report in the end, in float32 whatever the recipe's --precision; --no_measure trains only."""
    jobs: int = 1
    """Trainings at a time, each in a process of its own with its share of the cores."""
    title: str = "MAE pretraining, then fine-tuning with and without DAT"

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError("a comparison needs at least one of --arms and one of --seeds.")
        SuiteSettings(Path(), limit=self.limit)  # refuses what it cannot be
        if PLAIN not in self.pretrainings[:1]:
            raise ConfigError(f"--pretrainings begins with {PLAIN}, which all others are held against.")
        check_pretrainings(self.pretrainings)
        check_jobs(self.jobs)
        for arm in (*self.arms, *self.cross_arms):
            if arm not in GROUP_TITLES:
                raise ConfigError(f"unknown arm {arm!r}: {suggest(arm, list(GROUP_TITLES))}")


def pretrain_config(config: CompareConfig, name: str = PLAIN) -> PretrainConfig:
    """A pretraining, shared by the arms after it."""
    recipe = ["--config", config.pretrain, *shlex.split(config.pretrain_flags), "--data_path", config.data_path]
    return pretraining(Path(config.output_dir), recipe, name)


def groups_to_train(config: CompareConfig) -> list[str]:
    """All arms, those after another pretraining as `PRETRAINING-ARM`."""
    others = [name for name in config.pretrainings if name != PLAIN]
    return [*config.arms, *(f"{name}-{arm}" for name in others for arm in config.cross_arms or config.arms)]


def split_group_name(arm: str) -> tuple[str, str]:
    """Pretraining and arm."""
    name, _, own = arm.rpartition("-")
    return name or PLAIN, own


def group_label(arm: str) -> str:
    """What the report calls an arm."""
    name, own = split_group_name(arm)
    if name in (PLAIN, NONE):
        return GROUP_TITLES[own] + (", not pretrained" if name == NONE else "")
    return f"{GROUP_TITLES[own]}, pretrained with {title_of(name)}"


def finetune_config(config: CompareConfig, arm: str, seed: int) -> FinetuneConfig:
    """One fine-tuning."""
    output, (name, kind) = Path(config.output_dir), split_group_name(arm)
    own = ["--data_path", config.data_path, "--output_dir", str(output / f"{arm}-seed{seed}"), "--seed", str(seed)]
    start = [] if name == NONE else ["--finetune", str(folder_of(output, name))]
    flags = [*shlex.split(config.finetune_flags), *own, *start, *GROUP_FLAGS.get(kind, f"--dat {kind}").split()]
    return load_config(FinetuneConfig, ["--config", config.finetune, *flags])


def _training_stages(config: CompareConfig, runs: dict[tuple[str, int], FinetuneConfig]) -> list[Stage]:
    """All trainings, pretrainings first."""
    stages = []
    for name in _pretraining_names(config):
        before = [PLAIN, name.removesuffix(IN_TIME)] if name.endswith(IN_TIME) else []
        after = tuple(map(_pretraining_title, before))
        stages.append(Stage(_pretraining_title(name), functools.partial(pretrain_config, config, name), after))
    for arm, seed in runs:
        name, _ = split_group_name(arm)
        after = () if name == NONE else (_pretraining_title(name),)
        stages.append(Stage(_run_title(arm, seed), functools.partial(finetune_config, config, arm, seed), after))
    return stages


def _pretraining_names(config: CompareConfig) -> list[str]:
    """The pretrainings that are one."""
    return [name for name in config.pretrainings if name != NONE]


def compare(config: CompareConfig, console: Console) -> Results | None:
    """Trains what is not trained yet, measures what is not measured yet, and writes results.json and the report into
    the output folder."""
    prepare_output_folder(Path(config.output_dir))
    first = pretrain_config(config)
    runs = {(arm, seed): finetune_config(config, arm, seed) for seed in config.seeds for arm in groups_to_train(config)}
    if config.measure:
        require_color(runs[config.arms[0], config.seeds[0]])
    images = training_images(first.data, lambda image: torch.zeros(0), 0, labelled=False)
    console.plan = _stage_costs(config, first, runs, len(images))
    train_all(_training_stages(config, runs), config.jobs, console)
    if not config.measure:
        return None
    return measure_and_report(config, first, runs, console)


def _run_title(arm: str, seed: int) -> str:
    """Title of a run on the progress bar."""
    return f"{group_label(arm)}, seed {seed}"


def _pretraining_title(name: str) -> str:
    """Title of a pretraining on the progress bar."""
    return "pretrain" if name == PLAIN else f"pretrain, {title_of(name)}"


def _stage_costs(
    config: CompareConfig, first: PretrainConfig, runs: dict[tuple[str, int], FinetuneConfig], count: int
) -> dict[str, float]:
    """Relative times of the stages, for the time left; the measured pace turns them into seconds."""
    # A pretraining in plain's time costs what plain costs, and one with words as a target little more.
    costs = {
        name: PRETRAIN_COST * GROUP_COSTS.get(name.removesuffix("_words"), 1.0) for name in _pretraining_names(config)
    }
    seconds = {_pretraining_title(name): cost * first.optim.epochs * count / 200 for name, cost in costs.items()}
    for (arm, seed), one in runs.items():
        seconds[_run_title(arm, seed)] = GROUP_COSTS[split_group_name(arm)[1]] * one.optim.epochs * count / 200
    if config.measure:
        cells = len(CORRUPTIONS) * len(SEVERITIES)
        seconds["measure"] = (config.limit or count // 4) * cells * (MEASURE_COST * len(runs) + CORRUPT_COST) / 200
    return seconds


def measure_and_report(
    config: CompareConfig, first: PretrainConfig, runs: dict[tuple[str, int], FinetuneConfig], console: Console
) -> Results:
    """Measures all classifiers on the same pictures, or takes what is stored, and writes the report."""
    any_run = next(iter(runs.values()))
    device = pick_device(any_run.run.device)
    view = EvalOptions(device, size=any_run.data.image_size)
    networks = [
        open_network(one.run.output_dir, one.classifier.model, _run_title(arm, seed), view)
        for (arm, seed), one in runs.items()
    ]
    root = image_root(config.data_path)
    choice = SuiteSettings(root, limit=config.limit, whole_clean=True, tokenizer=any_run.dat.tokenizer, device=device)
    asked = config.suite or (CLEAN, GENERATED, *([CONFLICT] if (root / CONFLICT).is_dir() else []), *WORDS)
    setting = EvaluationSetup(
        view, Path(config.output_dir), console, batch_size=64, num_workers=any_run.data.num_workers
    )
    return run_evaluation(networks, choice, asked, setting, config.title, _collect_training(config, first, runs))


def _collect_training(
    config: CompareConfig, first: PretrainConfig, runs: dict[tuple[str, int], FinetuneConfig]
) -> TrainingFacts:
    """Settings, curves, times and pictures of all runs, from their folders."""
    settings = {"comparison": dataclasses.asdict(config), "pretraining": flat_values(first)}
    for name in _pretraining_names(config)[1:]:
        settings[f"pretraining with {title_of(name)}"] = flat_values(pretrain_config(config, name))
    found: dict[str, TrainingRun] = {}
    for (arm, seed), one in runs.items():
        folder, label = Path(one.run.output_dir), group_label(arm)
        time = _seconds_spent(folder)
        found[_run_title(arm, seed)] = {
            "arm": arm,
            "label": label,
            "seed": seed,
            "seconds": time["seconds"],
            "cpu_seconds": time["cpu_seconds"],
            "curves": training_curves(folder),
        }
        if seed == config.seeds[0]:
            settings[f"fine-tuning, {label}"] = flat_values(one)
    settings = {_run_title: {key: _plain(value) for key, value in own.items()} for _run_title, own in settings.items()}
    begun = Path(first.run.output_dir)
    folders = {
        _pretraining_title(name): folder_of(Path(config.output_dir), name) for name in _pretraining_names(config)
    }
    return {
        "runs": found,
        "pretraining": training_curves(begun),
        "seconds": _seconds_spent(begun)["seconds"],
        "cpu_seconds": {name: _seconds_spent(folder).get("cpu_seconds", 0.0) for name, folder in folders.items()},
        "settings": settings,
        "galleries": training_galleries(config),
    }


def _seconds_spent(folder: Path) -> dict[str, float]:
    """Seconds of a training by the clock and by the processor, from `log.txt`."""
    records = read_log(folder / "log.txt")
    return {key: sum(record.get(key, 0.0) for record in records) for key in ("seconds", "cpu_seconds")}


def _plain(value: Any) -> Any:
    """A setting as JSON knows it."""
    return value if value is None or isinstance(value, str | int | float) else str(value)


def training_curves(folder: Path) -> dict[str, TrainingCurve]:
    """Curves by epoch from `log.txt`; empty where there is none."""
    records = read_log(folder / "log.txt")
    # DAT's training loss is a sum over views: only its clean part can be laid beside a plain run's.
    wanted = {
        "train_loss": ("train_loss_clean", "train_loss"),
        "test_acc1": ("test_acc1",),
        "changed_words": ("train_changed_words",),
    }
    curves: dict[str, TrainingCurve] = {}
    for name, keys in wanted.items():
        for record in records:
            key = next((key for key in keys if key in record), None)
            if key is not None:
                value = float(record[key])
                curves.setdefault(name, []).append([record["epoch"] + 1, value if math.isfinite(value) else None])
    return curves


def training_galleries(config: CompareConfig) -> list[TrainingGallery]:
    """The pictures that the runs drew after their last epoch."""
    output, seed = Path(config.output_dir), config.seeds[0]
    wanted: list[TrainingGallery] = [
        {
            "title": "What the masked autoencoder fills in",
            "caption": "Masked picture, the prediction pasted into the visible patches, and the original, after "
            "the last epoch.",
            "file": "pretrain/pictures/reconstruction.png",
        }
    ]
    for arm in groups_to_train(config):
        wanted.append(
            {
                "title": f"Visual words: {group_label(arm)}",
                "caption": "A held-out picture, the same decoded from its words, after the attack on the trained "
                "network, the difference it made (amplified), and the words that changed (dark).",
                "file": f"{arm}-seed{seed}/pictures/adversary.png",
            }
        )
    return [gallery for gallery in wanted if (output / gallery["file"]).is_file()]


def print_numbers(results: Results, output: Path) -> None:
    """Where to look, and one line an arm with the numbers that matter."""
    print("\n" + " ".join([f"Open {output / 'report.html'} (numbers: {output / 'results.json'}).", *caution(results)]))
    axes = [axis for axis in metrics_of(results) if axis.key in ("clean", "generated/mean", "conflict/bias")]
    for arm in groups_of(results):
        print(f"  {arm.title:<16} " + "   ".join(f"{axis.title} {value_text(axis, arm)}" for axis in axes))


def main(arguments: Sequence[str], default: CompareConfig | None = None, about: str = __doc__ or "") -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    config = load_config(CompareConfig, arguments, about, default=default)
    results = compare(config, console)
    if results is not None:
        print_numbers(results, Path(config.output_dir))
