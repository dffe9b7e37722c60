"""The command line: `python -m mae_dat COMMAND [flags]`.

One table names every command. A command's module is imported when the command is called, so that the list of commands
needs neither torch nor any other package. Training has scripts of its own: main_pretrain.py and main_finetune.py.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import run_command, suggest


class Command(NamedTuple):
    """A command: the module whose `main(arguments)` runs it, and one line about it."""

    module: str
    summary: str


GROUPS: dict[str, dict[str, Command]] = {
    "train": {
        "detect": Command("mae_dat.detection.train", "train an object detector, or measure its mAP"),
        "train_tokenizer": Command("mae_dat.training.tokenizer.train", "train a light tokenizer on any images"),
        "distill_tokenizer": Command("mae_dat.training.tokenizer.distill", "train a light student of a tokenizer"),
    },
    "measure": {
        "robustness": Command("mae_dat.robustness.command", "measure models on every benchmark, with a report"),
        "scorecard": Command("mae_dat.robustness.report.write", "make the report again from results.json"),
        "compare": Command("mae_dat.experiments.compare", "fine-tune plainly, with random words, with DAT; one report"),
        "proof": Command("mae_dat.experiments.proof", "compare all adversaries over data sets and seeds"),
        "features": Command("mae_dat.analysis.features", "write features of a model; classify by nearest neighbors"),
    },
    "look": {
        "visualize": Command("mae_dat.analysis.visualize", "draw reconstructions, attention, words and adversaries"),
        "explore": Command("mae_dat.analysis.explore", "corrupt one image, or change its words, on a local page"),
        "analysis": Command("mae_dat.analysis.why_dat", "compare adversarial with clean images inside a model"),
    },
    "data": {
        "pack": Command("mae_dat.data.shards.pack", "pack a folder of images into tar shards"),
        "scan": Command("mae_dat.data.scan", "find unreadable and changed files"),
    },
    "weights": {
        "fetch": Command("mae_dat.models.weights.fetch", "list and download released weights"),
        "convert": Command(
            "mae_dat.models.weights.convert", "convert weights to timm, MAE, Hugging Face, ONNX, export"
        ),
    },
    "help": {
        "demo": Command("mae_dat.experiments.demo", "run the whole toolkit on generated images"),
    },
}
COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


def overview() -> str:
    """Return the help text: every command with its line, by group."""
    lines = ["usage: python -m mae_dat COMMAND [flags]", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<18} {command.summary}" for name, command in commands.items()), ""]
    lines += ["python -m mae_dat COMMAND --help lists the flags of a command.", "Training: main_pretrain.py and"]
    lines[-1] += " main_finetune.py. Jobs on SLURM: submit.py."
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names with the others. Raise ConfigError for an unknown command."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print_overview()
        return
    if name not in COMMANDS:
        raise ConfigError(f"there is no command {name!r}: {suggest(name, list(COMMANDS))}")
    importlib.import_module(COMMANDS[name].module).main(rest)


def print_overview() -> None:
    """Print the help text."""
    print(overview())


def main() -> None:
    """Run `python -m mae_dat`: errors become one message and an exit code."""
    run_command(lambda: run(sys.argv[1:]))
