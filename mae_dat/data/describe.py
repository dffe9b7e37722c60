"""The images of a command in words, for the summary of its inputs (`runtime/inputs.py`)."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_dat.config.groups import DATA_VARIABLE, DEMO, ImageSize, data_root
from mae_dat.data.class_names import readable_class
from mae_dat.data.decode import describe_decoding
from mae_dat.data.folders import IgnoredFiles, other_folders
from mae_dat.data.image_set import ImageSet
from mae_dat.data.transforms import EvalTransform
from mae_dat.runtime.inputs import InputSummary, count_of, list_names

_MAX_FOLDERS = 6  # that are listed as not used


def add_images(
    inputs: InputSummary,
    data_path: str | None,
    root: Path,
    splits: Mapping[str, ImageSet],
    *,
    names_from: str = "",
    describe: Callable[[Any, Path], str] | None = None,
) -> None:
    """Add the rows of the images of a command: folder, splits, classes, and what was left out.

    `splits` are the opened image sets by what they serve for, such as `training`; `names_from` says where the names of
    the classes and their order come from; `describe` replaces `describe_split`.
    """
    inputs.add("data", describe_root(data_path, root), _unused_folders(root, list(splits.values())))
    for role, images in splits.items():
        inputs.add(role, (describe or describe_split)(images, root))
        inputs.details[role] = split_details(images)
    first = next(iter(splits.values()))
    if any(first.class_counts()):
        inputs.add("classes", f"{describe_classes(first.classes)} ({names_from or first.class_names_from})")
    inputs.add("decoding", describe_decoding())
    inputs.add("left out", describe_ignored([images.ignored_files for images in splits.values()], root))


def describe_root(data_path: str | None, root: Path) -> str:
    """Return where images come from: the absolute path, and what named it."""
    name = data_root(data_path, str(root))
    folder = os.path.abspath(root)
    if name == DEMO:
        return f"{folder} (generated images, {DEMO})"
    if "://" in name:
        return f"{name}, cached in {folder}"
    link = f" (link to {os.path.realpath(root)})" if os.path.islink(root) else ""
    return folder + link + ("" if data_path else f" (from ${DATA_VARIABLE})")


def _unused_folders(root: Path, images: Sequence[ImageSet]) -> str:
    """Return which folders beside the splits are not read; empty if there are none."""
    used = [Path(folder) for split in images for folder in split.read_folders()]
    if any(path == root or not path.is_relative_to(root) for path in used):
        return ""
    names = [f"{name}/" for name in other_folders(root, used)]
    more = f" and {len(names) - _MAX_FOLDERS:,} more" if len(names) > _MAX_FOLDERS else ""
    return f"not used: {', '.join(names[:_MAX_FOLDERS])}{more}" if names else ""


def describe_split(images: ImageSet, root: Path) -> str:
    """Return folder, number of images and number of classes of an image set."""
    folder = os.path.relpath(images.root, root)
    place = "all folders" if folder == "." else f"{folder}/" if not folder.startswith("..") else images.root
    text = f"{place}: {count_of(len(images), 'image')}"
    counts = images.class_counts()
    if any(counts):
        present = [count for count in counts if count]
        each = f"{present[0]:,}" if len(set(present)) == 1 else f"{min(present):,} to {max(present):,}"
        text += f" in {count_of(len(present), 'class', 'classes')} ({each} each)"
        empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
        text += f"; none of {len(empty):,} more: {list_names(empty, 40)}" if empty else ""
    if storage := images.describe_storage():
        text += f"; {storage}"
    return text


def split_details(images: ImageSet) -> dict[str, Any]:
    """Return folder, images (of COCO boxes) by class and ignored files of an image set, as JSON values."""
    counts = images.class_counts()
    return {
        "folder": os.path.abspath(images.root),
        "images": len(images),
        "by_class": dict(zip(images.classes, counts, strict=True)) if any(counts) else {},
        "left_out": images.ignored_files.counts,
    }


def describe_classes(classes: Sequence[str]) -> str:
    """Return the classes with their numbers: `0 cat, 1 dog, ... 9 tree`; `0 to 9` where the numbers are the names.

    ImageNet's ids get their English names.
    """
    if len(classes) > 2 and all(name == str(number) for number, name in enumerate(classes)):
        return f"0 to {len(classes) - 1}"
    return list_names([f"{number} {readable_class(name)}" for number, name in enumerate(classes)])


def describe_ignored(ignored_files: Sequence[IgnoredFiles], root: str | Path) -> str:
    """Return the number of files that are not read, in all and by reason with an example; `nothing` for none."""
    total = IgnoredFiles()
    for counts in ignored_files:
        total.update(counts)
    if not total.counts:
        return "nothing"
    every = f"{count_of(total.total, 'file')}: " if len(total.counts) > 1 else ""
    return every + total.describe(root)


def describe_resize(transform: EvalTransform) -> str:
    """Return how images are resized and cropped, without augmentation."""
    (height, width), cover = transform.size_HW, transform.cover_HW
    side = f"shorter side to {cover[0]}" if cover[0] == cover[1] else f"resized to cover {cover[0]} x {cover[1]}"
    return f"{side}, center crop {height} x {width}, {transform.interpolation.value}"


def describe_size(size: ImageSize) -> str:
    """Return height and width in words."""
    return f"{size[0]} x {size[1]} px"
