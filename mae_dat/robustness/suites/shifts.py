"""A user's own shifted images in a folder, in shards or in a CSV file, by group, or by corruption and severity.

Layouts of a folder: CLASS/*, GROUP/CLASS/*, and CORRUPTION/SEVERITY/CLASS/*, which `mae-dat corrupt` writes; each with
shards in place of the class folders. A CSV file has the columns file, class and, if there are groups, group.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mae_dat.config.errors import ConfigError, DataError, MissingInputError, listing, suggest
from mae_dat.config.groups import ClassOrder
from mae_dat.data.class_names import name_outputs
from mae_dat.data.folders import IgnoredFiles, class_folders, walk_images
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.open import holds_shards, open_images
from mae_dat.data.shards.reader import Shards
from mae_dat.robustness.scores.results import GROUP_PREFIX
from mae_dat.robustness.suites.folders import SEVERITY_FOLDERS, folders_in
from mae_dat.robustness.suites.functions import ImageFunction
from mae_dat.robustness.suites.imagenet import ClassMapping
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.sets import BenchmarkSet, Cell, CustomSet

ANY_SIZE = (224, 224)
COLUMNS = ("file", "class", "group")


class Shift(NamedTuple):
    """A suite of the user's own: a function on the clean images, or a folder or CSV file of shifted images."""

    name: str
    source: Path | ImageFunction


def parse_shifts(words: Sequence[str], taken: Sequence[str]) -> list[Shift]:
    """Return the shifts of `--shifts`, each a path or NAME=PATH. Raises ConfigError, MissingInputError."""
    shifts = []
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or Path(word).exists():
            name, path = Path(word).absolute().name.removesuffix(".csv"), word
        shifts.append(Shift(name, Path(path).expanduser()))
    check_shifts(shifts, taken)
    return shifts


def check_shifts(shifts: Sequence[Shift], taken: Sequence[str]) -> None:
    """Raise ConfigError for a name that is empty, taken by a suite or given twice; MissingInputError for a path."""
    names = [shift.name for shift in shifts]
    for name, source in shifts:
        if not name or name in (*taken, "all") or "/" in name or names.count(name) > 1:
            reason = "is given twice" if names.count(name) > 1 else "is the name of another suite, or cannot be one"
            raise ConfigError(f"the name {name!r} of a shift {reason}: give it another one, such as my_shift=DIR.")
        if isinstance(source, Path) and not source.exists():
            raise MissingInputError(f"--shifts: there is no folder or CSV file {source}.")


class _ShiftCell(NamedTuple):
    """The images of a group, or of a corruption at a severity."""

    cell: str
    root: str
    samples: list[tuple[str, str]] | None
    """Path below the root, and class; None for shards."""


class ShiftSet(BenchmarkSet):
    """The images of one cell of a shift."""

    pair_names: list[str]
    """What identifies each image among the clean ones: CLASS/NAME without a suffix."""

    def pair_name(self, index: int) -> str | None:
        """Return the name of the clean image that this one may be a version of."""
        return self.pair_names[self.folder_index(index)]


def open_shift(
    name: str,
    source: Path,
    outputs: int,
    stored: Sequence[str] | None,
    clean: BenchmarkSet | None,
    order: ClassOrder = "auto",
) -> tuple[list[BenchmarkSet], list[str]]:
    """Return the image sets of a shift, and their cells: "", "group:NAME" or "CORRUPTION/SEVERITY".

    Labels are outputs of the model by the names of the classes: those stored with the model, those of the clean images
    if there are any, or else all classes of the folder. Raises DataError, which names the folder, or the CSV's line.
    """
    cells = _read_csv(source) if source.is_file() else _read_folder(source)
    classes, reading = _classes(source, cells, outputs, stored, clean=clean, order=order)
    sets: list[BenchmarkSet] = []
    for cell in cells:
        found = (
            _open_shards(name, cell, classes, reading) if cell.samples is None else _open(name, cell, classes, reading)
        )
        found.protocol |= {"folder": source.resolve().name}
        sets.append(found)
    return sets, [cell.cell for cell in cells]


def _classes(
    source: Path,
    cells: Sequence[_ShiftCell],
    outputs: int,
    stored: Sequence[str] | None,
    *,
    clean: BenchmarkSet | None,
    order: ClassOrder,
) -> tuple[list[str], str]:
    """Return the name of each output, and where the names come from."""
    present: set[str] = set()
    for cell in cells:
        if cell.samples is None:
            shards = Shards(cell.root, lambda image: torch.zeros(0))
            present |= {shards.classes[number] for number, count in enumerate(shards.class_counts()) if count}
        else:
            present |= {name for _, name in cell.samples}
    if clean is not None and len(clean.classes) == outputs:
        known, reading = clean.classes, clean.class_mapping.name
    else:
        named = name_outputs(str(source), sorted(present), outputs, stored, order=order)
        known, reading = named.names, named.source
    if unknown := sorted(present - set(known)):
        raise DataError(
            f"{source}: {listing(unknown, 3)} {'is' if len(unknown) == 1 else 'are'} not among the {outputs} classes "
            f"of the models and of the clean images: {suggest(unknown[0], known[:30])}"
        )
    return list(known), reading


def _mapping(classes: Sequence[str], reading: str) -> ClassMapping:
    every = torch.arange(len(classes))
    return ClassMapping(reading, tuple(classes), every, every, outputs=len(classes))


def _cell(name: str, cell: str) -> Cell:
    corruption, _, severity = cell.partition("/")
    return Cell(name, corruption, int(severity)) if severity else Cell(name, cell)


def _open(name: str, cell: _ShiftCell, classes: Sequence[str], reading: str) -> ShiftSet:
    assert cell.samples is not None
    number = {one: i for i, one in enumerate(classes)}
    listing_of_cell = [(path, number[one]) for path, one in cell.samples]
    found = ShiftSet(
        _cell(name, cell.cell),
        cell.root,
        listing=listing_of_cell,
        targets=torch.tensor([label for _, label in listing_of_cell])[:, None],
        class_mapping=_mapping(classes, reading),
        preprocessing=Preprocessing(ANY_SIZE, keep_size=True),
    )
    found.pair_names = [
        path_stem(path if path.startswith(f"{one}/") else f"{one}/{os.path.basename(path)}")
        for path, one in cell.samples
    ]
    return found


def _open_shards(name: str, cell: _ShiftCell, classes: Sequence[str], reading: str) -> CustomSet:
    images = open_images(cell.root, lambda image: torch.zeros(0), classes=classes)
    preprocessing = Preprocessing(ANY_SIZE, keep_size=True)
    return CustomSet(_cell(name, cell.cell), images, _mapping(classes, reading), preprocessing)


def path_stem(path: str) -> str:
    """Return a path without its suffix."""
    return os.path.splitext(path)[0]


def clean_pair_names(images: BenchmarkSet) -> list[str | None]:
    """Return what identifies each image of a set: CLASS/NAME without a suffix; None for images in shards."""
    names: list[str | None] = []
    for index in range(len(images)):
        if isinstance(images, ShiftSet):
            names.append(images.pair_name(index))
        elif isinstance(images, CustomSet):
            inner = images.images
            number = int(images.listing[index][0])
            is_file = isinstance(inner, ImageFolder)
            names.append(path_stem(os.path.relpath(inner.name_of(number), inner.root)) if is_file else None)
        else:
            names.append(path_stem(images.listing[index][0]))
    return names


# ---- layouts ----


def _read_folder(root: Path) -> list[_ShiftCell]:
    """Return the cells of a folder by its layout. Raises DataError."""
    if holds_shards(root):
        return [_ShiftCell("", str(root), None)]
    folders = folders_in(str(root))
    if not folders:
        raise DataError(f"{root} has no folders: expected GROUP/CLASS/*, CLASS/* or CORRUPTION/SEVERITY/CLASS/*.")
    if all(_holds_images(path) and not folders_in(path) for path in folders.values()):
        return [_ShiftCell("", str(root), _samples(str(root)))]
    cells = []
    for group, path in folders.items():
        inner = folders_in(path)
        if inner and all(name in SEVERITY_FOLDERS for name in inner) and _are_severities(inner.values()):
            cells += [_class_cell(f"{group}/{severity}", inner[severity]) for severity in sorted(inner)]
        else:
            cells.append(_class_cell(f"{GROUP_PREFIX}{group}", path))
    kinds = {"/" in cell.cell for cell in cells}
    if len(kinds) > 1:
        raise DataError(f"{root} mixes groups with corruptions and their severities 1 to 5: evaluate them one by one.")
    return cells


def _are_severities(paths: Iterable[str]) -> bool:
    """Return whether folders named 1 to 5 contain class folders or shards, and are not classes themselves."""
    return all(bool(folders_in(path)) or holds_shards(path) for path in paths)


def _holds_images(path: str) -> bool:
    return bool(next(iter(walk_images(path, {os.path.realpath(path)})), None)) and not holds_shards(path)


def _class_cell(cell: str, path: str) -> _ShiftCell:
    return _ShiftCell(cell, path, None if holds_shards(path) else _samples(path))


def _samples(root: str) -> list[tuple[str, str]]:
    """Return path and class of every image of a folder of class folders. Raises DataError without any."""
    ignored_files = IgnoredFiles()
    folders, visited = class_folders(root, ignored_files)
    samples = [
        (os.path.relpath(path, root), name)
        for name, folder in folders.items()
        for path in walk_images(folder, visited, ignored_files)
    ]
    if not samples:
        others = ignored_files.describe(root)
        raise DataError(
            f"{root} has no images in class folders{f', but {others}' if others else ''}: expected CLASS/*."
        )
    return samples


def _read_csv(path: Path) -> list[_ShiftCell]:
    """Return the cells of a CSV file. Raises DataError, which names its line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(enumerate(reader, 2))
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({error}).") from error
    for column in COLUMNS[:2]:
        if column not in columns:
            raise DataError(
                f"{path} has no column {column!r}, only {listing(columns) or 'nothing'}: its first line names the "
                "columns file, class and, if there are groups, group."
            )
    groups: dict[str, list[tuple[str, str]]] = {}
    for line, row in rows:
        name, one, group = row["file"], row["class"], row.get("group", "")
        if not name or not one or (group in ("", None) and "group" in columns):
            raise DataError(f"{path}, line {line}, lacks a value: every row needs file, class and group.")
        if not (path.parent / name).is_file():
            raise DataError(f"{path}, line {line}: there is no file {path.parent / name}.")
        groups.setdefault(group or "", []).append((name, one))
    if not groups:
        raise DataError(f"{path} has no rows.")
    for group, samples in groups.items():
        if len({name for name, _ in samples}) < len(samples):
            twice = next(name for name, _ in samples if [one for one, _ in samples].count(name) > 1)
            raise DataError(f"{path} has {twice} twice{f' in the group {group}' if group else ''}.")
    return [
        _ShiftCell(f"{GROUP_PREFIX}{group}" if group else "", str(path.parent), samples)
        for group, samples in sorted(groups.items())
    ]
