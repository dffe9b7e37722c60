"""Check the facts that a weights file records about its model, before anything is built from them.

The file may come from anyone. Each fact has a type and bounds far above those of real models; a wrong one raises an
error that names file and key. Places that timm would read from (hf-hub:, local-dir:) are no names of models.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mae_dat.config.errors import CheckpointError

_MAX_SIDE, _MAX_CHANNELS, _MAX_CLASSES, _MAX_NAME = 8192, 1024, 100_000, 1000
_NAME = re.compile(r"[\w\-]{1,100}(\.[\w\-]{1,100})*")


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_sides(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) in (1, 2) and all(_is_whole(side, _MAX_SIDE) for side in value)
    )


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= _MAX_CLASSES
        and all(isinstance(name, str) and len(name) <= _MAX_NAME for name in value)
    )


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= _MAX_CHANNELS
        and all(_is_number(number) and number > above for number in value)
    )


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: isinstance(value, str) and len(value) < 100, "a short text"),
    "model": (lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value)), "the name of an architecture"),
    "classes": (_are_names, f"a list of 1 to {_MAX_CLASSES:,} names of at most {_MAX_NAME:,} characters"),
    "input_size": (_are_sides, f"one or two sides from 1 to {_MAX_SIDE:,} pixels"),
    "in_chans": (lambda value: _is_whole(value, _MAX_CHANNELS), f"a number of channels from 1 to {_MAX_CHANNELS:,}"),
    "global_pool": (lambda value: isinstance(value, bool), "true or false"),
    "mean": (_are_numbers, "a list of numbers, one for each channel"),
    "std": (lambda value: _are_numbers(value, above=0), "a list of numbers above 0, one for each channel"),
    "crop_pct": (lambda value: _is_number(value) and 0 < value <= 1, "a share of the side above 0 and at most 1"),
    "interpolation": (
        lambda value: value in ("bicubic", "bilinear", "nearest", "lanczos", "random"),
        "bicubic, bilinear, nearest, lanczos or random",
    ),
    "width": (lambda value: _is_whole(value, 8192), "a number of channels from 1 to 8,192"),
    "anchor_size": (lambda value: _is_number(value) and 0 < value <= _MAX_SIDE, "a side in pixels above 0"),
    "regions": (lambda value: _is_whole(value, 100_000), "a number from 1 to 100,000"),
}
_DETECTOR_FACTS = ("model", "classes", "input_size", "width", "anchor_size", "regions")


def check_facts(facts: Any, source: str) -> dict[str, Any]:
    """Return the facts recorded in the file `source`. Raises CheckpointError with file and key for a wrong one."""
    if not isinstance(facts, Mapping):
        raise CheckpointError(f"{source}: its description is damaged (a {type(facts).__name__}, not keys and values).")
    for key, (is_valid, expected) in _RULES.items():
        if facts.get(key) is not None and not is_valid(facts[key]):
            raise CheckpointError(f"{source}: {key} in its description must be {expected}, not {_shown(facts[key])}.")
    if facts.get("kind") == "detector" and (missing := [key for key in _DETECTOR_FACTS if facts.get(key) is None]):
        raise CheckpointError(f"{source}: the description of the detector lacks {', '.join(missing)}.")
    return dict(facts)


def _shown(value: Any) -> str:
    """Return a value for a message, short and without control characters."""
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"a list of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
