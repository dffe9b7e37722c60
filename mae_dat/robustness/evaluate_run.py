"""From trained classifiers to results and a report: `main_finetune.py --eval --resume OUT [--suite corruptions]`, or
`--suite` with names of mae_dat.robustness."""

import dataclasses
import logging
from pathlib import Path

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import FinetuneConfig, RunConfig, load_finetune_config
from mae_dat.data.open import image_root
from mae_dat.robustness.evaluation import Setting, examine, print_headline
from mae_dat.robustness.network import View, open_contender
from mae_dat.robustness.suites.choose import CLEAN, CONFLICT, GENERATED, Choice
from mae_dat.runtime.console import Console
from mae_dat.runtime.world import together
from mae_dat.training import run
from mae_dat.training.accuracy import accuracy
from mae_dat.training.finetune import evaluated_config, finetune, held_out_images, held_out_loader, load_classifier

logger = logging.getLogger(__name__)


def evaluate_checkpoint(config: FinetuneConfig, console: Console) -> None:
    """Measures one classifier on the validation images; with a suite other than `clean` it writes a report.

    The report goes into --output_dir, or a folder `evaluation` beside the weights where none was named.

    Raises ConfigError without --resume, CheckpointError when the checkpoint's head does not fit the data.
    """
    if not config.run.resume:
        raise ConfigError("--eval needs --resume: the output folder of a fine-tuning, or a weights file.")
    source, suite = Path(config.run.resume), config.evaluation.suite
    config, classes = evaluated_config(source, config)
    if suite != (CLEAN,):
        if config.run.output_dir == RunConfig().output_dir:
            folder = (source if source.is_dir() else source.parent) / "evaluation"
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=str(folder)))
        evaluate_suites(config, console)
        return
    with run.place(config.run, config.launch, console, training=False) as where:
        images = held_out_images(config, classes)
        model = load_classifier(source, config, images.classes).to(where.device)
        final = accuracy(model, held_out_loader(config, images, where), where.device, where.precision)
        logger.info("accuracy %.2f %% top-1, %.2f %% top-5 on %s", final["test_acc1"], final["test_acc5"], images.root)


def evaluate_suites(config: FinetuneConfig, console: Console) -> None:
    """The suites of mae_dat.robustness, for the classifier of --resume on the benchmarks of --data_path; `corruptions`
    are the corrupted pictures, all clean ones, and conflicting ones where there are some."""
    require_color(config)
    source, suite = str(config.run.resume), config.evaluation.suite
    with run.place(config.run, config.launch, console, training=False) as where:
        view = View(where.device, where.precision, config.data.image_size)
        contender = together(lambda: open_contender(source, config.classifier.model, Path(source).stem, view))
        batch_size, root = 2 * config.optim.batch_size, image_root(config.data.data_path)
        if "corruptions" in suite:
            made = (CLEAN, GENERATED, *([CONFLICT] if (root / CONFLICT).is_dir() else []))
            suite = (*made, *(name for name in suite if name not in (*made, "corruptions")))
        choice = Choice(
            root, limit=config.evaluation.limit, whole_clean=True, seed=config.run.seed,
            tokenizer=config.dat.tokenizer, batch_size=batch_size, device=where.device,
        )  # fmt: skip
        setting = Setting(view, where.output, console, where.world, batch_size, config.data.num_workers)
        results = examine([contender], choice, suite, setting, f"Robustness of {contender.name}")
        if where.world.main:
            print_headline(results)


def require_color(config: FinetuneConfig) -> None:
    """Raises ConfigError for a classifier of grey pictures: the corruptions are defined for colour."""
    if config.data.in_chans != 3:
        raise ConfigError(f"corruptions are defined for colour pictures, not for --in_chans {config.data.in_chans}.")


def main() -> None:
    """The command line of `main_finetune.py`: fine-tunes, or evaluates with `--eval`."""
    console = run.console_for_command()
    config = load_finetune_config(run.arguments())
    if config.evaluation.eval:
        evaluate_checkpoint(config, console)
        return
    final = finetune(config, console)
    logger.info("accuracy %.2f %% top-1, %.2f %% top-5", final["test_acc1"], final["test_acc5"])
