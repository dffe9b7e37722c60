"""The folders that benchmarks come in: listed whole before anything is measured, and refused with a reason.

A class folder holds pictures and nothing else; the folder above holds class folders, and in corrupted sets the ones
above those are severities and corruptions.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.config.errors import DataError
from mae_dat.data.folders import visible_entries
from mae_dat.robustness.corruptions import CATEGORIES

SEVERITY_FOLDERS = ("1", "2", "3", "4", "5")
ARCHIVES = (*CATEGORIES, "extra")  # the folders in ImageNet-C's tar files
LOOKS = 16  # pictures of a folder that are looked at beforehand; the others when they are read

Listing = list[tuple[str, int]]  # path below the root and label, by label and name


class Expected(NamedTuple):
    """What a folder must hold."""

    title: str
    labels: Mapping[str, int]
    """Class folders and their labels."""
    images: int
    per_class: int | None
    """Pictures in each class folder, None where they differ."""


def folders_in(root: str) -> dict[str, str]:
    """Names and paths of the folders in a folder."""
    return {entry.name: entry.path for entry in visible_entries(root) if entry.is_dir()}


def _pictures_in(root: str) -> list[str]:
    return [entry.name for entry in visible_entries(root) if not entry.is_dir() and _is_picture(entry.name)]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _some(names: Sequence[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def list_pictures(root: str, expected: Expected) -> Listing:
    """All pictures below the class folders of `root`. Raises DataError for a folder of the wrong level, class folders
    that the benchmark does not have, and pictures or folders where they do not belong."""
    found = folders_in(root)
    own = sorted((name for name in found if name in expected.labels), key=lambda name: (expected.labels[name], name))
    if not own:
        raise DataError(f"{root}: {_wrong_level(root, found, expected)}")
    if unknown := [name for name in found if name not in expected.labels]:
        raise DataError(
            f"{root}: {len(unknown)} folders are no classes of {expected.title} ({_some(unknown)}); is it another "
            "benchmark's folder?"
        )
    if stray := _pictures_in(root):
        raise DataError(f"{root}: pictures lie beside the class folders ({_some(stray)}); move or delete them")
    listing: Listing = []
    for name in own:
        entries = visible_entries(found[name])
        if folders := [entry.name for entry in entries if entry.is_dir()]:
            raise DataError(f"{found[name]}: holds folders ({_some(folders)}) where {expected.title} has pictures")
        label = expected.labels[name]
        listing += [(f"{name}/{entry.name}", label) for entry in entries if _is_picture(entry.name)]
    return listing


def _wrong_level(root: str, found: Mapping[str, str], expected: Expected) -> str:
    """Why a folder without any class folder is the wrong one."""
    layout = f"{expected.title} is <folder>/{next(iter(expected.labels))}/<picture>"
    if os.path.basename(os.path.normpath(root)) in expected.labels:
        return f"holds pictures, not class folders; name the folder above it ({layout})"
    if _pictures_in(root):
        return (
            f"holds pictures in no class folders; move each into its class's ({layout}), as valprep.sh does for "
            "ImageNet's validation pictures"
        )
    for name, path in found.items():
        if any(below in expected.labels for below in folders_in(path)):
            return f"has no class folders, but {name} in it has; name that ({layout})"
    return f"has no class folder of {expected.title} but {_some(list(found)) or 'nothing at all'} ({layout})"


def shortfall(root: str, listing: Listing, expected: Expected) -> list[str]:
    """What is missing, in words. Raises DataError where there is more than there may be."""
    counts = dict.fromkeys(expected.labels, 0)
    for path, _ in listing:
        counts[path.split("/")[0]] += 1
    wanted = expected.per_class
    if more := [name for name, count in counts.items() if wanted is not None and count > wanted]:
        raise DataError(
            f"{root}: {_some(more)}: {counts[more[0]]} pictures where {expected.title} has {wanted}; unpack it again"
        )
    if len(listing) > expected.images:
        raise DataError(f"{root}: {len(listing):,} pictures, {expected.title} has {expected.images:,}; unpack it again")
    told = []
    if absent := [name for name, count in counts.items() if not count]:
        told.append(f"{len(absent)} of {len(counts)} class folders are missing or empty ({_some(absent)})")
    if short := [f"{name}: {count}" for name, count in counts.items() if wanted is not None and 0 < count < wanted]:
        told.append(f"{len(short)} class folders have fewer than {wanted} pictures ({_some(short)})")
    if len(listing) < expected.images:
        told.append(f"{len(listing):,} of {expected.images:,} pictures are there")
    return told


def corruption_folders(root: str, names: Sequence[str], title: str) -> dict[str, str]:
    """The folder of each corruption that is there, in the order of `names`: directly below `root`, or one level down as
    in ImageNet-C's archives by category (blur/defocus_blur). Raises DataError for none, or one that is there twice."""
    places: dict[str, list[str]] = {}
    for name, path in folders_in(root).items():
        for own, at in folders_in(path).items() if name in ARCHIVES else [(name, path)]:
            if own in names:
                places.setdefault(own, []).append(at)
    if twice := [name for name, at in places.items() if len(at) > 1]:
        raise DataError(f"{root}: {twice[0]} is there twice, {' and '.join(places[twice[0]])}; delete one")
    if not places:
        layout = f"{title} is <folder>/{names[0]}/1/n01440764/<picture>"
        inside = list(folders_in(root))
        lower = set(inside) & {*SEVERITY_FOLDERS} or os.path.basename(os.path.dirname(os.path.normpath(root))) in names
        fault = "lies within a corruption's folder; name one further up" if lower else "has no folder of a corruption"
        raise DataError(f"{root}: {fault} ({layout}); it holds {_some(inside) or 'no folder'}")
    return {name: places[name][0] for name in names if name in places}


def severity_folders(root: str, title: str, by_strength: bool = False) -> dict[int, str]:
    """The folders of the severities 1 to 5 that are there. Raises DataError for other folders among them.

    `by_strength`: they may be named by their strength instead, five of them in rising order (1.00, 2.35, ...).
    """
    found = folders_in(root)
    unknown = [name for name in found if name not in SEVERITY_FOLDERS]
    if by_strength and unknown and all(re.fullmatch(r"\d+\.\d+", name) for name in found):
        if len(found) != len(SEVERITY_FOLDERS):
            told = f"{len(found)} severities named by their strength ({', '.join(sorted(found, key=float))})"
            raise DataError(
                f"{root}: {told}, {title} has 5: which is which can be told of all 5 alone; unpack it again"
            )
        return dict(enumerate((found[name] for name in sorted(found, key=float)), 1))
    if unknown:
        raise DataError(f"{root}: {_some(unknown)}: no severity of {title}; expected the folders 1 to 5")
    return {int(name): found[name] for name in sorted(found)}


def difference(listing: Listing, other: Listing) -> str:
    """'a lacks b/c.JPEG' for two listings that differ."""
    own, others = {path for path, _ in listing}, {path for path, _ in other}
    lacking, beyond = sorted(others - own), sorted(own - others)
    return f"lacks {_some(lacking)}" if lacking else f"has {_some(beyond)} beyond it"


def check_size(path: str, size: tuple[int, int], side: int) -> None:
    """Raises DataError unless the picture at `path`, of (width, height), is `side` x `side`."""
    if size != (side, side):
        raise DataError(
            f"{path}: {size[0]} x {size[1]} px where the benchmark is stored at {side} x {side}; resized or "
            "regenerated copies give other numbers: unpack the official files"
        )


def evenly_spread(count: int) -> range:
    """Up to 16 of so many pictures."""
    return range(0, count, max(1, -(-count // LOOKS)))


def check_some_sizes(root: str, listing: Listing, side: int) -> None:
    """Looks into the headers of up to 16 pictures, evenly spread. Raises DataError for a size but `side` x `side`."""
    for at in evenly_spread(len(listing)):
        path = f"{root}/{listing[at][0]}"
        try:
            with Image.open(path) as picture:
                size = picture.size
        except OSError as error:
            raise DataError(f"{path}: is no picture that can be read ({error}); unpack it again") from error
        check_size(path, size, side)
