"""Folders that the flags of a command name, checked before anything slow is imported."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_dat.config.errors import MissingInputError
from mae_dat.config.groups import DATA_VARIABLE, DEMO

_RANK_VARIABLES = ("RANK", "SLURM_PROCID")


def require_folder(root: str | os.PathLike[str]) -> None:
    """Raise MissingInputError, with a guess at what was meant, unless `root` is a folder."""
    path = Path(root)
    if path.is_dir():
        return
    if path.exists():
        raise MissingInputError(f"{root} is a file, not a folder; name the folder that holds the images")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, siblings)
    hint = f"did you mean {' or '.join(str(path.parent / name) for name in similar)}?" if similar else "check the path"
    raise MissingInputError(f"{root} does not exist; {hint}")


def check_data_path(flags: Mapping[str, Any]) -> None:
    """Raise MissingInputError if `data_path`, of the flags by name, is not a folder.

    Addresses of shards are not checked. Nothing is checked if this process is one of several ranks: an error must then
    reach all of them.
    """
    if "data_path" not in flags or any(name in os.environ for name in _RANK_VARIABLES):
        return
    value = flags["data_path"] or os.environ.get(DATA_VARIABLE)
    for root in value if isinstance(value, tuple) else (value,):
        if root and root != DEMO and "://" not in root:
            require_folder(root)
