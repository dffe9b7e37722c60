"""Cache of measurements: one file for each pass and network, written at once, so that an interrupted evaluation
resumes where it stopped.

A file's name is the hash of everything its numbers depend on: weights, protocol, names of the images. If one of these
changes, the pass is measured again, and the old file stays. The file also records sizes, times and content of the
images: if any of them was replaced under the same name, the pass is measured again too. An update of the software does
not invalidate the cache; the versions a measurement was made with are therefore stored with it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from mae_dat.config.errors import CheckpointError
from mae_dat.data.file_facts import FileFacts, FileState, replaced
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.class_counts import ClassCounts
from mae_dat.robustness.scores.image_bits import CellImages
from mae_dat.storage.files import atomic_write
from mae_dat.storage.json_files import read_json
from mae_dat.storage.new_folders import create_folder

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Increase it when a change of the code gives other counts."""
CacheKey = Mapping[str, Any]


class CachedMeasurement(NamedTuple):
    """A measurement (anything that JSON can hold) and the package versions it was made with."""

    value: Any
    versions: dict[str, str]
    """Empty where an older release did not record them."""


class _StoredCounts(TypedDict):
    counts: dict[str, Count]
    calibration: dict[str, float | None]
    images: NotRequired[dict[str, CellImages]]
    classes: NotRequired[ClassCounts]


class _StoredMeasurement(TypedDict):
    """The content of a file. Older releases recorded neither versions nor files."""

    found: _StoredCounts
    versions: NotRequired[dict[str, str]]
    files: NotRequired[FileFacts]


class MeasurementCache:
    """Measurements in `folder`. Without a folder, or for a key of None, nothing is stored."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder:
            create_folder(folder)

    def read(self, key: CacheKey | None, files: FileState) -> CachedMeasurement | None:
        """Return the measurement of a key, None if there is none, or if one of the image `files` was replaced since.

        A damaged file is logged and ignored. Raises StorageError.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            content = read_json(path, _StoredMeasurement, "a measurement")
            measurement = CachedMeasurement(content["found"], content.get("versions", {}))
            before = content.get("files")
            if before is None:  # of an older release
                is_current = files.newest_ns <= path.stat().st_mtime_ns
            else:
                is_current = not replaced(before, files.facts(before))
        except (OSError, CheckpointError) as error:
            logger.warning("%s Measuring again.", error)
            return None
        if not is_current:
            logger.warning("images of %s were replaced since it was measured: measuring again.", path)
            return None
        if before != files.facts(before):  # the same content with other times, which need not be read again
            self.write(key, measurement, files)
        return measurement

    def has(self, key: CacheKey | None) -> bool:
        """Return whether there is a measurement of a key; its file may be damaged."""
        path = self._path(key)
        return path is not None and path.is_file()

    def write(self, key: CacheKey | None, measurement: CachedMeasurement, files: FileState) -> None:
        """Store a measurement on the image `files`. Raises StorageError."""
        path = self._path(key)
        if path:
            content = {"key": key, "found": measurement.value, "versions": measurement.versions, "files": files.facts()}
            with atomic_write(path) as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")

    def _path(self, key: CacheKey | None) -> Path | None:
        if self.folder is None or key is None:
            return None
        text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
