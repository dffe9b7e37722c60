"""From trained classifiers to results and a report: `main_finetune.py --eval --resume OUT [--suite corruptions]`, or
`--suite` with names of mae_dat.robustness."""

import dataclasses
import datetime
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mae_dat import run
from mae_dat.accuracy import accuracy
from mae_dat.classifier import Classifier
from mae_dat.config import FinetuneConfig, RunConfig, command_line, flat_values, load_finetune_config
from mae_dat.contenders import View, open_contender
from mae_dat.contest import Setting, examine, print_headline
from mae_dat.corruptions import SEVERITIES
from mae_dat.data import ImageSet
from mae_dat.distributed import World, all_sum, together
from mae_dat.errors import ConfigError
from mae_dat.finetune import evaluated_config, finetune, held_out_images, held_out_loader, load_classifier
from mae_dat.generated import SHAPES, TEXTURES
from mae_dat.machine import machine, versions
from mae_dat.measuring import Conflict, Evaluation, evaluate, read_conflicts
from mae_dat.metrics import Console, read_log
from mae_dat.report import Results, Run, write_report
from mae_dat.sources import image_root
from mae_dat.suites import Choice

logger = logging.getLogger(__name__)


def evaluate_checkpoint(config: FinetuneConfig, console: Console) -> None:
    """Measures one classifier on the validation images; with the suite `corruptions` it writes a report.

    The report goes into --output_dir, or a folder `evaluation` beside the weights where none was named.

    Raises ConfigError without --resume, CheckpointError when the checkpoint's head does not fit the data.
    """
    if not config.run.resume:
        raise ConfigError("--eval needs --resume: the output folder of a fine-tuning, or a weights file.")
    source, suite = Path(config.run.resume), config.evaluation.suite
    folder = source if source.is_dir() else source.parent
    config, classes = evaluated_config(source, config)
    if suite == ("corruptions",):
        require_color(config)
        check_suite(config.evaluation.limit)
    if suite != ("clean",) and config.run.output_dir == RunConfig().output_dir:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder / "evaluation")))
    if suite not in (("clean",), ("corruptions",)):
        evaluate_suites(config, console)
        return
    with run.place(config.run, config.launch, console, training=False) as where:
        images = held_out_images(config, classes)
        model = load_classifier(source, config, images.classes).to(where.device)
        final = accuracy(model, held_out_loader(config, images, where), where.device, where.precision)
        logger.info("accuracy %.2f %% top-1, %.2f %% top-5 on %s", final["test_acc1"], final["test_acc5"], images.root)
        if suite == ("clean",):
            return
        conflicts = conflict_pictures(images)
        name = source.name if source.is_dir() else source.stem
        found = measure(
            {name: model}, images, config, where.device, console, conflicts, config.evaluation.limit, world=where.world
        )
        if where.world.main:
            output = where.output
            entry = as_run(found, name, name, name, folder, seed=config.run.seed)
            results = assemble([entry], {"evaluation": flat_values(config)}, f"Robustness of {name}", found)
            logger.info("wrote %s", write_report(results, output))


def evaluate_suites(config: FinetuneConfig, console: Console) -> None:
    """The suites of mae_dat.robustness, for the classifier of --resume on the benchmarks of --data_path."""
    source = str(config.run.resume)
    with run.place(config.run, config.launch, console, training=False) as where:
        view = View(where.device, where.precision, config.data.image_size)
        contender = together(lambda: open_contender(source, config.classifier.model, Path(source).stem, view))
        batch_size, root = 2 * config.optim.batch_size, image_root(config.data.data_path)
        choice = Choice(
            root, limit=config.evaluation.limit, seed=config.run.seed, tokenizer=config.dat.tokenizer,
            batch_size=batch_size, device=where.device,
        )  # fmt: skip
        setting = Setting(view, where.output, console, where.world, batch_size, config.data.num_workers)
        results = examine([contender], choice, config.evaluation.suite, setting, f"Robustness of {contender.name}")
        if where.world.main:
            print_headline(results)


def check_suite(limit: int | None, severities: Sequence[int] = SEVERITIES) -> None:
    """Raises ConfigError for a measurement that cannot be made, before anything is trained for it."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: give at least 1 image a corruption, or None for all.")
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ConfigError(f"--severities {' '.join(map(str, severities))}: give some of 1 to 5.")


def require_color(config: FinetuneConfig) -> None:
    """Raises ConfigError for a classifier of grey pictures: the corruptions are defined for colour."""
    if config.data.in_chans != 3:
        raise ConfigError(f"corruptions are defined for colour pictures, not for --in_chans {config.data.in_chans}.")


def conflict_pictures(images: ImageSet) -> list[Conflict]:
    """The generated cue-conflict pictures beside a generated validation split; none for other images."""
    folder = Path(images.root).parent / "conflict"
    if set(images.classes) != set(SHAPES) or not folder.is_dir():
        return []
    return read_conflicts(folder, images.classes, dict(zip(TEXTURES, SHAPES, strict=True)))


def measure(
    models: Mapping[str, Classifier],
    images: ImageSet,
    config: FinetuneConfig,
    device: torch.device,
    console: Console,
    conflicts: Sequence[Conflict] = (),
    limit: int | None = None,
    severities: Sequence[int] = SEVERITIES,
    title: str = "measure",
    world: World = World(),  # noqa: B008 - immutable
) -> Evaluation:
    """Clean, corrupted and conflicting pictures for all models, with a progress bar."""
    tasks: list[Any] = []

    def progress(what: str, done: int, total: int) -> None:
        if not tasks:
            tasks.append(console.task(title, total, "picture").__enter__())
        tasks[0].advance(what, done - tasks[0].done)

    try:
        return evaluate(
            models,
            images,
            limit=limit,
            severities=severities,
            conflicts=conflicts,
            batch_size=64,
            num_workers=config.data.num_workers,
            device=device,
            rank=world.rank,
            world=world.size,
            reduce=lambda counts: all_sum(counts.to(device)).cpu(),
            progress=progress,
        )
    finally:
        for task in tasks:
            task.__exit__(None, None, None)


def as_run(found: Evaluation, key: str, name: str, label: str, folder: Path, seed: int) -> Run:
    """One model's scores with the curves and the time of its training, from the folder's log."""
    curves, seconds = training_curves(folder)
    return {**found["models"][key], "name": name, "label": label, "seed": seed, "curves": curves, "seconds": seconds}


def training_curves(folder: Path) -> tuple[dict[str, list[list[float | None]]], float]:
    """Curves by epoch from `log.txt`, and the seconds of training; empty where there is no log."""
    records = read_log(folder / "log.txt")
    # DAT's training loss is a sum over views: only its clean part can be laid beside a plain run's.
    wanted = {
        "train_loss": ("train_loss_clean", "train_loss"),
        "test_acc1": ("test_acc1",),
        "changed_words": ("train_changed_words",),
    }
    curves: dict[str, list[list[float | None]]] = {}
    for name, keys in wanted.items():
        for record in records:
            key = next((key for key in keys if key in record), None)
            if key is not None:
                curves.setdefault(name, []).append([float(record["epoch"] + 1), float(record[key])])
    return curves, sum(record.get("seconds", 0.0) for record in records)


def assemble(runs: list[Run], settings: dict[str, dict[str, Any]], title: str, found: Evaluation) -> Results:
    """The results of an experiment, without galleries and pretraining."""
    protocol = found["protocol"]
    notes = [
        f"Corruptions: {protocol['source']}.",
        f"Each corruption and severity was measured on {protocol['images']} of {protocol['images_available']} "
        f"validation images (seed {protocol['seed']}), the same for all models.",
    ]
    return {
        "title": title,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "notes": notes,
        "models": runs,
        "galleries": [],
    }


def main() -> None:
    """The command line of `main_finetune.py`: fine-tunes, or evaluates with `--eval`."""
    console = run.console_for_command()
    config = load_finetune_config(run.arguments())
    if config.evaluation.eval:
        evaluate_checkpoint(config, console)
        return
    final = finetune(config, console)
    logger.info("accuracy %.2f %% top-1, %.2f %% top-5", final["test_acc1"], final["test_acc5"])
