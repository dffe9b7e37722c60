"""Errors that the user can fix. The message names the wrong file or value and the next step; the class, an exit code.

Any other exception is a bug of this package and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable, Sequence

DISK_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "no space left for a file of this size",
}
"""Causes in words, by error number, of a write for which there is no space."""


class UserError(Exception):
    """Base class of all errors caused by input. `exit_code` is what a command returns to the shell or the scheduler."""

    exit_code = 64


class UsageError(UserError):
    """A wrong command line: an unknown command, flag or type of value, or a flag that has no effect."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a config key or a combination of them that cannot work."""

    exit_code = 64


class InputSizeError(ConfigError):
    """An input size that a requested model, tokenizer or suite does not support."""


class DataError(UserError):
    """Images or labels that exist but cannot be used."""

    exit_code = 65


class MissingInputError(UserError):
    """A path that does not exist."""

    exit_code = 66


class DownloadError(UserError):
    """Released weights that could not be downloaded: no network, no such file, or no file that can be trusted."""

    exit_code = 69


class NoProgressError(UserError):
    """A job that was restarted repeatedly without completing a single new step."""

    exit_code = 70


class OutputError(UserError):
    """An output folder that cannot be written, or that another run is using."""

    exit_code = 73


class StorageError(UserError):
    """Reading or writing failed midway: disk full, quota, I/O error."""

    exit_code = 74


class RetryError(UserError):
    """The run was stopped from outside after saving its progress: run the same command again to resume."""

    exit_code = 75


class InterruptError(UserError):
    """A signal requested a stop. The exit code is 130 after Ctrl-C, and 75, as for RetryError, after a scheduler's."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankError(UserError):
    """Another rank failed; the exit code is that of its error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericsError(UserError):
    """A loss or gradient that is not finite; the weights were left unchanged."""

    exit_code = 76


class InstallationError(UserError):
    """An installation with which a check of `mae-dat doctor` failed."""

    exit_code = 78


class RequirementError(UserError):
    """An evaluation that does not meet the requirements of `--require`. Everything was measured and written."""

    exit_code = 79


class CheckpointError(UserError):
    """A checkpoint or weights file that is damaged or belongs to another model."""

    exit_code = 65


def suggest(word: str, valid: Sequence[str]) -> str:
    """Return `did you mean ...?` with the valid words most like a wrong one, or the list of all valid words."""
    similar = similar_words(word, valid)
    return f"did you mean {' or '.join(similar)}?" if similar else f"known are {', '.join(valid)}."


def similar_words(word: str, valid: Sequence[str]) -> list[str]:
    """Return up to three valid words: those that a wrong one is the start of, then those most like it."""
    longer = [name for name in valid if len(word) > 2 and name.startswith(word)]
    return list(dict.fromkeys([*longer, *difflib.get_close_matches(word, valid, n=3, cutoff=0.6)]))[:3]


def unknown_name(kind: str, name: str, names: Iterable[str]) -> ConfigError:
    """Return the error for a mistyped name, with the nearest of the valid `names` (the first eight if none is near)."""
    names = list(names)
    nearest = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:8]
    return ConfigError(f"unknown {kind} {name!r}; did you mean {' or '.join(nearest)}?")


def listing(names: Sequence[str], most: int = 12) -> str:
    """Return the first `most` names, and the number of the others, in words."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
