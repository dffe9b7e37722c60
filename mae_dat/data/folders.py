"""Image folders: splits, class folders and image files below a root."""

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.config.errors import DataError, MissingInputError

logger = logging.getLogger(__name__)

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}


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


def find_split(
    root: str | os.PathLike[str], split: str, labelled: bool = True, names: Sequence[str] | None = None
) -> Path:
    """Return the folder of a split, "train" or "val", below `root`.

    The folder of "val" may also be called validation or test; `names` replaces these names. Without split folders the
    whole of `root` is the training split if labels are not needed (pretraining); otherwise raises MissingInputError.
    """
    require_folder(root)
    names = tuple(names) if names else SPLIT_NAMES[split]
    for name in names:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    if split == "train" and not labelled:
        return Path(root)
    raise MissingInputError(
        f"{root} has no folder {' or '.join(names)}; expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg"
    )


def visible_entries(folder: str) -> list[os.DirEntry[str]]:
    """List a folder by name, without dot files: .ipynb_checkpoints is no class, ._x.jpg is no image.

    Raises DataError for a folder that cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error


def class_folders(root: str) -> tuple[dict[str, str], set[str]]:
    """Return the class folders of `root` as name -> path, sorted by name, and the real paths visited.

    A link to a class folder that is listed already is skipped with a warning.
    """
    folders = [entry for entry in visible_entries(root) if entry.is_dir()]
    paths: dict[str, str] = {}
    visited = {os.path.realpath(root)}
    for entry in sorted(folders, key=lambda entry: entry.is_symlink()):  # a link must not replace a real folder
        real = os.path.realpath(entry.path)
        if real in visited:
            logger.warning("%s is a link to a folder that is read already; it is no class of its own", entry.path)
            continue
        visited.add(real)
        paths[entry.name] = entry.path
    return dict(sorted(paths.items())), visited


def walk_images(folder: str, visited: set[str]) -> Iterator[str]:
    """Yield the paths of all images below `folder`, sorted by folder and name.

    Folders in `visited` (real paths) are skipped, and visited ones are added to it, because links may form loops.
    """
    for entry in visible_entries(folder):
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in visited:
                visited.add(real)
                yield from walk_images(entry.path, visited)
        elif entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
            yield entry.path
