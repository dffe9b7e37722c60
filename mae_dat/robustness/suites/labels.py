"""Labels that benchmarks store in files next to their images, or in the names of the images."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, tensor

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.folders import walk_images
from mae_dat.data.generated.draw import SHAPES, TEXTURES
from mae_dat.robustness.suites.folders import Listing
from mae_dat.robustness.suites.imagenet import NO_CLASS, SIXTEEN, SYNSETS, ClassMapping, class_mapping
from mae_dat.storage.json_files import read_json

VALIDATION_IMAGES = 50_000
OVERLAP, OVERLAP_LOGITS = 113, 125  # ObjectNet's classes that ImageNet has, and the number of their ImageNet classes
NO_LABEL = -2  # pads rows of labels; no prediction equals it, NO_CLASS included
SUBSET_IMAGES, SUBSET_DIGEST = 5000, "d4121626d07722a0"


def find_label_file(folder: Path, name: str, subfolder: str = "") -> Path:
    """Return the file `name` in `folder` or one of its two parents, or in a folder `subfolder` of these.

    Raises MissingInputError.
    """
    folders = [parent / inner for parent in (folder, *folder.parents[:2]) for inner in ("", subfolder)]
    for candidate in folders:
        if (candidate / name).is_file():
            return candidate / name
    raise MissingInputError(
        f"{folder}: {name} is missing: put it next to the images ({folder.parent / subfolder / name})"
    )


def _read_json(path: Path, expected: Any) -> Any:
    try:
        return read_json(path, expected, "a file of labels", DataError)
    except DataError as error:
        raise DataError(f"{error} Download it again.") from error


# ---- ReaL ----


def _validation_number(path: str) -> int:
    """Return 1 to 50,000 from 'n01440764/ILSVRC2012_val_00000293.JPEG'. Raises DataError for another name."""
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", path.rpartition("/")[2])
    if not match or not 1 <= int(match[1]) <= VALIDATION_IMAGES:
        raise DataError(f"{path}: the name of a validation image is ILSVRC2012_val_<8 digits>.JPEG; unpack it again")
    return int(match[1])


def real_targets(file: Path, listing: Listing) -> tuple[Listing, Tensor]:
    """Return the images that ReaL has labels for, and the labels, int64 (N, most), padded with NO_LABEL.

    `file` is real.json of google-research/reassessed-imagenet: for each validation image by its number a list of
    ImageNet classes, empty where the annotators did not agree. Raises DataError.
    """
    labels = _read_json(file, list[list[int]])
    if len(labels) != VALIDATION_IMAGES:
        raise DataError(
            f"{file}: is not a list of {VALIDATION_IMAGES} lists of labels: download ReaL's real.json again"
        )
    rows = [labels[_validation_number(path) - 1] for path, _ in listing]
    if bad := [row for row in rows if not all(0 <= number < len(SYNSETS) for number in row)]:
        raise DataError(f"{file}: {bad[0]} are not ImageNet classes 0 to 999: download ReaL's real.json again")
    labeled = [(image, row) for image, row in zip(listing, rows, strict=True) if row]
    most = max((len(row) for _, row in labeled), default=1)
    table = tensor([row + [NO_LABEL] * (most - len(row)) for _, row in labeled])
    return [image for image, _ in labeled], table


# ---- cue conflict ----


def conflict_targets(root: str, listing: Listing) -> tuple[Listing, Tensor]:
    """Return the cue-conflict images whose cues differ, and (shape, texture), int64 (N, 2), from names such as
    'cat/cat3-truck1.png' (Geirhos et al. 2019).

    Raises DataError for another name, or a folder other than the shape's.
    """
    categories = list(SIXTEEN)
    conflicting: Listing = []
    rows = []
    for path, label in listing:
        match = re.fullmatch(r"([a-z]+)/([a-z]+)\d+-([a-z]+)\d+\.png", path)
        if not match or match[1] != match[2] or match[3] not in SIXTEEN:
            raise DataError(f"{root}/{path}: expected <shape>/<shape><i>-<texture><j>.png of the 16 classes")
        if match[2] != match[3]:
            conflicting.append((path, label))
            rows.append([label, categories.index(match[3])])
    return conflicting, tensor(rows)


def read_conflicts(folder: Path, classes: Sequence[str]) -> tuple[Listing, Tensor]:
    """List images `<shape>-<texture>` or `<shape>-<texture>-*` of custom classes anywhere below `folder`, and return
    the classes of shape and texture, int64 (N, 2).

    A texture has the name of its class or, for the shapes of the generated data set, one of `TEXTURES`. Images whose
    cues agree do not measure the shape bias and are excluded (Geirhos et al. 2019). Raises MissingInputError or
    DataError, which names the folder, or an image with another name.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder of conflict images: add it, or omit the suite conflict.")
    is_generated = set(classes) == set(SHAPES)
    class_of_texture = dict(zip(TEXTURES, SHAPES, strict=True)) if is_generated else {name: name for name in classes}
    number = {name: i for i, name in enumerate(classes)}
    listing, cues = [], []
    for path in walk_images(str(folder), {os.path.realpath(folder)}):
        shape, texture = _cues_in(path, classes, class_of_texture)
        shape_label, texture_label = number[shape], number[class_of_texture[texture]]
        if shape_label != texture_label:
            listing.append((os.path.relpath(path, folder), shape_label))
            cues.append((shape_label, texture_label))
    if not listing:
        raise DataError(
            f"{folder}: no image named <shape>-<texture>-* of two classes: add one, or omit --suite conflict."
        )
    return listing, tensor(cues)


def _cues_in(path: str, shapes: Iterable[str], textures: Iterable[str]) -> tuple[str, str]:
    """Return the shape and the texture in an image's name; both may contain hyphens themselves.

    If several textures fit, the longest one is used. Raises DataError with the image's name unless exactly one shape
    fits.
    """

    def begins_with(text: str, name: str) -> bool:
        return text == name or text.startswith(f"{name}-")

    stem = os.path.splitext(os.path.basename(path))[0]
    pairs = []
    for shape in (name for name in shapes if stem.startswith(f"{name}-")):
        matches = [name for name in textures if begins_with(stem[len(shape) + 1 :], name)]
        pairs += [(shape, max(matches, key=len))] if matches else []
    if len(pairs) == 1:
        return pairs[0]
    if pairs:
        choices = " or ".join(f"the shape {shape!r} with the texture {texture!r}" for shape, texture in pairs)
        raise DataError(f"{path} may be {choices}: rename it")
    some_shapes, some_textures = (", ".join(list(names)[:10]) for names in (shapes, textures))
    raise DataError(
        f"{path}: expected <shape>-<texture>-*, a shape such as {some_shapes} and a texture such as {some_textures}"
    )


# ---- ObjectNet ----


class ObjectNet(NamedTuple):
    """ObjectNet's classes in terms of ImageNet's."""

    labels: dict[str, int]
    """Each folder's class among the overlapping ones, or NO_CLASS."""
    members: dict[str, tuple[int, ...]]
    """The ImageNet classes of each overlapping class."""

    def class_mapping(self, restricted: bool) -> ClassMapping:
        """Return the mapping of objnet-113, where only the logits of overlapping classes are used (ResNet-50: 35.75 %),
        or of objnet-1000, where all are (about 17 %)."""
        name = f"{OVERLAP_LOGITS} logits for {OVERLAP} classes" if restricted else f"1000 logits for {OVERLAP} classes"
        return class_mapping(name, self.members, restricted=restricted)


def read_objectnet(folder: Path) -> ObjectNet:
    """Read the four files that ObjectNet is published with, in its folder `mappings`.

    Raises MissingInputError, DataError.
    """
    label_of_folder = _read_json(find_label_file(folder, "folder_to_objectnet_label.json", "mappings"), dict[str, str])
    imagenet_names = _read_json(find_label_file(folder, "objectnet_to_imagenet_1k.json", "mappings"), dict[str, str])
    line_of_class = _read_json(find_label_file(folder, "pytorch_to_imagenet_2012_id.json", "mappings"), dict[str, int])
    lines = find_label_file(folder, "imagenet_to_label_2012_v2", "mappings").read_text().splitlines()
    try:
        class_of_line = {int(line): int(number) for number, line in line_of_class.items()}
        class_of_name = {text.strip(): class_of_line[line] for line, text in enumerate(lines) if text.strip()}
        folder_of_label = {label: name for name, label in label_of_folder.items()}
        classes_of_label = {
            label: tuple(class_of_name[name] for name in names.split("; ")) for label, names in imagenet_names.items()
        }
        members = {folder_of_label[label]: classes for label, classes in classes_of_label.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: ObjectNet's mapping files contradict each other at {error}: unpack them again"
        ) from error
    if (len(members), len({i for ids in members.values() for i in ids})) != (OVERLAP, OVERLAP_LOGITS):
        raise DataError(f"{folder}: the mapping files do not have {OVERLAP} classes ({OVERLAP_LOGITS} of ImageNet's)")
    members = dict(sorted(members.items()))
    numbers = {name: number for number, name in enumerate(members)}
    return ObjectNet({name: numbers.get(name, NO_CLASS) for name in sorted(label_of_folder)}, members)


# ---- RobustBench's subset ----


def read_subset(file: Path, digest: str = SUBSET_DIGEST) -> set[str]:
    """Return the 'n01440764/ILSVRC2012_val_00000293.JPEG' of RobustBench's imagenet_test_image_ids.txt, 5,000 of them.

    Raises MissingInputError, and DataError for a file whose sha256 does not start with `digest`.
    """
    if not file.is_file():
        raise MissingInputError(f"{file} does not exist; it is robustbench/data/imagenet_test_image_ids.txt")
    content = file.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(digest):
        raise DataError(f"{file}: is not RobustBench's list of {SUBSET_IMAGES} images (sha256 {digest}...)")
    return {"/".join(line.split("/")[-2:]) for line in content.decode().split()}


def select_subset(listing: Listing, subset: set[str], root: str) -> Listing:
    """Return the images of a subset, in the order of `listing`. Raises DataError if one is missing."""
    if absent := sorted(subset - {path for path, _ in listing}):
        raise DataError(f"{root}: {len(absent)} of the {len(subset)} listed images are missing, first {absent[0]}")
    return [(path, label) for path, label in listing if path in subset]
