"""What was measured already: a file for each portion and network, written at once, so that an interrupted evaluation
goes on where it stopped.

A file's name is the hash of all that its numbers depend on: weights, protocol, pictures. What changes is measured anew,
and what was measured before stays; also after an update, so that the versions stand in the file.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mae_dat.storage.files import atomic_write

logger = logging.getLogger(__name__)

VERSION = 1
"""Of how cells are measured: raise it where a change would give other counts."""


class Kept(NamedTuple):
    """What was found, and under which versions of what measures; none where an older release did not write them."""

    found: Any
    versions: dict[str, str]


class MeasurementCache:
    """Results below `folder`; without a folder, or for a key of None, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: Mapping[str, Any] | None) -> Kept | None:
        """What is stored under a key; None if nothing is. A damaged file is named in the log and measured anew."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(), parse_constant=lambda infinity: None)  # of older releases
            return Kept(content["found"], content.get("versions", {}))
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s): measured anew.", path, error)
            return None

    def write(self, key: Mapping[str, Any] | None, kept: Kept) -> None:
        """Stores what was found. Raises StorageError."""
        path = self._path(key)
        if path:
            with atomic_write(path) as file:
                file.write(json.dumps({"key": key, **kept._asdict()}, indent=1).encode() + b"\n")

    def _path(self, key: Mapping[str, Any] | None) -> Path | None:
        if self.folder is None or key is None:
            return None
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
