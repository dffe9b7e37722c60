"""The flags of a configuration, read from its dataclasses: name, type, default and help of each.

A configuration is a dataclass whose fields are flags, or groups of flags (dataclasses too). The docstring of a field is
the help of its flag. The metadata of a field may contain:

    flag         the name of the flag, if it differs from that of the field
    bare         the value of the flag when it is given without one, as in `--dat`
    positional   the title of an argument that is given without a flag, as in `mae-dat scan DIR`

Words of a command line, values of YAML files and arguments in Python are checked by the same rules (`Flag.convert`).
Importing this module does not import torch.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import numbers
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
REQUIRED = dataclasses.MISSING
"""The default of a flag that must be given."""
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


class WrongValueError(ValueError):
    """A value of the wrong type, or one that is not among the choices of its flag."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command, which is also a key of YAML files and an argument in Python."""

    name: str
    default: Any
    kind: type
    """Type of a value: bool, int, float or str."""
    choices: tuple[str, ...] = ()
    """The values that are allowed; empty for any. One that ends with `:DIR` allows any folder after the colon."""
    count: int | None = 1
    """Number of values: 1, or the length of a tuple; None for a tuple of any length."""
    nullable: bool = False
    """Whether None is a value."""
    help: str = ""
    bare: str | None = None
    positional: str | None = None
    group: str = ""
    """Docstring of the group, empty for a flag without one."""

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value: `--name` and `--no_name`."""
        return self.kind is bool

    @property
    def expected(self) -> str:
        """What its values are, as in "must be a whole number"."""
        if self.choices:
            text = f"one of {', '.join(self.choices)}" if self.count == 1 else f"among {', '.join(self.choices)}"
        elif self.count == 1:
            text = _NAMES[self.kind]
        else:
            text = f"{self.count or ''} {_PLURALS[self.kind]}".strip()
        return f"{text}, or None" if self.nullable else text

    def convert(self, value: Any) -> Any:
        """Return a value in the type of the flag: text, a number, None, a path, or a list of them.

        Text is converted, so that words of a command line and YAML's `1e-4`, which is text there, become numbers.
        Raises WrongValueError, which names what the flag expects.
        """
        if self.nullable and (value is None or value in ("None", ["None"])):
            return None
        if self.bare is not None and value is True:
            return self.bare
        if self.count == 1:
            return self._convert_one(value)
        values = list(value) if isinstance(value, list | tuple | set | range) else [value]
        if self.count not in (None, len(values)):
            raise WrongValueError(self.expected)
        return tuple(map(self._convert_one, values))

    def _convert_one(self, value: Any) -> Any:
        if self.kind is bool or isinstance(value, bool):
            if self.kind is bool and isinstance(value, bool):
                return value
            raise WrongValueError(self.expected)
        try:
            converted = _CONVERT[self.kind](value)
        except (TypeError, ValueError) as error:
            raise WrongValueError(self.expected) from error
        if self.choices and converted not in self.choices and not self._names_folder(str(converted)):
            raise WrongValueError(self.expected)
        return converted

    def _names_folder(self, value: str) -> bool:
        prefixes = [choice.removesuffix("DIR") for choice in self.choices if choice.endswith(":DIR")]
        return any(value.startswith(prefix) and value != prefix for prefix in prefixes)

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that set the flag to a value."""
        if self.is_switch:
            return [f"--{self.name}" if value else f"--no_{self.name}"]
        words = [str(item) for item in (value if isinstance(value, tuple) else (value,))]
        if self.positional:
            return words
        if len(words) == 1 and words[0].startswith("-"):
            return [f"--{self.name}={words[0]}"]
        return [f"--{self.name}", *words]


def _to_int(value: Any) -> int:
    if isinstance(value, str | numbers.Integral):
        return int(value)
    raise TypeError


def _to_float(value: Any) -> float:
    if isinstance(value, str | numbers.Real):
        return float(value)
    raise TypeError


def _to_text(value: Any) -> str:
    if isinstance(value, str | os.PathLike | numbers.Real):
        return expand_home(value if isinstance(value, os.PathLike) else str(value))
    raise TypeError


def expand_home(path: str | os.PathLike[str]) -> str:
    """Return a path with `~` replaced by the home folder: a shell does so neither in YAML, nor after `--flag=`, nor in
    Python."""
    text = os.fspath(path)
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


_CONVERT = {int: _to_int, float: _to_float, str: _to_text}


# ---- from dataclasses to flags ----


def flags_of(kind: type[Any], default: Any = None) -> list[Flag]:
    """Return all flags of a configuration in the order of its fields.

    `default` is a configuration whose values are the defaults in place of those of the class.
    """
    return list(_flags(kind, default, ""))


def _flags(kind: type[Any], default: Any, group: str) -> Iterator[Flag]:
    hints, docstrings = get_type_hints(kind), field_docstrings(kind)
    for field in dataclasses.fields(kind):
        value, hint = _default_of(field, default), hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _flags(hint, value, inspect.cleandoc(hint.__doc__ or ""))
            continue
        yield Flag(
            flag_name(field),
            value,
            **_type_facts(hint),
            help=docstrings.get(field.name, ""),
            bare=field.metadata.get("bare"),
            positional=field.metadata.get("positional"),
            group=group,
        )


def flag_name(field: "dataclasses.Field[Any]") -> str:
    """Return the name of the flag of a field."""
    return str(field.metadata.get("flag", field.name))


def _default_of(field: "dataclasses.Field[Any]", default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _type_facts(hint: Any) -> dict[str, Any]:
    """Return kind, choices, count and nullable of a type: bool, int, float, str, a Literal of texts, a tuple of one of
    these, or one of these or None."""
    nullable = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if nullable:
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    count: int | None = 1
    if get_origin(hint) is tuple:
        item, *others = get_args(hint)
        count = None if others == [...] else 1 + len(others)
        hint = item
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    if kind not in _NAMES:
        raise TypeError(f"a flag cannot have the type {hint}")
    return {"kind": kind, "choices": choices, "count": count, "nullable": nullable}


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, those that it inherits too, each on one line."""
    docstrings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        docstrings |= _docstrings_of_module(base.__module__).get(base.__name__, {})
    return docstrings


@functools.cache
def _docstrings_of_module(name: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of fields by class and field, read from the source; empty without a source."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "builtins" or not file:
        return {}
    docstrings: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.ClassDef):
            docstrings[node.name] = dict(_documented_fields(node.body))
    return docstrings


def _documented_fields(statements: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, docstring in itertools.pairwise(statements):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(docstring, ast.Expr)
            and isinstance(docstring.value, ast.Constant)
            and isinstance(docstring.value.value, str)
        ):
            yield field.target.id, " ".join(docstring.value.value.split())


RENAMED = {"dat_warmup": "adversary_ramp", "pictures_every": "images_every"}
"""Flags that were renamed: config.yaml and checkpoints of older runs have the old names."""

# ---- from values to configurations, and back ----


def default_config(kind: type[Config], values: Mapping[str, Any]) -> Config | None:
    """Return the configuration whose values are the defaults when `values` are given, None for those of the class.

    A class may define `defaults(values)` for flags that change the defaults of others, as --linear_probe does.
    """
    choose = getattr(kind, "defaults", None)
    return None if choose is None else choose(values)


def build_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from converted values by the names of their flags; the others have their defaults.

    Every flag without a default must have a value. Raises ConfigError for values that a group rejects.
    """
    return _build(kind, values, default_config(kind, values))


def _build(kind: type[Any], values: Mapping[str, Any], default: Any) -> Any:
    hints = get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(group := hints[field.name]):
            arguments[field.name] = _build(group, values, _default_of(field, default))  # type: ignore[arg-type]
        else:
            name = flag_name(field)
            arguments[field.name] = values[name] if name in values else _default_of(field, default)
    return kind(**arguments)


def flat_values(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration by the names of their flags, in the order of the groups."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values.update(flat_values(value) if dataclasses.is_dataclass(value) else {flag_name(field): value})
    return values
