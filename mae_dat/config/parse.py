"""Parse the command line of a command strictly, with the YAML file that `--config` names, and run the command.

The command line takes precedence over the file, and that over the defaults. Importing this module does not import
torch.
"""

import contextlib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mae_dat.config.arguments import CONFIG_FLAG, Command, description_of
from mae_dat.config.command_config import resolve_config
from mae_dat.config.errors import DISK_FULL, InterruptError, MissingInputError, StorageError, UserError
from mae_dat.config.extras import OPENCV_WITHOUT_LIBGL
from mae_dat.config.flags import Config, default_config, flags_of
from mae_dat.config.interrupts import INTERRUPTED, is_interrupt
from mae_dat.config.terminal import printable_lines


def load_config(
    kind: type[Config],
    arguments: Sequence[str],
    program: str = "mae-dat",
    examples: Sequence[str] = (),
    description: str | None = None,
    check_effects: bool = False,
) -> Config:
    """Build a configuration from command-line arguments and the YAML file or recipe that `--config` names.

    `program` is the command in the usage line; `examples` are printed at the end of the help, `description` at its
    start in place of the class's docstring. `--help` prints the help and exits with code 0. Raises UsageError for a
    wrong flag or value on the command line, and with `check_effects` for a flag without effect (effects.py).
    Raises ConfigError for a wrong file or values that cannot work, MissingInputError for a missing file.
    """
    given = command_of(kind, program, examples, description).parse(arguments)
    file = given.pop(CONFIG_FLAG.name, None)
    return resolve_config(kind, given, file, check_effects)


def command_of(
    kind: type[Any], program: str = "mae-dat", examples: Sequence[str] = (), description: str | None = None
) -> Command:
    """Return the command line of a configuration: its flags, and `--config` unless it has only arguments."""
    flags = flags_of(kind, default_config(kind, {}))
    if not all(flag.positional for flag in flags):
        flags.append(CONFIG_FLAG)
    return Command(program, description or description_of(kind), flags, examples)


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
    except BaseException as error:
        code = _explain(error)
        if code is None:
            raise
        sys.exit(code)


def _describe_full_disk(error: OSError) -> str:
    """Return the message of a write that failed for lack of space: the file, if known, and the free bytes."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    folder = path.parent if path and path.parent.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free
    cause = DISK_FULL[error.errno or 0]
    return f"could not write {path or 'a file'}: {cause} ({free:,} bytes free in {folder.absolute()}). Free some space."


def _explain(error: BaseException) -> int | None:
    """Print the message of an error that ends a command, and return the exit code; None for a bug and for an exit."""
    if isinstance(error, UserError):
        logging.getLogger("mae_dat").debug("", exc_info=True)
        word = "interrupted" if isinstance(error, InterruptError) else "error"
        sys.stderr.write(f"{word}: {printable_lines(str(error))}\n")
        return error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        sys.stderr.write(f"error: {printable_lines(_describe_full_disk(error))}\n")
        return StorageError.exit_code
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if is_interrupt(error):
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write("interrupted.\n")
        return INTERRUPTED
    if isinstance(error, ImportError) and "libGL" in str(error):
        sys.stderr.write(f"error: {OPENCV_WITHOUT_LIBGL}\n")
        return MissingInputError.exit_code
    return None
