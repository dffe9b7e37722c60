"""The command `mae-dat corrupt`: write corrupted copies of a folder of images, as single files or shards.

A unit of work is an image with all of its copies, or a shard. A journal in OUT gets a line for each unit once its
files are complete, so that a killed run continues with the units that are missing. At the end the journal becomes
`manifest.jsonl`, which `mae-dat scan OUT --verify` reads too.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mae_dat.config.commands.corrupt import CorruptConfig
from mae_dat.config.errors import ConfigError, DataError, OutputError, StorageError, listing, suggest
from mae_dat.config.extras import require_extra
from mae_dat.config.groups import image_size
from mae_dat.config.paths import require_folder
from mae_dat.config.terminal import print_text
from mae_dat.data.describe import add_images
from mae_dat.data.folders import SPLIT_NAMES, class_folders, split_folders
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import map_in_workers, worker_count
from mae_dat.data.open import open_images
from mae_dat.data.shards.index import INDEX_FILE, build_index
from mae_dat.data.shards.reader import Shards
from mae_dat.data.transforms import EvalTransform
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, MIN_SIDE, REVISION, SOURCE, corrupt_image, image_seed
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_workers
from mae_dat.runtime.environment import dependency_versions, installed_version, toolkit_version
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of, storage_error

logger = logging.getLogger(__name__)

SETTINGS_FILE, MANIFEST_FILE = "corrupt.settings.json", "manifest.jsonl"
_JOURNAL = ".corrupt.journal.jsonl"
_UNCHECKED = ("corruptions", "severities", "output_dir", "num_workers", "source")
"""Flags that may differ when a folder of copies is completed: none of them changes a copy."""


def main(config: CorruptConfig) -> None:
    """Run the command."""
    count = corrupt_folder(config, console_for_command())
    print_text(f"{config.output_dir}: {count_of(count, 'corrupted image')}")
    print_text(f"Next:\n  mae-dat evaluate --checkpoint MODEL --shifts {shlex.quote(config.output_dir)}")


def corrupt_folder(config: CorruptConfig, console: Console) -> int:
    """Write the copies that are missing, then the manifest; return the number of copies in the folder.

    Raises ConfigError, DataError, MissingInputError, OutputError, StorageError.
    """
    names = chosen_corruptions(config.corruptions)
    images = open_source(config)
    out = prepare_output_folder(Path(config.output_dir))
    writer = CopyWriter(config, images, out)
    console.report_inputs(_describe(config, images, names), out / INPUTS_FILE)
    writer.check_settings()
    cells = [(name, severity) for name in names for severity in sorted(set(config.severities))]
    (writer.write_shards if config.shards else writer.write_files)(cells, console)
    return writer.write_manifest()


def chosen_corruptions(requested: Sequence[str]) -> list[str]:
    """Return the names of the requested corruptions, in the order of ImageNet-C. Raises ConfigError."""
    groups = {"all": CORRUPTIONS, "extra": EXTRA}
    for name in requested:
        if name not in (*groups, *CORRUPTIONS, *EXTRA):
            raise ConfigError(f"--corruptions {name}: {suggest(name, [*groups, *CORRUPTIONS, *EXTRA])}")
    chosen = {member for name in requested for member in groups.get(name, (name,))}
    return [name for name in CORRUPTIONS + EXTRA if name in chosen]


def open_source(config: CorruptConfig) -> ImageSet:
    """Open the images to copy. Raises DataError, MissingInputError."""
    source, out = Path(config.source), Path(config.output_dir)
    require_folder(source)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise OutputError(f"--output_dir {out} is inside of {source}: choose a folder outside of it.")
    is_packed = (source / INDEX_FILE).is_file()
    splits = [name for names in SPLIT_NAMES.values() for name in split_folders(source, names)]
    if splits and not is_packed:
        raise DataError(f"{source} has the folders {listing(splits)}: name one of them, such as {source / splits[-1]}.")
    labeled = is_packed or bool(class_folders(str(source))[0])
    return open_images(source, lambda image: torch.zeros(0), labeled=labeled)


@dataclasses.dataclass(frozen=True)
class _Copies:
    """One image with its copies: what a worker computes."""

    source_sha256: str
    files: dict[str, bytes]
    """By path below OUT."""
    size: tuple[int, int]
    """Width and height of the copies."""


class CopyWriter:
    """Writes the copies of `images` below `out`, and the journal of those that are complete."""

    def __init__(self, config: CorruptConfig, images: ImageSet, out: Path) -> None:
        self.config, self.images, self.out = config, images, out
        self.transform = _resizing(config)
        self.suffix = ".png" if config.png else ".jpg"
        self.names = relative_names(images, self.suffix)
        self.settings = self._settings()

    # ---- settings ----

    def _settings(self) -> dict[str, Any]:
        """Return everything that a copy depends on."""
        values = dataclasses.asdict(self.config)
        flags = {name: value for name, value in values.items() if name not in _UNCHECKED}
        packages = {name: installed_version(name) for name in ("opencv-python-headless", "scipy")}
        return json.loads(
            json.dumps(
                {
                    "source": "mae-dat corrupt",
                    "note": SOURCE,
                    "revision of the corruptions": REVISION,
                    "flags": flags,
                    "images": len(self.images),
                    "fingerprint": self.images.fingerprint(),
                    "classes": self.images.classes,
                    "versions": {**toolkit_version(), **dependency_versions(), **packages},
                }
            )
        )

    def check_settings(self) -> None:
        """Write the settings of a new folder. Raises OutputError if its copies were made in another way."""
        path = self.out / SETTINGS_FILE
        if not path.exists():
            others = [entry.name for entry in self.out.iterdir() if entry.name not in (INPUTS_FILE, _JOURNAL)]
            if others:
                raise OutputError(f"{self.out} contains {listing(sorted(others), 3)}: choose a new --output_dir.")
            with atomic_write(path) as file:
                file.write(json.dumps(self.settings, indent=1).encode() + b"\n")
            return
        stored = _read_json(path)
        for key in ("flags", "revision of the corruptions", "images", "fingerprint"):
            if stored.get(key) != self.settings[key]:
                raise OutputError(
                    f"{self.out} contains copies made in another way ({_difference(key, stored, self.settings)}): "
                    "choose a new --output_dir, or give the same flags and images."
                )
        if stored.get("versions") != self.settings["versions"]:
            logger.warning(
                "%s was started with other versions; copies may differ by a gray level. They are in %s.", self.out, path
            )

    # ---- work ----

    def copies_of(self, index: int, cells: Sequence[tuple[str, int]]) -> _Copies:
        """Return the files of an image's copies. Raises DataError for one that cannot be corrupted."""
        import cv2

        cv2.setNumThreads(0)  # one process for each core is faster than threads in each
        image = self.images.load_image(index)
        if self.transform is not None:
            image = self.transform.resize_and_crop(image)
        pixels = np.array(image)
        if min(image.size) < MIN_SIDE:
            raise DataError(
                f"{self.images.name_of(index)}: {image.width} x {image.height} px, and corruptions need {MIN_SIDE} px "
                "a side: leave it out, or enlarge all images with --input_size."
            )
        files = {}
        for name, severity in cells:
            corrupted = corrupt_image(pixels, name, severity, image_seed(self.config.seed, index, name, severity))
            files[f"{name}/{severity}/{self.names[index]}"] = self._encode(corrupted)
        return _Copies(hashlib.sha256(pixels.tobytes()).hexdigest(), files, image.size)

    def _encode(self, pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        if self.config.png:
            Image.fromarray(pixels).save(file, "PNG")
        else:
            Image.fromarray(pixels).save(file, "JPEG", quality=self.config.quality)
        return file.getvalue()

    def _write_copies(self, task: tuple[int, list[tuple[str, int]]]) -> list[dict[str, Any]]:
        """Write the copies of an image in a worker; return the lines of the journal."""
        index, cells = task
        copies = self.copies_of(index, cells)
        lines = []
        for path, content in copies.files.items():
            _write_file(self.out / path, content)
            width, height = copies.size
            lines.append(
                {
                    "path": path,
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "width": width,
                    "height": height,
                    "image": index,
                    "pixels": copies.source_sha256,
                }
            )
        return lines

    def write_files(self, cells: Sequence[tuple[str, int]], console: Console) -> None:
        """Write the copies that the journal lacks as single files. Raises DataError, StorageError."""
        done = {entry["path"] for entry in self._journal() if "image" in entry}
        tasks = []
        for index, name in enumerate(self.names):
            missing = [cell for cell in cells if f"{cell[0]}/{cell[1]}/{name}" not in done]
            tasks += [(index, missing)] if missing else []
        every = len(self.names) * len(cells)
        completed = every - sum(len(missing) for _, missing in tasks)
        if completed:
            logger.info("%s of %s copies were made before", f"{completed:,}", f"{every:,}")
        results = map_in_workers(self._write_copies, tasks, self.config.num_workers)
        with console.task("corrupt", every, "copy", completed) as task, self._open_journal() as journal:
            for lines in results:
                if isinstance(lines, DataError):
                    raise lines
                journal.write("".join(json.dumps(line) + "\n" for line in lines))
                journal.flush()
                task.advance(count=len(lines))

    def write_shards(self, cells: Sequence[tuple[str, int]], console: Console) -> None:
        """Write the shards that the journal lacks, and the index of each cell. Raises DataError, StorageError."""
        require_extra("shards", "mae-dat corrupt --shards")
        done = {(entry["cell"], entry["first"]): entry for entry in self._journal() if "cell" in entry}
        with console.task("corrupt", len(self.images) * len(cells), "copy") as task, self._open_journal() as journal:
            for name, severity in cells:
                cell, first, number = f"{name}/{severity}", 0, 0
                while first < len(self.images):
                    entry = done.get((cell, first))
                    if entry is None:
                        entry = self._write_shard((name, severity), first, number)
                        journal.write(json.dumps(entry) + "\n")
                        journal.flush()
                    task.advance(entry["path"], count=entry["next"] - first)
                    first, number = entry["next"], number + 1
                folder = self.out / cell
                if not (folder / INDEX_FILE).is_file():
                    build_index(folder, self.images.classes or None).write(folder)

    def _write_shard(self, cell: tuple[str, int], first: int, number: int) -> dict[str, Any]:
        """Write the shard that begins with image `first`; return its line of the journal."""
        from webdataset import TarWriter

        folder = self.out / cell[0] / str(cell[1])
        folder.mkdir(parents=True, exist_ok=True)
        path, size, index = folder / f"{cell[0]}-{cell[1]}-{number:05d}.tar", 0, first
        copies = map_in_workers(
            lambda index: self.copies_of(index, [cell]), range(first, len(self.images)), self.config.num_workers
        )
        with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for copy in copies:
                if isinstance(copy, DataError):
                    raise copy
                (content,) = copy.files.values()
                label = self.images.label(index)
                class_number = {"cls": str(label).encode()} if label >= 0 else {}
                size += tar.write({"__key__": f"{index:08d}", self.suffix[1:]: content, **class_number})
                index += 1
                if size >= self.config.shard_mb * 1e6:
                    break
        relative = str(path.relative_to(self.out))
        facts = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        return {"path": relative, **facts, "cell": f"{cell[0]}/{cell[1]}", "first": first, "next": index}

    # ---- journal and manifest ----

    def _open_journal(self) -> Any:
        try:
            return (self.out / _JOURNAL).open("a")
        except OSError as error:
            raise storage_error(self.out / _JOURNAL, error) from error

    def _journal(self) -> list[dict[str, Any]]:
        """Return the entries of the journal, or of the manifest of a finished run, whose files are still complete."""
        entries: dict[str, dict[str, Any]] = {}
        for name in (MANIFEST_FILE, _JOURNAL):
            for entry in _read_lines(self.out / name):
                entries[entry["path"]] = entry
        return [entry for entry in entries.values() if _has_size(self.out / entry["path"], entry["bytes"])]

    def write_manifest(self) -> int:
        """Write the manifest of all copies, sorted by path, and return their number; the journal is removed."""
        entries = sorted(self._journal(), key=lambda entry: entry["path"])
        with atomic_write(self.out / MANIFEST_FILE) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)
        (self.out / _JOURNAL).unlink(missing_ok=True)
        return sum(entry["next"] - entry["first"] if "cell" in entry else 1 for entry in entries)


def _resizing(config: CorruptConfig) -> EvalTransform | None:
    if not config.input_size:
        return None
    return EvalTransform(image_size(config.input_size), config.interpolation, config.crop)


def relative_names(images: ImageSet, suffix: str) -> list[str]:
    """Return the path of every image's copies below the folder of a cell, with a new suffix; unique.

    Images of a folder keep their path and stem. If two differ in their suffix alone, both keep it: a.png.jpg.
    """
    if isinstance(images, Shards):
        classes = [*images.classes, ""]
        return [os.path.join(classes[images.label(index)], f"{index:08d}{suffix}") for index in range(len(images))]
    paths = [os.path.relpath(images.name_of(index), images.root) for index in range(len(images))]
    stems = [os.path.splitext(path)[0] for path in paths]
    counts: dict[str, int] = {}
    for stem in stems:
        counts[stem] = counts.get(stem, 0) + 1
    return [(stem if counts[stem] == 1 else path) + suffix for stem, path in zip(stems, paths, strict=True)]


def _write_file(path: Path, content: bytes) -> None:
    """Write a file so that it has its name only once it is complete. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error, len(content)) from error


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}): choose a new --output_dir.") from error
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file of JSON lines; a last line that a kill has cut off is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    for line in lines:
        try:
            entry = json.loads(line)
            yield {**entry, "path": str(entry["path"]), "bytes": int(entry["bytes"])}
        except (ValueError, KeyError, TypeError):
            continue


def _difference(key: str, stored: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what differs between the settings of a folder and the new ones, in words."""
    if key != "flags":
        return (
            f"{key} {stored.get(key)}, now {new[key]}" if key != "fingerprint" else "other names or classes of images"
        )
    before = stored.get("flags", {})
    return ", ".join(
        f"--{name} {before.get(name)}, now {value}" for name, value in new["flags"].items() if before.get(name) != value
    )


def _describe(config: CorruptConfig, images: ImageSet, names: Sequence[str]) -> InputSummary:
    inputs = InputSummary(config.verb)
    add_images(inputs, config.source, Path(config.source), {"images": images})
    severities = ", ".join(map(str, sorted(set(config.severities))))
    inputs.add("corruptions", f"{listing(names, 19)}; severities {severities}; seed {config.seed}")
    size = f"resized and cropped to {config.input_size}" if config.input_size else "of their own size"
    stored = "PNG" if config.png else f"JPEG of quality {config.quality}"
    inputs.add("copies", f"{size}, {stored}" + (f", shards of {config.shard_mb:g} MB" if config.shards else ""))
    inputs.add("workers", describe_workers(worker_count(config.num_workers)))
    inputs.add("output", str(Path(config.output_dir).absolute()))
    return inputs
