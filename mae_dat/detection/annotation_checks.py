"""Checks of COCO's JSON: images and annotations that cannot be used, each reported with its number and value."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mae_dat.config.errors import DataError
from mae_dat.config.groups import ImageSize
from mae_dat.data.decode import decode_oriented, orientation_of, turn_upright
from mae_dat.data.sampler import evenly_spaced
from mae_dat.runtime.inputs import count_of

logger = logging.getLogger(__name__)

_SCALARS = ("image_id", "category_id", "iscrowd")
_OVERHANG = 1.0  # pixels by which a box may exceed its image, as some of COCO's do by rounding
_CROWD = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True, None: False}
_HEADERS = 20_000  # images whose size and EXIF orientation are read before the training, evenly spaced
_THREADS = 4
_FIRST_QUARTER_TURN = 5  # the EXIF orientations from 5 on swap width and height


class Problems:
    """The problems of a file: each is an error, or with `skip` counted."""

    def __init__(self, path: Path, skip: bool) -> None:
        """`path` is the JSON."""
        self.path, self.skip = path, skip
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Raise DataError, or with `skip` count the problem."""
        if not self.skip:
            raise DataError(f"{self.path}: {message}; repair the file, or skip such entries with --on_bad skip.")
        self.messages.append(message)

    def log(self) -> None:
        """Log the number of problems and the first."""
        if self.messages:
            count, first = len(self.messages), self.messages[0]
            logger.warning(
                "%s: %s skipped (--on_bad skip); the first: %s", self.path, count_of(count, "entry", "entries"), first
            )


def usable_images(entries: Sequence[Mapping[str, Any]], problems: Problems) -> list[Mapping[str, Any]]:
    """Return the entries of images that have an id of their own and a size; add the others to `problems`."""
    counts = Counter(entry["id"] for entry in entries)
    usable = []
    for entry in entries:
        name = f"image {entry['id']} ({entry['file_name']})"
        if counts[entry["id"]] > 1:
            problems.add(
                f"{name} has an id that occurs {counts[entry['id']]} times, so its boxes are unknown: number the "
                "images anew, as after joining two files"
            )
        elif not all(_is_number(entry.get(side)) and entry[side] > 0 for side in ("height", "width")):
            problems.add(f"{name} has the size {entry.get('width')} x {entry.get('height')}, not two numbers of pixels")
        else:
            usable.append(entry)
    return usable


def annotation_problem(
    entry: Mapping[str, Any], sizes: Mapping[Any, ImageSize], labels: Mapping[Any, int]
) -> str | None:
    """Describe what is wrong with an annotation; None if it is valid."""
    name, box = f"annotation {entry.get('id')}", entry.get("bbox")
    if wrong := [key for key in _SCALARS if isinstance(entry.get(key), list | dict)]:
        return f"{name} has the {wrong[0]} {entry[wrong[0]]}, not a number"
    if entry.get("image_id") not in sizes:
        return f"{name} belongs to image {entry.get('image_id')}, which is not listed"
    if entry.get("category_id") not in labels:
        return f"{name} has the unknown category {entry.get('category_id')}"
    if entry.get("iscrowd", 0) not in _CROWD:
        return f"{name} has iscrowd {entry['iscrowd']!r}, not 0 or 1"
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        return f"{name} has the box {box}, not (x, y, width, height)"
    (height, width), (x, y, box_width, box_height) = sizes[entry["image_id"]], box
    if box_width <= 0 or box_height <= 0:
        return f"{name} has the box {box} without area"
    if max(box) <= 1 < min(height, width):
        return f"{name} has the box {box}, which seems to be relative to the image: give pixels"
    outside = x + box_width > width + _OVERHANG or y + box_height > height + _OVERHANG
    if x < -_OVERHANG or y < -_OVERHANG or outside:
        return f"{name} has the box {box} outside of its image of {width} x {height} pixels"
    x0, y0, x1, y1 = clip_box(box, sizes[entry["image_id"]])
    return None if x1 > x0 and y1 > y0 else f"{name} has the box {box} outside of its image"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_crowd(entry: Mapping[str, Any]) -> bool:
    """Return whether a valid annotation is a crowd; iscrowd may be a number or its text."""
    return _CROWD[entry.get("iscrowd", 0)]


def clip_box(box: Sequence[float], size: ImageSize) -> list[float]:
    """Convert (x, y, width, height) to (x0, y0, x1, y1), clipped to the image."""
    (x, y, box_width, box_height), (height, width) = box, size
    return [max(x, 0.0), max(y, 0.0), min(x + box_width, float(width)), min(y + box_height, float(height))]


# ---- sizes and EXIF orientation of the files ----


def decode_upright(path: str, size: ImageSize) -> Image.Image:
    """Decode an image whose JSON has the (height, width) `size`, turned by its EXIF orientation if it then has that
    size.

    Label tools show images upright, so the boxes of an image that fits both ways lie on the upright one. Raises
    DataError for another size.
    """
    image, orientation = decode_oriented(path)
    for candidate in (turn_upright(image, orientation), image):
        if candidate.size == size[::-1]:
            return candidate
    raise DataError(f"{_describe_other_size(path, image.size, orientation, size)}: repair one.")


def _describe_other_size(path: str, pixels: tuple[int, int], orientation: int, size: ImageSize) -> str:
    tag = f" and EXIF orientation {orientation}" if orientation != 1 else ""
    return f"{path} has {pixels[0]} x {pixels[1]} pixels{tag}, but its JSON has {size[1]} x {size[0]}"


class _Header(NamedTuple):
    pixels: tuple[int, int]
    """Width and height."""
    orientation: int


def _read_header(path: str, size: ImageSize) -> _Header | None:
    """Read the size of an image file and its EXIF orientation, without decoding it; None for an unreadable one."""
    try:
        with Image.open(path) as image:
            # In a PNG the orientation may follow the pixels: it is read only where it decides.
            needs_tag = image.format != "PNG" or "exif" in image.info or image.size != size[::-1]
            return _Header(image.size, orientation_of(image) if needs_tag else 1)
    except Exception:  # PIL's readers raise nearly every type of exception; decoding reports what is wrong
        return None


def images_of_other_size(images: Sequence[tuple[str, ImageSize]], problems: Problems) -> set[str]:
    """Compare the sizes of image files, given by path and size in the JSON, and return the paths of those that differ.

    Only the headers are read, of at most 20,000 images, evenly spaced. Each file of another size is added to
    `problems`, which may raise DataError. Images that are turned upright are logged, and so is a partial comparison.
    """
    selected = [images[index] for index in evenly_spaced(len(images), min(_HEADERS, len(images)))]
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(_read_header, *zip(*selected, strict=True))) if selected else []
    different, turned = set(), []
    for (path, size), header in zip(selected, headers, strict=True):
        if header is None:
            continue
        pixels = header.pixels[::-1] if header.orientation >= _FIRST_QUARTER_TURN else header.pixels
        if header.orientation != 1 and pixels == size[::-1]:
            turned.append(path)
        elif size[::-1] not in (pixels, header.pixels):
            different.add(path)
            problems.add(_describe_other_size(path, header.pixels, header.orientation, size))
    if turned:
        logger.warning(
            "%d of %d images have an EXIF orientation, first %s: they are turned upright if their JSON has that size, "
            "as label tools show them.",
            len(turned),
            len(selected),
            turned[0],
        )
    if len(selected) < len(images):
        logger.info("%s: sizes compared for %d of %d images.", problems.path, len(selected), len(images))
    return different
