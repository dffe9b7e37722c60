"""From flags and YAML files to the configuration of a command, and back to a command and a file."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from mae_dat.config.effects import flags_without_effect, reject_flags_without_effect
from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.flags import (
    REQUIRED,
    Config,
    WrongValueError,
    build_config,
    default_config,
    expand_home,
    flags_of,
    flat_values,
)
from mae_dat.config.recipes import find_recipe
from mae_dat.config.yaml_files import FileSetting, read_settings, settings_text


class CommandConfig:
    """Base class of the configurations of all commands: made from flags or a file, written as a file or a command.

    A subclass is a dataclass. It may define `defaults(values)`, which returns the configuration with the defaults if
    the flags `values` are given.
    """

    verb: ClassVar[str]
    """The verb of `mae-dat` that has this configuration."""

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Build the configuration from flags by their names, such as `epochs=3` or `dat="released"`.

        Values are checked as on the command line. Lists, tuples, paths, None and booleans are accepted: `dat=True` is
        `--dat`, `pin_mem=False` is `--no_pin_mem`. Raises ConfigError for an unknown flag, with a suggestion, and for a
        wrong value.
        """
        return resolve_config(cls, convert_flags(cls, flags))

    @classmethod
    def from_yaml(cls, file: str | Path, **flags: Any) -> Self:
        """Build the configuration from a YAML file, or the name of a recipe; `flags` take precedence.

        A run's config.yaml is such a file. Raises ConfigError, with file and line, and MissingInputError.
        """
        return resolve_config(cls, convert_flags(cls, flags), expand_home(file))

    def to_yaml(self, file: str | Path) -> None:
        """Write all settings to a YAML file that `from_yaml` and `--config` read."""
        Path(expand_home(file)).write_text(settings_text(flat_values(self), self.command()))

    def command(self) -> str:
        """Return the command that does the same, `mae-dat VERB ...`, with the flags that differ from the defaults.

        Flags that have no effect, which a recipe may contain, are left out.
        """
        values = flat_values(self)
        flags = flags_of(type(self), default_config(type(self), values))
        changed = {flag.name for flag in flags if flag.default is REQUIRED or values[flag.name] != flag.default}
        # Without a flag that is left out, others may have no effect.
        default = {flag.name: flag.default for flag in flags}
        while useless := flags_without_effect(
            self.verb,
            {name: value if name in changed else default[name] for name, value in values.items()},
            {name: values[name] for name in changed},
        ):
            changed -= useless.keys()
        changed |= _flags_that_choose_defaults(type(self), values, changed)
        arguments = [flag for flag in flags if flag.positional]
        while arguments and arguments[-1].name not in changed:
            arguments.pop()
        named = [flag for flag in flags if flag.name in changed and not flag.positional]
        words = [word for flag in [*arguments, *named] for word in flag.words(values[flag.name])]
        return shlex.join(["mae-dat", *self.verb.split(), *words])


def _flags_that_choose_defaults(kind: type[Any], values: Mapping[str, Any], changed: set[str]) -> set[str]:
    """Return the flag, if any, without which the other flags would have other defaults, such as `linear_probe`."""
    defaults = default_config(kind, values)
    if defaults == default_config(kind, {name: values[name] for name in changed}):
        return set()
    return {name for name in values.keys() - changed if default_config(kind, {name: values[name]}) == defaults}


def convert_flags(kind: type[Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert values given in Python, by the names of their flags. Raises ConfigError."""
    flag_by_name = {flag.name: flag for flag in flags_of(kind)}
    values = {}
    for name, value in flags.items():
        if name not in flag_by_name:
            raise ConfigError(f"{kind.__name__} has no setting {name!r}: {suggest(name, list(flag_by_name))}")
        try:
            values[name] = flag_by_name[name].convert(value)
        except WrongValueError as error:
            raise ConfigError(f"{name} must be {error}, got {value!r}.") from error
    return values


def resolve_config(
    kind: type[Config], given: Mapping[str, Any], file: str | None = None, check_effects: bool = False
) -> Config:
    """Build a configuration from given values, then the settings of a file or recipe, then the defaults.

    Raises ConfigError, MissingInputError for a missing file; with `check_effects` UsageError for given values that have
    no effect.
    """
    settings = read_settings(find_recipe(file), flags_of(kind)) if file else {}
    values = {**{name: setting.value for name, setting in settings.items()}, **given}
    missing = [
        flag.positional or f"--{flag.name}"
        for flag in flags_of(kind)
        if flag.default is REQUIRED and flag.name not in values
    ]
    if missing:
        raise ConfigError(f"no {' and no '.join(missing)} given.")
    if check_effects:
        defaults = {flag.name: flag.default for flag in flags_of(kind, default_config(kind, values))}
        reject_flags_without_effect(getattr(kind, "verb", ""), defaults | values, given)
    try:
        return build_config(kind, values)
    except ConfigError as error:
        if place := _place_of_error(str(error), settings, given):
            raise ConfigError(f"{place}: {error}") from error
        raise


def _place_of_error(message: str, settings: Mapping[str, FileSetting], given: Mapping[str, Any]) -> str | None:
    """Return where the file sets the flag with which a message starts, None if the file does not."""
    match = re.match(r"--(\w+) ", message)
    return settings[match[1]].place if match and match[1] in settings and match[1] not in given else None
