"""A command: its configuration from flags and YAML, parsed strictly, and its end as a message and an exit code.

A configuration is a dataclass of groups whose fields are all flags. Order of precedence: command line, `--config
FILE.yaml`, defaults. Importing this module does not import torch.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mae_dat.config.errors import ConfigError, MissingInputError, UserError

Config = TypeVar("Config")
PACKAGE = Path(__file__).parents[1]


def load_config(
    kind: type[Config],
    arguments: Sequence[str],
    description: str = "",
    default: Config | None = None,
    program: str | None = None,
) -> Config:
    """Builds a configuration from command-line arguments and the YAML file that `--config` names.

    `program` is what the usage line calls the command, where its file's name would not do. Raises ConfigError
    for an unknown key or wrong value in the file; exits with code 2 and a suggestion on a mistyped flag.
    """
    import tyro

    arguments = bare_dat(list(arguments))
    file, arguments = _take_config(arguments)
    parse = functools.partial(
        tyro.cli,
        kind,
        prog=program or _command_name(),
        default=kind() if default is None else default,
        description=f"{description or kind.__doc__}\n\nEvery flag may stand in a YAML file given with --config FILE.",
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    from_file = _as_arguments(kind, file) if file else {}
    words = [*itertools.chain(*from_file.values())]
    if file and not _accepted(parse, words):
        wrong = next((one for one in from_file.values() if not _accepted(parse, one)), words)
        raise ConfigError(f"{file}: `{' '.join(wrong).removeprefix('--')}` has no value that it can take; see --help.")
    return parse(args=[*words, *arguments])


def _command_name() -> str:
    """Return the running command as the user types it: `main_pretrain.py`, or `python -m mae_dat compare`."""
    words, _ = _running_command()
    return words[-1] if words[-1].endswith(".py") else shlex.join(words)


def _running_command() -> tuple[list[str], list[str]]:
    """Return the words that start the running command, such as `python -m mae_dat compare`, and its arguments."""
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    if script.parent == PACKAGE and script.name == "__main__.py":
        return ["python", "-m", "mae_dat", *arguments[:1]], arguments[1:]
    return ["python", script.name], arguments


def _accepted(parse: Callable[..., Any], words: list[str]) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(args=words)
    except SystemExit:
        return False
    return True


def bare_dat(arguments: list[str]) -> list[str]:
    """Completes a `--dat` without a value to `--dat released`."""
    completed: list[str] = []
    for position, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else "-"
        if argument == "--dat" and following.startswith("-"):
            completed.append("released")
    return completed


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name != "--config":
            continue
        if value:
            return Path(value), arguments[:position] + arguments[position + 1 :]
        if position + 1 == len(arguments):
            raise ConfigError("--config needs the path of a YAML file, such as configs/demo_pretrain.yaml.")
        return Path(arguments[position + 1]), arguments[:position] + arguments[position + 2 :]
    return None, arguments


def _as_arguments(kind: type[Any], path: Path) -> dict[str, list[str]]:
    """A YAML file's settings, each as command-line arguments, so that both are checked by the same parser."""
    if not path.is_file():
        siblings = sorted(str(file) for file in path.parent.glob("*.yaml"))
        raise MissingInputError(f"--config {path}: no such file; {suggest(str(path), siblings) if siblings else ''}")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold `key: value` lines.")
    known = list(flat_values(kind()))
    arguments: dict[str, list[str]] = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}: {suggest(str(key), known)}")
        if isinstance(value, bool):
            # YAML reads `dat: none` as text but `dat: no` as false; flags are spelled --name and --no_name.
            arguments[key] = [f"--{key}" if value else f"--no_{key}"]
        elif isinstance(value, list):
            arguments[key] = [f"--{key}", *map(str, value)]
        else:
            arguments[key] = [f"--{key}", str(value)]
    return arguments


def suggest(word: str, known: Sequence[str]) -> str:
    """`did you mean ...?`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."


def flat_values(config: Any) -> dict[str, Any]:
    """All settings of a configuration as one dictionary of flag names, in the order of their groups."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values.update(flat_values(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return values


def write_config(config: Any, path: Path) -> None:
    """Writes the resolved settings beside a run, in the form that `--config` reads."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in flat_values(config).items()}
    path.write_text(f"# {command_line()}\n" + yaml.safe_dump(values, sort_keys=False))


def command_line(command: str = "") -> str:
    """Return the running command with its arguments, for logs, cards and reports.

    `command` names one of `python -m mae_dat COMMAND` where the process was started in another way.
    """
    words, arguments = _running_command()
    return shlex.join([*(["python", "-m", "mae_dat", command] if command else words), *arguments])


def run_command(main: Callable[[], None]) -> None:
    """Runs a command: errors that the user can mend become one message and their exit code; Ctrl-C becomes 130."""
    try:
        main()
    except UserError as error:
        logging.getLogger("mae_dat").debug("", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write("interrupted.\n")
        sys.exit(130)
