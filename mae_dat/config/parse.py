"""Parse the configuration of a command strictly, from flags and YAML, and run the command.

A configuration is a dataclass whose fields are groups, and every field of a group is a flag. The command line takes
precedence over `--config`, which names a YAML file or a recipe, and that over the defaults. Importing this module does
not import torch.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import yaml

from mae_dat.config.errors import ConfigError, UserError, suggest
from mae_dat.config.recipes import find_recipe

Config = TypeVar("Config")
_CONFIG_HELP = "Any flag can also be set in a YAML file: --config FILE."


def load_config(
    kind: type[Config],
    arguments: Sequence[str],
    default: Config | None = None,
    program: str | None = None,
    examples: Sequence[str] = (),
) -> Config:
    """Build a configuration from command-line arguments and the YAML file that `--config` names.

    `program` is the command in the usage line; `examples` are printed at the end of the help. Raises ConfigError for an
    unknown key or a wrong value in the file; exits with code 2, and a suggestion, on a wrong flag or value on the
    command line, and with code 0 after `--help`.
    """
    import tyro

    _annotate_flag_names(kind)
    file, arguments = _split_config_flag(complete_bare_dat(arguments))
    parse = functools.partial(
        tyro.cli,
        kind,
        prog=program or "mae-dat",
        default=kind() if default is None else default,
        description=f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{_CONFIG_HELP}",
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    settings = _read_settings(kind, file) if file else {}
    file_arguments = [*itertools.chain(*settings.values())]
    if file and not _is_accepted(parse, file_arguments):
        wrong = next((words for words in settings.values() if not _is_accepted(parse, words)), file_arguments)
        raise ConfigError(f"{file}: `{' '.join(wrong).removeprefix('--')}` is no valid value; see --help.")
    try:
        return parse(args=[*file_arguments, *arguments])
    except SystemExit as end:
        if end.code in (None, 0) and examples:
            print("\n".join(["examples:", *(f"  {example}" for example in examples)]))
        raise


def _annotate_flag_names(kind: type[Any]) -> None:
    """Pass the flag names in the metadata of dataclass fields to tyro, for all groups of a configuration.

    tyro reads a flag's name from an annotation, `Annotated[TYPE, tyro.conf.arg(name=...)]`. Written in the class, that
    would import tyro (0.2 s) with every configuration, so the annotations of the class are replaced here.
    """
    import tyro

    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            _annotate_flag_names(hints[field.name])
        elif "flag" in field.metadata:
            flag = tyro.conf.arg(name=field.metadata["flag"])
            kind.__annotations__[field.name] = Annotated[hints[field.name], flag]


def _is_accepted(parse: Callable[..., Any], words: list[str]) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse(args=words)
    except SystemExit:
        return False
    return True


def complete_bare_dat(arguments: Sequence[str]) -> list[str]:
    """Complete a `--dat` without a value to `--dat released`."""
    completed: list[str] = []
    for position, argument in enumerate(arguments):
        completed.append(argument)
        next_argument = arguments[position + 1] if position + 1 < len(arguments) else "-"
        if argument == "--dat" and next_argument.startswith("-"):
            completed.append("released")
    return completed


def _split_config_flag(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file of `--config NAME` or `--config=NAME`, None without one, and the other arguments.

    Raises MissingInputError for neither a file nor a recipe.
    """
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name != "--config":
            continue
        if value:
            return find_recipe(value), arguments[:position] + arguments[position + 1 :]
        if position + 1 == len(arguments):
            raise ConfigError("--config needs a YAML file or the name of a recipe, such as demo_pretrain.")
        return find_recipe(arguments[position + 1]), arguments[:position] + arguments[position + 2 :]
    return None, arguments


def _read_settings(kind: type[Any], path: Path) -> dict[str, list[str]]:
    """Return a YAML file's settings as command-line arguments by key, so that one parser checks both.

    Raises ConfigError for an unknown key or another content.
    """
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must contain `key: value` lines.")
    keys = list(flat_values(kind()))
    arguments: dict[str, list[str]] = {}
    for key, value in settings.items():
        if key not in keys:
            raise ConfigError(f"{path}: unknown key {key!r}: {suggest(str(key), keys)}")
        if isinstance(value, bool):
            # YAML reads `dat: none` as text but `dat: no` as false; flags are spelled --name and --no_name.
            arguments[key] = [f"--{key}" if value else f"--no_{key}"]
        elif isinstance(value, list):
            arguments[key] = [f"--{key}", *map(str, value)]
        else:
            arguments[key] = [f"--{key}", str(value)]
    return arguments


def flat_values(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration by the names of their flags, in the order of the groups."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.metadata.get("flag", field.name)
        values.update(flat_values(value) if dataclasses.is_dataclass(value) else {flag: value})
    return values


def write_config(settings: Mapping[str, Any], path: Path) -> None:
    """Write the resolved settings of a run to a YAML file that `--config` reads."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    path.write_text(f"# {command_line()}\n" + yaml.safe_dump(values, sort_keys=False))


def command_line() -> str:
    """Return the running command with its arguments, for logs, cards and reports.

    It starts with `mae-dat` or with `python SCRIPT.py`.
    """
    script = Path(sys.argv[0]).name
    return shlex.join(
        [*(["python", script] if script.endswith(".py") and script != "__main__.py" else ["mae-dat"]), *sys.argv[1:]]
    )


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    Errors that the user can fix end the process with one message and their exit code; Ctrl-C ends it with code 130.
    """
    try:
        return main() or 0
    except UserError as error:
        logging.getLogger("mae_dat").debug("", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write("interrupted.\n")
        sys.exit(130)
