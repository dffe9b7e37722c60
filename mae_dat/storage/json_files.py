"""Read JSON files, of which nothing is trusted before it is checked: size, types and keys.

The expected content is a type: a `TypedDict` for an object with known keys (others are ignored), or a list, dict,
number, text, Literal or union of these. Everything is checked before anything is built from it.
"""

import functools
import json
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import (
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mae_dat.config.errors import CheckpointError, UserError
from mae_dat.config.terminal import printable

MAX_JSON_BYTES = 1 << 28
"""The largest file that is read, unless a caller allows more."""
_MAX_WHOLE = 1 << 63
_SHOWN = 60  # characters of a value in a message
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "an object of keys and values",
}


class ShapeError(ValueError):
    """JSON of another type than expected; the message names the key."""


def read_json(
    path: Path, expected: Any, what: str, error: type[UserError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Read a JSON file and check that it has the type `expected`. NaN and infinite numbers become None.

    `what` is the kind of file, for messages. Raises `error`, with file and key, for everything else: a file that cannot
    be read, is larger than `max_bytes`, is not JSON, or has a missing key or a value of another type.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ShapeError(f"it has {size:,} bytes, more than the {max_bytes:,} allowed")
        content = parse_json(path.read_bytes())
        check_shape(content, expected)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}.") from fault
    except ValueError as fault:
        raise error(f"{path} is not {what}: {fault}.") from fault
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text; NaN and infinite numbers become None. Raises ShapeError."""
    try:
        return json.loads(text, parse_constant=lambda constant: None)
    except RecursionError as error:
        raise ShapeError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ShapeError("it is not text in UTF-8") from error
    except ValueError as error:
        raise ShapeError(f"it is not JSON ({error})") from error


def check_shape(value: Any, expected: Any, key: str = "") -> None:
    """Check that a value from JSON has the type `expected`. Raises ShapeError with its `key`, like `images[3].id`."""
    origin, options = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if origin in (NotRequired, Required):
        check_shape(value, options[0], key)
    elif origin in (Union, types.UnionType):
        _check_union(value, options, expected, key)
    elif origin is Literal:
        if value not in options:
            raise _wrong(value, expected, key)
    elif is_typeddict(expected):
        _check_object(value, expected, key)
    elif origin is list:
        _require(isinstance(value, list), value, list, key)
        for number, item in enumerate(value):
            check_shape(item, options[0], f"{key}[{number}]")
    elif origin is dict:
        _require(isinstance(value, dict), value, dict, key)
        for name, item in value.items():
            check_shape(item, options[1], _inner(key, name))
    else:
        _require(_is_plain(value, expected), value, expected, key)


def _check_union(value: Any, options: Iterable[Any], expected: Any, key: str) -> None:
    faults = []
    for option in options:
        try:
            return check_shape(value, option, key)
        except ShapeError as fault:
            faults.append(str(fault))  # not the exception: its traceback would keep the callers' objects
    # The fault inside of an object or a list tells more than that none of the types fits.
    deeper = [fault for fault in faults if not fault.startswith(f"{_name(key)} must be")]
    raise ShapeError(deeper[0]) if deeper else _wrong(value, expected, key)


def _check_object(value: Any, expected: Any, key: str) -> None:
    _require(isinstance(value, dict), value, dict, key)
    for name, hint in _hints(expected).items():
        if name in value:
            check_shape(value[name], hint, _inner(key, name))
        elif name in expected.__required_keys__:
            raise ShapeError(f"{_inner(key, name)} is missing")


@functools.cache
def _hints(expected: Any) -> dict[str, Any]:
    return get_type_hints(expected, include_extras=True)


def _is_plain(value: Any, expected: Any) -> bool:
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_bounded(value)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool) and _is_bounded(value)
    return isinstance(value, type(None) if expected is None else expected)


def _is_bounded(value: int | float) -> bool:
    whole: Any = value
    return -_MAX_WHOLE <= whole < _MAX_WHOLE if isinstance(whole, int) else math.isfinite(whole)


def _require(is_valid: bool, value: Any, expected: Any, key: str) -> None:
    if not is_valid:
        raise _wrong(value, expected, key)


def _wrong(value: Any, expected: Any, key: str) -> ShapeError:
    shown = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
    return ShapeError(f"{_name(key)} must be {_describe(expected)}, not {printable(shown)[:_SHOWN]}")


def _describe(expected: Any) -> str:
    origin, options = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, options)))
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    return _WORDS[dict if is_typeddict(expected) else origin or expected]


def _inner(key: str, name: str) -> str:
    return printable(f"{key}.{name}" if key else name)[-2 * _SHOWN :]


def _name(key: str) -> str:
    return key or "its content"
