"""The published folders of benchmarks. They are listed completely, and invalid ones are rejected with a reason, before
anything is measured.

A class folder contains only images, and its parent folder only class folders. In corrupted sets, the folders above are
severities and corruptions.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from mae_dat.config.errors import DataError
from mae_dat.data.folders import IgnoredFiles, count_ignored, is_image_name, visible_entries
from mae_dat.robustness.corruptions import CATEGORIES

SEVERITY_FOLDERS = ("1", "2", "3", "4", "5")
ARCHIVE_FOLDERS = (*CATEGORIES, "extra")  # the folders in ImageNet-C's tar files
SAMPLED_IMAGES = 16  # images of a folder that are read before the evaluation starts

Listing = list[tuple[str, int]]  # path below the root and label, by label and name


class ExpectedFolder(NamedTuple):
    """The required content of a benchmark's folder."""

    title: str
    labels: Mapping[str, int]
    """Class folders and their labels."""
    images: int | None
    """None if unknown."""
    per_class: int | None
    """Images in each class folder, None if they differ."""


def folders_in(root: str) -> dict[str, str]:
    """Return the names and paths of the folders in a folder."""
    return {entry.name: entry.path for entry in visible_entries(root) if entry.is_dir()}


def _images_in(root: str) -> list[str]:
    return [entry.name for entry in visible_entries(root) if not entry.is_dir() and is_image_name(entry.name)]


def _first_names(names: Sequence[str]) -> str:
    """Return the first three names as text."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def list_images(root: str, expected: ExpectedFolder, ignored_files: IgnoredFiles | None = None) -> Listing:
    """List all images in the class folders of `root`; add other files to `ignored_files`.

    Raises DataError for a folder of the wrong level, class folders that the benchmark does not have, and images or
    folders in a wrong place.
    """
    folders = folders_in(root)
    class_folders = sorted(
        (name for name in folders if name in expected.labels), key=lambda name: (expected.labels[name], name)
    )
    if not class_folders:
        raise DataError(f"{root}: {_explain_wrong_level(root, folders, expected)}")
    if unknown := [name for name in folders if name not in expected.labels]:
        raise DataError(
            f"{root}: {len(unknown)} folders are not classes of {expected.title} ({_first_names(unknown)}): check "
            "whether it is the folder of another benchmark"
        )
    if stray := _images_in(root):
        raise DataError(f"{root}: images next to the class folders ({_first_names(stray)}): move or delete them")
    ignored_files = IgnoredFiles() if ignored_files is None else ignored_files
    count_ignored(visible_entries(root, ignored_files), ignored_files)
    listing: Listing = []
    for name in class_folders:
        entries = visible_entries(folders[name], ignored_files)
        if inner := [entry.name for entry in entries if entry.is_dir()]:
            raise DataError(
                f"{folders[name]}: contains folders ({_first_names(inner)}), but {expected.title} has images here"
            )
        count_ignored([entry for entry in entries if not is_image_name(entry.name)], ignored_files)
        label = expected.labels[name]
        listing += [(f"{name}/{entry.name}", label) for entry in entries if is_image_name(entry.name)]
    return listing


def _explain_wrong_level(root: str, folders: Mapping[str, str], expected: ExpectedFolder) -> str:
    """Explain why a folder without any class folder is the wrong one."""
    layout = f"{expected.title} is <folder>/{next(iter(expected.labels))}/<image>"
    if os.path.basename(os.path.normpath(root)) in expected.labels:
        return f"contains images, not class folders: give the folder above it ({layout})"
    if _images_in(root):
        return (
            f"contains images without class folders: move each into the folder of its class ({layout}), as valprep.sh "
            "does for ImageNet's validation images"
        )
    for name, path in folders.items():
        if any(inner in expected.labels for inner in folders_in(path)):
            return f"has no class folders, but its subfolder {name} has: give that one ({layout})"
    return f"has no class folder of {expected.title}, only {_first_names(list(folders)) or 'nothing'} ({layout})"


def missing_images(root: str, listing: Listing, expected: ExpectedFolder) -> list[str]:
    """Describe what is missing in a folder. Raises DataError if it contains more than the benchmark has."""
    counts = dict.fromkeys(expected.labels, 0)
    for path, _ in listing:
        counts[path.split("/")[0]] += 1
    per_class = expected.per_class
    if extra := [name for name, count in counts.items() if per_class is not None and count > per_class]:
        raise DataError(
            f"{root}: {_first_names(extra)}: {counts[extra[0]]} images where {expected.title} has {per_class}; unpack "
            "it again"
        )
    if expected.images is not None and len(listing) > expected.images:
        raise DataError(f"{root}: {len(listing):,} images, {expected.title} has {expected.images:,}; unpack it again")
    missing = []
    if absent := [name for name, count in counts.items() if not count]:
        missing.append(f"{len(absent)} of {len(counts)} class folders are missing or empty ({_first_names(absent)})")
    if short := [f"{name}: {n}" for name, n in counts.items() if per_class is not None and 0 < n < per_class]:
        missing.append(f"{len(short)} class folders have fewer than {per_class} images ({_first_names(short)})")
    if expected.images is not None and len(listing) < expected.images:
        missing.append(f"{len(listing):,} of {expected.images:,} images are there")
    return missing


def corruption_folders(root: str, names: Sequence[str], title: str) -> dict[str, str]:
    """Return the folder of each corruption that is present, in the order of `names`: directly below `root`, or one
    level down as in ImageNet-C's archives by category (blur/defocus_blur).

    Raises DataError if there is none, or one is present twice.
    """
    paths: dict[str, list[str]] = {}
    for name, path in folders_in(root).items():
        for corruption, inner_path in folders_in(path).items() if name in ARCHIVE_FOLDERS else [(name, path)]:
            if corruption in names:
                paths.setdefault(corruption, []).append(inner_path)
    if twice := [name for name, at in paths.items() if len(at) > 1]:
        raise DataError(f"{root}: {twice[0]} exists twice, {' and '.join(paths[twice[0]])}: delete one")
    if not paths:
        layout = f"{title} is <folder>/{names[0]}/1/n01440764/<image>"
        inside = list(folders_in(root))
        too_deep = set(inside) & {*SEVERITY_FOLDERS} or _parent_name(root) in names
        fault = "has no folder of a corruption"
        if too_deep:
            fault = "is inside the folder of a corruption: give one further up"
        raise DataError(f"{root}: {fault} ({layout}); it contains {_first_names(inside) or 'no folder'}")
    return {name: paths[name][0] for name in names if name in paths}


def _parent_name(root: str) -> str:
    return os.path.basename(os.path.dirname(os.path.normpath(root)))


def severity_folders(root: str, title: str, by_strength: bool = False, prefix: str = "") -> dict[int, str]:
    """Return the folders of the severities 1 to 5 that are present; `prefix` is what their names begin with.

    With `by_strength` they may be named by their strength instead, five of them in rising order (1.00, 2.35, ...).
    Raises DataError for other folders among them.
    """
    folders = folders_in(root)
    expected = {f"{prefix}{name}": int(name) for name in SEVERITY_FOLDERS}
    unknown = [name for name in folders if name not in expected]
    if by_strength and unknown and all(re.fullmatch(r"\d+\.\d+", name) for name in folders):
        by_value = sorted(folders, key=float)
        if len(folders) != len(SEVERITY_FOLDERS):
            raise DataError(
                f"{root}: {len(folders)} severities named by their strength ({', '.join(by_value)}), but {title} has "
                "5, and without all of them their numbers are unknown: unpack it again"
            )
        return dict(enumerate((folders[name] for name in by_value), 1))
    if unknown:
        raise DataError(
            f"{root}: {_first_names(unknown)}: not a severity of {title}; expected the folders {prefix}1 to {prefix}5"
        )
    return {expected[name]: folders[name] for name in sorted(folders)}


def describe_listing_difference(listing: Listing, other: Listing) -> str:
    """Return 'lacks b/c.JPEG' or 'has b/c.JPEG beyond it' for two listings that differ."""
    paths, other_paths = {path for path, _ in listing}, {path for path, _ in other}
    lacking, extra = sorted(other_paths - paths), sorted(paths - other_paths)
    return f"lacks {_first_names(lacking)}" if lacking else f"has {_first_names(extra)} beyond it"


def check_size(path: str, size: tuple[int, int], side: int) -> None:
    """Raise DataError unless the image at `path`, of `size` (width, height), is `side` x `side` pixels."""
    if size != (side, side):
        raise DataError(
            f"{path}: {size[0]} x {size[1]} px, but the benchmark is stored at {side} x {side}; resized or "
            "regenerated copies give other numbers: unpack the official files"
        )


def sampled_indices(count: int) -> range:
    """Return up to 16 indices, evenly spaced over `count` images. They are part of fingerprints: never change them."""
    return range(0, count, max(1, -(-count // SAMPLED_IMAGES)))


def check_some_sizes(root: str, listing: Listing, side: int) -> None:
    """Read the headers of up to 16 images. Raises DataError for a size other than `side` x `side` pixels."""
    for index in sampled_indices(len(listing)):
        path = f"{root}/{listing[index][0]}"
        try:
            with Image.open(path) as image:
                size = image.size
        except OSError as error:
            raise DataError(f"{path}: is not a readable image ({error}); unpack it again") from error
        check_size(path, size, side)
