"""Errors that a user can mend: each names the file or value at fault and the next step, and carries a process exit
code.

Anything else that escapes is a fault of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of all errors caused by input. `exit_code` is what the entry points return to the shell or the scheduler."""

    exit_code = 64


class ConfigError(UserError):
    """A flag, a config key or a combination of them that cannot work."""

    exit_code = 64


class InputSizeError(ConfigError):
    """An input size that something which is asked for cannot work at."""


class DataError(UserError):
    """Images or labels that are there but not usable."""

    exit_code = 65


class MissingInputError(UserError):
    """A path that does not exist."""

    exit_code = 66


class DownloadError(UserError):
    """Released weights that could not be had: no network, no such file, or nothing that may be trusted."""

    exit_code = 69


class NoProgressError(UserError):
    """A job that was started again and again without a single new step."""

    exit_code = 70


class OutputError(UserError):
    """An output folder that cannot be written, or that another run holds."""

    exit_code = 73


class StorageError(UserError):
    """Reading or writing failed midway: disk full, quota, I/O error."""

    exit_code = 74


class RetryError(UserError):
    """The run stopped through no fault of its own, and what it learned is on disk: start the same command again."""

    exit_code = 75


class InterruptError(UserError):
    """A signal asked the run to stop: 130 after Ctrl-C, and 75, as for RetryError, after a scheduler's."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankError(UserError):
    """Other ranks failed; theirs is the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericsError(UserError):
    """A loss that is not finite; the weights were left as they were."""

    exit_code = 76


class CheckpointError(UserError):
    """A checkpoint or weights file that is damaged, or of another model."""

    exit_code = 65
