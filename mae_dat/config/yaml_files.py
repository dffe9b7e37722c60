"""YAML files of settings, which `--config` reads: flat `key: value` lines, each key the name of a flag."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.flags import RENAMED, Flag, WrongValueError

EARLIER_VALUES: dict[tuple[str, str], tuple[str, ...]] = {("suite", "corruptions"): ("clean", "generated")}
"""The present values of (key, value) in the config.yaml of earlier runs."""


@dataclasses.dataclass(frozen=True)
class FileSetting:
    """A value in a YAML file."""

    value: Any
    place: str
    """File and line, for messages."""


def read_settings(path: Path, flags: Sequence[Flag]) -> dict[str, FileSetting]:
    """Return the settings of a YAML file by their keys, converted and checked.

    Raises ConfigError, with file and line, for a file that is no YAML, an unknown key, a key that is given twice, or a
    wrong value.
    """
    import yaml  # takes a moment, which commands without a file should not

    try:
        text_of_file = path.read_text()
        # A file of a few hundred bytes can mean gigabytes by repeated aliases, and no flag needs them.
        if alias := next((token for token in yaml.scan(text_of_file) if isinstance(token, yaml.AliasToken)), None):
            line = alias.start_mark.line + 1
            raise ConfigError(
                f"{path}, line {line}: aliases (*{alias.value}) are not supported: write the value itself."
            )
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid_yaml(path, error) from error
    loader = yaml.SafeLoader(text_of_file)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: the file must contain `key: value` lines.")
        flag_by_name = {flag.name: flag for flag in flags}
        settings: dict[str, FileSetting] = {}
        for key_node, value_node in node.value:
            key, place = (
                RENAMED.get(str(key_node.value), str(key_node.value)),
                f"{path}, line {key_node.start_mark.line + 1}",
            )
            if key not in flag_by_name:
                raise ConfigError(f"{place}: unknown key {key!r}: {suggest(key, list(flag_by_name))}")
            if key in settings:
                raise ConfigError(f"{place}: {key} is given again; the first is in {settings[key].place}: remove one.")
            text = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            value = loader.construct_object(value_node, deep=True)
            settings[key] = FileSetting(_convert(flag_by_name[key], _present(key, value), text, place), place)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # such as a date that does not exist
        raise _invalid_yaml(path, error) from error
    finally:
        loader.dispose()
    return settings


def _invalid_yaml(path: Path, error: Exception) -> ConfigError:
    """Return the error for a file that is no YAML, on one line, with its line if the parser knows it."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return ConfigError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {problem}.")
    return ConfigError(f"{path} is not valid YAML: {error}")


def _present(key: str, value: Any) -> Any:
    """Return a value with the names that earlier runs wrote replaced by the present ones."""
    if not isinstance(value, str | list):
        return value
    items = [value] if isinstance(value, str) else value
    renamed = [EARLIER_VALUES.get((key, item), (item,)) if isinstance(item, str) else (item,) for item in items]
    if all(len(names) == 1 for names in renamed):
        return value
    return list(dict.fromkeys(name for names in renamed for name in names))


def _convert(flag: Flag, value: Any, text: str | None, place: str) -> Any:
    try:
        return flag.convert(value)
    except WrongValueError as error:
        raise ConfigError(f"{place}: {flag.name} must be {error}, got {value if text is None else text}.") from error


def settings_text(settings: Mapping[str, Any], header: str) -> str:
    """Return settings as the text of a YAML file that `--config` reads, below a comment of one line."""
    import yaml

    values = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return f"# {header}\n" + yaml.safe_dump(values, sort_keys=False)
