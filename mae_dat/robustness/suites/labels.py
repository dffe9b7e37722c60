"""Labels that benchmarks keep beside their pictures, in the files that they are published with."""

import hashlib
import json
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
from mae_dat.robustness.suites.imagenet import NO_CLASS, SIXTEEN, SYNSETS, Reading, reading

VALIDATION = 50_000
OVERLAP, OVERLAP_LOGITS = 113, 125  # ObjectNet's classes that ImageNet has, and how many ImageNet classes they are
NO_LABEL = -2  # fills up rows of labels; no answer equals it, NO_CLASS included
SUBSET_IMAGES, SUBSET_DIGEST = 5000, "d4121626d07722a0"


def beside(folder: Path, name: str, inside: str = "") -> Path:
    """The file `name` in `folder` or one of the two above it, or in a folder `inside` of these. MissingInputError."""
    places = [place / part for place in (folder, *folder.parents[:2]) for part in ("", inside)]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise MissingInputError(
        f"{folder}: {name} is missing; put it beside the pictures ({folder.parent / inside / name})"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no JSON that can be read ({error}); download it again") from error


def validation_number(path: str) -> int:
    """1 to 50,000 from 'n01440764/ILSVRC2012_val_00000293.JPEG'. Raises DataError for another name."""
    found = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", path.rpartition("/")[2])
    if not found or not 1 <= int(found[1]) <= VALIDATION:
        raise DataError(f"{path}: the name of a validation picture is ILSVRC2012_val_<8 digits>.JPEG; unpack it again")
    return int(found[1])


def real_targets(file: Path, listing: Listing) -> tuple[Listing, Tensor]:
    """The pictures that ReaL has labels for, and the labels, int64 (N, most), filled up with NO_LABEL.

    `file` is real.json of google-research/reassessed-imagenet: for each validation picture by its number a list of
    ImageNet classes, empty where nobody agreed. Raises DataError.
    """
    labels = _json(file)
    if not isinstance(labels, list) or len(labels) != VALIDATION:
        raise DataError(f"{file}: is no list of {VALIDATION} lists of labels; download ReaL's real.json again")
    rows = [labels[validation_number(path) - 1] for path, _ in listing]
    if bad := [row for row in rows if not all(isinstance(i, int) and 0 <= i < len(SYNSETS) for i in row)]:
        raise DataError(f"{file}: {bad[0]} are no ImageNet classes 0 to 999; download ReaL's real.json again")
    kept = [(picture, row) for picture, row in zip(listing, rows, strict=True) if row]
    most = max((len(row) for _, row in kept), default=1)
    table = tensor([row + [NO_LABEL] * (most - len(row)) for _, row in kept])
    return [picture for picture, _ in kept], table


def conflict_targets(root: str, listing: Listing) -> tuple[Listing, Tensor]:
    """The cue-conflict pictures whose cues differ, and (shape, texture), int64 (N, 2), from names such as
    'cat/cat3-truck1.png' (Geirhos et al. 2019). Raises DataError for another name, or another folder than the shape's.
    """
    names, kept, rows = list(SIXTEEN), [], []
    for path, label in listing:
        found = re.fullmatch(r"([a-z]+)/([a-z]+)\d+-([a-z]+)\d+\.png", path)
        if not found or found[1] != found[2] or found[3] not in SIXTEEN:
            raise DataError(f"{root}/{path}: expected <shape>/<shape><i>-<texture><j>.png of the 16 classes")
        if found[2] != found[3]:
            kept.append((path, label))
            rows.append([label, names.index(found[3])])
    return kept, tensor(rows)


def read_conflicts(folder: Path, classes: Sequence[str]) -> tuple[Listing, Tensor]:
    """Pictures `<shape>-<texture>` or `<shape>-<texture>-*` of one's own classes, anywhere below `folder`: their
    listing, and int64 (N, 2), the classes that shape and texture belong to. A texture bears the name of its class, or,
    of the shapes that we draw, one of `generated.TEXTURES`.

    Pictures whose cues agree say nothing about the bias and are left out (Geirhos et al. 2019). Raises
    MissingInputError or DataError, naming the folder, or a picture that is named otherwise.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder of conflict pictures; leave the suite conflict out.")
    drawn = set(classes) == set(SHAPES)
    owner = dict(zip(TEXTURES, SHAPES, strict=True)) if drawn else {name: name for name in classes}
    number = {name: i for i, name in enumerate(classes)}
    listing, cues = [], []
    for path in walk_images(str(folder), {os.path.realpath(folder)}):
        shape, texture = _cues_in(path, classes, owner)
        told = number[shape], number[owner[texture]]
        if told[0] != told[1]:
            listing.append((os.path.relpath(path, folder), told[0]))
            cues.append(told)
    if not listing:
        raise DataError(f"{folder}: no picture named <shape>-<texture>-* of two classes; leave the suite conflict out.")
    return listing, tensor(cues)


def _cues_in(path: str, shapes: Iterable[str], textures: Iterable[str]) -> tuple[str, str]:
    """The shape and the texture that a picture is named by, which may hold hyphens themselves: of a texture that begins
    like another, the longer. Raises DataError, naming the picture, where no names of these fit, or several."""

    def begins(text: str, name: str) -> bool:
        return text == name or text.startswith(f"{name}-")

    stem = os.path.splitext(os.path.basename(path))[0]
    found = []
    for shape in (name for name in shapes if stem.startswith(f"{name}-")):
        fit = [name for name in textures if begins(stem[len(shape) + 1 :], name)]
        found += [(shape, max(fit, key=len))] if fit else []
    if len(found) == 1:
        return found[0]
    if found:
        told = " or ".join(f"the shape {shape!r} with the texture {texture!r}" for shape, texture in found)
        raise DataError(f"{path} may be {told}: rename it")
    some = [", ".join(list(names)[:10]) for names in (shapes, textures)]
    raise DataError(f"{path}: expected <shape>-<texture>-*, a shape such as {some[0]} and a texture such as {some[1]}")


class ObjectNet(NamedTuple):
    """ObjectNet's classes as ImageNet's."""

    labels: dict[str, int]
    """Each folder's class among the overlapping ones, or NO_CLASS."""
    members: dict[str, tuple[int, ...]]
    """The ImageNet classes that each overlapping class is."""

    def reading(self, restricted: bool) -> Reading:
        """objnet-113: only the logits of overlapping classes count (R50: 35.75 %); objnet-1000: all do (about 17 %)."""
        name = f"{OVERLAP_LOGITS} logits for {OVERLAP} classes" if restricted else f"1000 logits for {OVERLAP} classes"
        return reading(name, self.members, only_these=restricted)


def read_objectnet(folder: Path) -> ObjectNet:
    """From the four files that ObjectNet is published with, in its folder `mappings`. Raises MissingInputError,
    DataError."""
    names_of = _json(beside(folder, "folder_to_objectnet_label.json", "mappings"))
    imagenet_of = _json(beside(folder, "objectnet_to_imagenet_1k.json", "mappings"))
    line_of = _json(beside(folder, "pytorch_to_imagenet_2012_id.json", "mappings"))
    lines = beside(folder, "imagenet_to_label_2012_v2", "mappings").read_text().splitlines()
    try:
        class_of_line = {int(line): int(number) for number, line in line_of.items()}
        class_of = {text.strip(): class_of_line[line] for line, text in enumerate(lines) if text.strip()}
        members = {own: tuple(class_of[text] for text in texts.split("; ")) for own, texts in imagenet_of.items()}
        folder_of = {own: name for name, own in names_of.items()}
        members = {folder_of[own]: ids for own, ids in members.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}: ObjectNet's mapping files do not fit together at {error}; unpack them again"
        ) from error
    if (len(members), len({i for ids in members.values() for i in ids})) != (OVERLAP, OVERLAP_LOGITS):
        raise DataError(
            f"{folder}: the mapping files name other than {OVERLAP} classes ({OVERLAP_LOGITS} of ImageNet's)"
        )
    members = dict(sorted(members.items()))
    numbers = {name: number for number, name in enumerate(members)}
    return ObjectNet({name: numbers.get(name, NO_CLASS) for name in sorted(names_of)}, members)


def read_subset(file: Path, digest: str = SUBSET_DIGEST) -> set[str]:
    """The 'n01440764/ILSVRC2012_val_00000293.JPEG' of RobustBench's imagenet_test_image_ids.txt, 5,000 of them.

    Raises MissingInputError, and DataError for a file whose sha256 does not start with `digest`.
    """
    if not file.is_file():
        raise MissingInputError(f"{file} does not exist; it is robustbench/data/imagenet_test_image_ids.txt")
    content = file.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(digest):
        raise DataError(f"{file}: is not RobustBench's list of {SUBSET_IMAGES} pictures (sha256 {digest}...)")
    return {"/".join(line.split("/")[-2:]) for line in content.decode().split()}


def only_these(listing: Listing, wanted: set[str], root: str) -> Listing:
    """The pictures of a subset. Raises DataError for one that is not there."""
    if absent := sorted(wanted - {path for path, _ in listing}):
        raise DataError(f"{root}: {len(absent)} of the {len(wanted)} listed pictures are missing, first {absent[0]}")
    return [(path, label) for path, label in listing if path in wanted]
