"""The summary of what a command reads and writes: one short table, logged before the command starts and stored with its
results.

The parts of a run describe themselves: `data/describe.py` the images, `models/describe.py` models and tokenizers,
`runtime/device.py` the device. A command puts these texts into the rows of an `InputSummary` and passes it to
`Console.report_inputs`. Importing this module does not import torch.
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from mae_dat.config.terminal import printable
from mae_dat.storage.files import atomic_write
from mae_dat.storage.json_files import read_json

INPUTS_FILE = "inputs.json"
INPUTS_WIDTH = 80
"""Columns of the table."""
_INDENT, _GAP = 2, 2


@dataclasses.dataclass
class InputSummary:
    """A table of labels and texts about the inputs of a command, in the order in which they were added.

    A text may have several lines; long ones are wrapped when the table is printed. `details` are stored but not
    printed, for instance all names of classes; they must be JSON values.
    """

    command: str
    rows: dict[str, str] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, label: str, *lines: str) -> None:
        """Add a row, or lines to the row of this label; empty lines are left out.

        Characters of names that a terminal would interpret, or that cannot be encoded, are replaced.
        """
        if text := "\n".join(line for line in (self.rows.get(label, ""), *map(printable, lines)) if line):
            self.rows[label] = text

    def table(self) -> str:
        """Return the table as text, no line longer than `INPUTS_WIDTH`."""
        column = _INDENT + max(map(len, self.rows), default=0) + _GAP
        lines = [f"inputs of mae-dat {self.command}:"]
        for label, text in self.rows.items():
            wrapped = [part for line in text.split("\n") for part in _wrap(line, INPUTS_WIDTH - column)]
            heads = [" " * _INDENT + label, *[""] * (len(wrapped) - 1)]
            lines += [f"{head:<{column}}{part}".rstrip() for head, part in zip(heads, wrapped, strict=True)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `inputs.json`."""
        return {"command": self.command, "rows": dict(self.rows), "details": self.details}

    def write(self, path: Path) -> None:
        """Write the rows and details as JSON, atomically. Raises StorageError."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.as_json(), indent=1).encode() + b"\n")


class _StoredSummary(TypedDict):
    command: str
    rows: dict[str, str]
    details: dict[str, Any]


def read_inputs(path: Path) -> InputSummary:
    """Read a summary that `InputSummary.write` wrote. Raises CheckpointError for another file."""
    content = read_json(path, _StoredSummary, f"the {INPUTS_FILE} of a command")
    return InputSummary(content["command"], content["rows"], content["details"])


def _wrap(line: str, width: int) -> list[str]:
    """Break a line after commas and semicolons, so that the items of a list stay whole; elsewhere where necessary."""
    lines = [""]
    for part in re.split(r"(?<=[,;]) ", line):
        joined = f"{lines[-1]} {part}".lstrip()
        lines[-1:] = [joined] if len(joined) <= width else [*filter(None, lines[-1:]), *_wrap_words(part, width)]
    return lines


def _wrap_words(text: str, width: int) -> list[str]:
    return _PathWrapper(width, break_on_hyphens=False).wrap(text)


class _PathWrapper(textwrap.TextWrapper):
    """Breaks a path that is longer than a line after its slashes instead of in a name."""

    def _split(self, text: str) -> list[str]:
        chunks = super()._split(text)
        return [part for chunk in chunks for part in (_path_parts(chunk) if len(chunk) > self.width else [chunk])]


def _path_parts(path: str) -> list[str]:
    return re.findall(r"[^/]*/|[^/]+", path)


def list_names(names: Sequence[str], room: int = 120) -> str:
    """Return as many of the names as fit into `room` characters, with the last one: `a, b, c, ... z`."""
    every = ", ".join(names)
    if len(every) <= room or len(names) <= 2:
        return every
    shown, used = 1, len(names[0]) + len(names[-1])
    while shown < len(names) - 1 and used + len(names[shown]) + 2 <= room:
        used += len(names[shown]) + 2
        shown += 1
    return ", ".join([*names[:shown], f"... {names[-1]}"])


def count_of(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: `1 image`, `1,600 images`."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def describe_bytes(count: int) -> str:
    """Return a number of bytes in words: `640 bytes`, `1.3 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
