"""The command line: `mae-dat VERB [flags]`, the same as `python -m mae_dat VERB [flags]`.

The table in `mae_dat/verbs.py` lists every verb. The flags of a verb are parsed without torch; its code is imported
afterwards. So `--help` and mistyped flags need no torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mae_dat import __version__
from mae_dat.config.arguments import split_verb
from mae_dat.config.commands.completion import CompletionConfig
from mae_dat.config.commands.submit import launcher_command
from mae_dat.config.interrupts import interruptible
from mae_dat.config.parse import run_command
from mae_dat.verbs import FAMILIES, GROUPS, LAUNCHER, LAUNCHER_SUMMARY, VERBS

PROGRAM = "mae-dat"


def overview() -> str:
    """Return the help of `mae-dat`: every verb with its line, by group."""
    lines = [f"usage: {PROGRAM} VERB [flags]", ""]
    lines += ["Train and measure image models that stay accurate on noisy, corrupted or shifted", "data.", ""]
    for title, verbs in GROUPS.items():
        if title == "help":
            lines += ["jobs:", _line(LAUNCHER, LAUNCHER_SUMMARY), ""]
        lines += [f"{title}:", *(_line(name, verb.summary) for name, verb in verbs.items()), ""]
    examples = ("demo", "finetune --data_path DIR --output_dir OUT --dat")
    lines += [f"{PROGRAM} VERB --help lists the flags of a verb.", f"{PROGRAM} --version prints the version.", ""]
    return "\n".join([*lines, *_example_lines(examples)])


def family_overview(first: str) -> str:
    """Return the help of the verbs of two words that start with `first`, such as `visualize`."""
    kinds = {name: verb for name, verb in VERBS.items() if name.startswith(f"{first} ")}
    lines = [f"usage: {PROGRAM} {first} KIND [flags]", "", FAMILIES[first], "", "kinds:"]
    lines += [_line(name.removeprefix(f"{first} "), verb.summary) for name, verb in kinds.items()]
    lines += ["", f"{PROGRAM} {first} KIND --help lists the flags of a kind.", ""]
    examples = [verb.examples[0].removeprefix(f"{PROGRAM} ") for verb in kinds.values()]
    return "\n".join([*lines, *_example_lines(examples[:2])])


def _example_lines(examples: Sequence[str]) -> list[str]:
    return ["examples:", *(f"  {PROGRAM} {example}" for example in examples)]


def _line(name: str, summary: str) -> str:
    return f"  {name:<25}{summary}"


def run(arguments: Sequence[str]) -> int:
    """Run the verb that the first arguments name with the others, and return the exit code.

    Raises UserError; UsageError for an unknown verb.
    """
    first, *rest = list(arguments) or ["--help"]
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print(f"{PROGRAM} {__version__}")
    elif first in FAMILIES and rest in ([], ["-h"], ["--help"]):
        print(family_overview(first))
    elif first == LAUNCHER:
        return _submit(rest, f"{PROGRAM} {LAUNCHER}")
    else:
        name, rest = split_verb(arguments, [*VERBS, LAUNCHER])
        run_verb(name, rest, f"{PROGRAM} {name}")
    return 0


def _submit(arguments: Sequence[str], program: str) -> int:
    """Run the launcher, which is imported only for a job, and return the exit code."""
    if list(arguments[:1]) in (["-h"], ["--help"]):
        print(launcher_command(program).help())
        return 0
    from mae_dat.launch.submit import main as submit

    with interruptible():
        return submit(arguments, VERBS, program)


def run_verb(name: str, arguments: Sequence[str], program: str) -> None:
    """Run a verb; `program` is the command in the usage line. Raises UserError."""
    verb = VERBS[name]
    verb.call(verb.load(arguments, program))


def print_completion(config: CompletionConfig) -> None:
    """Run `mae-dat completion`: print the script for a shell."""
    from mae_dat.config.completion import CompletedVerb, completion_script

    verbs = [CompletedVerb(name, verb.summary, verb.command_line("").flags) for name, verb in VERBS.items()]
    launcher = CompletedVerb(LAUNCHER, LAUNCHER_SUMMARY, launcher_command("").flags)
    print(completion_script(config.shell, verbs, launcher), end="")


def main() -> NoReturn:
    """Run `mae-dat`, or `python -m mae_dat`: errors become one message and an exit code."""
    sys.exit(run_command(lambda: run(sys.argv[1:])))


def submit_script() -> NoReturn:
    """Run submit.py, which is `mae-dat submit`."""
    sys.exit(run_command(lambda: _submit(sys.argv[1:], Path(sys.argv[0]).name)))


def main_script(name: str) -> NoReturn:
    """Run a script with MAE's flags, such as main_finetune.py, as the verb `name`."""
    sys.exit(run_command(lambda: run_verb(name, sys.argv[1:], Path(sys.argv[0]).name)))
