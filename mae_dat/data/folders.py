"""Image folders: splits, class folders and image files below a root, and a count of what is not read."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import features
from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.config.paths import require_folder

logger = logging.getLogger(__name__)

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
"""The usual names of the folders of a split, in lower case, the first choice first."""
IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", *([".avif"] if features.check("avif") else []))
"""The suffixes of files that are read as images, in lower case."""
OWN_FILES = ("manifest.jsonl", "index.safetensors", "inputs.json", "settings.json", "boxes.json")
"""Ends of the names of files that commands of this package write next to images. They are not counted as ignored."""
_MAX_REASONS = 40  # a folder may have as many suffixes as files
_OTHER, _SECOND_LINK = "other files", "links to a folder that is read already"


@dataclasses.dataclass
class IgnoredFiles:
    """What lies in a folder of images and is not read: the number and the first example by reason."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    dangling: list[str] = dataclasses.field(default_factory=list)
    """The paths of all links that lead nowhere."""

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count a file; beyond 40 reasons, as one of the other files."""
        if reason not in self.counts and len(self.counts) >= _MAX_REASONS:
            reason = _OTHER
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, path)

    def update(self, other: "IgnoredFiles") -> None:
        """Add the counts of another folder."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)
        self.dangling += other.dangling

    @property
    def total(self) -> int:
        """The number of all ignored files."""
        return sum(self.counts.values())

    def describe(self, root: str | os.PathLike[str] = "", most: int = 5) -> str:
        """Return the counts in words, the most frequent reason first, with examples relative to `root`.

        Empty if nothing was ignored.
        """
        reasons = sorted(self.counts, key=lambda reason: -self.counts[reason])
        parts = [
            f"{reason} {self.counts[reason]:,} ({_relative(self.examples[reason], root)})" for reason in reasons[:most]
        ]
        rest = sum(self.counts[reason] for reason in reasons[most:])
        return ", ".join([*parts, *([f"others {rest:,}"] if rest else [])])


def _relative(path: str, root: str | os.PathLike[str]) -> str:
    prefix = os.path.join(root, "")
    return path.removeprefix(prefix) if str(root) else path


def find_split(
    root: str | os.PathLike[str], split: str, labeled: bool = True, names: Sequence[str] | None = None
) -> Path:
    """Return the folder of a split, "train" or "val", below `root`.

    Its name is one of `SPLIT_NAMES` in any case; `names` replaces these names. A folder `test` is the validation split
    only if there is no other, with a warning. Without split folders the whole of `root` is the training split if labels
    are not needed (pretraining); otherwise raises MissingInputError.
    """
    require_folder(root)
    names = tuple(names) if names else SPLIT_NAMES[split]
    present = split_folders(root, names)
    if present:
        if split == "val" and present[0].lower() == "test" and "val" in names:
            logger.warning(
                "%s has no folder val or valid: its %s serves as validation split, for the choice of checkpoints too.",
                root,
                present[0],
            )
        return Path(root) / present[0]
    if split == "train" and not labeled:
        if others := split_folders(root, SPLIT_NAMES["val"]):
            logger.warning(
                "%s has no folder train: all of it is used for training, %s too.", root, " and ".join(others)
            )
        return Path(root)
    raise MissingInputError(
        f"{root} has no folder {' or '.join(names)}; expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg. "
        f"If {root} has one folder per class, mae-dat split {root} NEW writes both"
    )


def find_evaluation_images(root: str | os.PathLike[str]) -> Path:
    """Return the folder whose class folders are evaluated: the validation split, or `root` itself if it has neither
    splits nor other folders than class folders, as ImageNet-A and ImageNet-V2 are published.

    Raises MissingInputError.
    """
    require_folder(root)
    has_splits = split_folders(root, (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"]))
    return Path(root) if not has_splits and holds_classes(root) else find_split(root, "val")


def holds_classes(root: str | os.PathLike[str]) -> bool:
    """Return whether a folder has class folders, all of which contain images themselves or are empty, and no images
    beside them."""
    entries = visible_entries(str(root))
    folders = [visible_entries(entry.path) for entry in entries if _is_folder(entry)]
    with_images = [any(is_image_name(entry.name) for entry in folder) for folder in folders]
    with_folders = [any(map(_is_folder, folder)) for folder in folders]
    are_classes = all(images or not inner for images, inner in zip(with_images, with_folders, strict=True))
    return any(with_images) and are_classes and not any(is_image_name(entry.name) for entry in entries)


def split_folders(root: str | os.PathLike[str], names: Sequence[str]) -> list[str]:
    """Return the folders directly below `root` that have one of these names, in any case, in the order of `names`."""
    folders = [entry.name for entry in visible_entries(str(root)) if _is_folder(entry)]
    # The exact spelling comes first: Val is used where there is no val.
    return [
        folder
        for name in names
        for folder in sorted(folders, key=lambda folder: folder != name)
        if folder.lower() == name.lower()
    ]


def visible_entries(folder: str, ignored_files: IgnoredFiles | None = None) -> list[os.DirEntry[str]]:
    """List a folder by name, without dot files: .ipynb_checkpoints is no class, ._x.jpg is no image.

    Dot files are added to `ignored_files`. Raises DataError for a folder that cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            every = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error
    visible = [entry for entry in every if not entry.name.startswith(".")]
    if ignored_files is not None and len(visible) < len(every):
        for entry in every:
            if entry.name.startswith("."):
                ignored_files.add("hidden", entry.path)
    return visible


def class_folders(root: str, ignored_files: IgnoredFiles | None = None) -> tuple[dict[str, str], set[str]]:
    """Return the class folders of `root` as name -> path, sorted by name, and the real paths visited.

    A link to a class folder that is listed already is skipped with a warning. Files beside the class folders are added
    to `ignored_files`.
    """
    ignored_files = IgnoredFiles() if ignored_files is None else ignored_files
    folders = []
    for entry in visible_entries(root, ignored_files):
        if _is_folder(entry):
            folders.append(entry)
        elif is_image_name(entry.name) and _is_file(entry):
            ignored_files.add("images beside the class folders", entry.path)
        else:
            _ignore_file(entry, ignored_files)
    paths: dict[str, str] = {}
    visited = {os.path.realpath(root)}
    for entry in sorted(folders, key=lambda entry: entry.is_symlink()):  # a link must not replace a real folder
        real = os.path.realpath(entry.path)
        if real in visited:
            logger.warning("%s is a link to a folder that is read already; it is not a class of its own", entry.path)
            ignored_files.add(_SECOND_LINK, entry.path)
            continue
        visited.add(real)
        paths[entry.name] = entry.path
    return dict(sorted(paths.items())), visited


def walk_images(folder: str, visited: set[str], ignored_files: IgnoredFiles | None = None) -> Iterator[str]:
    """Yield the paths of all images below `folder`, sorted by folder and name; add other files to `ignored_files`.

    Folders in `visited` (real paths) are skipped, and visited ones are added to it, because links may form loops.
    """
    ignored_files = IgnoredFiles() if ignored_files is None else ignored_files
    for entry in visible_entries(folder, ignored_files):
        if _is_folder(entry):
            real = os.path.realpath(entry.path)
            if real not in visited:
                visited.add(real)
                yield from walk_images(entry.path, visited, ignored_files)
            else:
                ignored_files.add(_SECOND_LINK, entry.path)
        elif is_image_name(entry.name) and _is_file(entry):
            yield entry.path
        else:
            _ignore_file(entry, ignored_files)


def is_image_name(name: str) -> bool:
    """Return whether a file is read as an image, by its suffix."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def count_ignored(entries: Sequence[os.DirEntry[str]], ignored_files: IgnoredFiles) -> None:
    """Add the files among the entries of a folder that are not read as images to `ignored_files`."""
    for entry in entries:
        if not _is_folder(entry) and not (is_image_name(entry.name) and _is_file(entry)):
            _ignore_file(entry, ignored_files)


def _ignore_file(entry: os.DirEntry[str], ignored_files: IgnoredFiles) -> None:
    """Count a file that is not read, by the reason why not."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        ignored_files.add("dangling links", entry.path)
        ignored_files.dangling.append(entry.path)
    elif not _is_file(entry):
        ignored_files.add("no regular files", entry.path)
    elif not entry.name.endswith(OWN_FILES):
        ignored_files.add(os.path.splitext(entry.name)[1].lower() or "no suffix", entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False for a link that leads nowhere or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def other_folders(root: str | os.PathLike[str], used: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the names of the folders directly below `root` that contain none of the folders in `used`."""
    used_paths = [os.path.abspath(path) for path in used]
    names = []
    for entry in visible_entries(str(root)):
        path = os.path.abspath(entry.path)
        if _is_folder(entry) and not any(f"{other}/".startswith(f"{path}/") for other in used_paths):
            names.append(entry.name)
    return names
