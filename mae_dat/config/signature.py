"""Functions that take the flags of a command as keywords: their signature and help list every flag."""

import inspect
import textwrap
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

from mae_dat.config.errors import ConfigError, suggest
from mae_dat.config.flags import REQUIRED, Flag, flags_of

Function = TypeVar("Function", bound=Callable[..., Any])
_WIDTH = 100


def takes_flags(kind: type[Any], leave_out: Collection[str] = ()) -> Callable[[Function], Function]:
    """Return a decorator for a function whose `**flags` are the flags of the configuration `kind`.

    Signature and docstring then list them with their defaults and help, so that `help`, tab completion and
    `inspect.signature` show them. Flags of the names in `leave_out`, or of the function's own parameters, are not
    listed.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        hidden = {*leave_out, *(parameter.name for parameter in own)}
        flags = [flag for flag in flags_of(kind) if flag.name not in hidden]
        parameters = [*own, *map(_parameter, flags)]
        setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - mypy
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_list_of_flags(flags)}\n"
        return function

    return decorate


def check_flag_names(kind: type[Any], names: Collection[str], leave_out: Collection[str], function: str) -> None:
    """Raise ConfigError, with a suggestion, for a name that is no flag of `kind`, or is left out."""
    known = [flag.name for flag in flags_of(kind) if flag.name not in leave_out]
    for name in names:
        if name not in known:
            raise ConfigError(f"{function} has no argument {name!r}: {suggest(name, known)}")


def _parameter(flag: Flag) -> inspect.Parameter:
    default = inspect.Parameter.empty if flag.default is REQUIRED else flag.default
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_annotation(flag))


def _annotation(flag: Flag) -> Any:
    hint: Any = Literal[flag.choices] if flag.choices else flag.kind
    if flag.count is None:
        hint = tuple[hint, ...]
    elif flag.count > 1:
        hint = tuple.__class_getitem__((hint,) * flag.count)
    return hint | None if flag.nullable else hint


def _list_of_flags(flags: Collection[Flag]) -> str:
    """Return all flags with their help, by group."""
    lines = ["Flags, which are also those of the command line:"]
    group = None
    for flag in flags:
        if flag.group != group:
            group = flag.group
            lines += ["", *textwrap.wrap(" ".join(group.split()), _WIDTH)]
        text = f"{flag.name} = {flag.default!r}" + (f": {flag.help}" if flag.help else "")
        lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)
