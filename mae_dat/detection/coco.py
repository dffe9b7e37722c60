"""Pictures with boxes from COCO's JSON: at a fixed size, with flips and scale jitter that move the boxes along.

What a sample looks like is a pure function of (seed, epoch, index), as for classifiers. Boxes are (x0, y0, x1, y1) in
pixels of the picture that the network sees; labels count from 1, since 0 is torchvision's background.
"""

import copy
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.config.groups import ImageSize
from mae_dat.data.decode import decode_file
from mae_dat.data.folders import SPLIT_NAMES, require_folder
from mae_dat.data.image_set import Batch, ImageSet, Sample
from mae_dat.data.sampler import evenly_spaced
from mae_dat.robustness.corruptions import corrupt, image_seed

logger = logging.getLogger(__name__)

PADDING_LABEL = -1  # label of the rows that fill a batch up
OVERHANG = 1.0  # pixels that a box may leave its picture by: COCO's own do, by rounding


class BoxSample(Sample):
    """Also `boxes` float32 (M, 4), `labels` int64 (M,), PADDING beyond the picture's own, and `crowd` bool (M,). M is
    the most boxes that any picture of the set has."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor


class BoxBatch(Batch):
    """A `BoxSample` with a leading batch dimension."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor


class CocoSplit(NamedTuple):
    """Where a split lies: its JSON, the folder that its file names are relative to, and what these start with."""

    annotations: Path
    folder: Path
    prefix: str = ""


@dataclass(frozen=True)
class Scene:
    """A picture's file, its (height, width) by the JSON, and its boxes (N, 4), labels (N,) and crowd flags (N,)."""

    path: str
    size: ImageSize
    boxes: Tensor
    labels: Tensor
    crowd: Tensor


# ---- from COCO's JSON to scenes ----


def find_annotations(root: str | os.PathLike[str], split: str) -> CocoSplit:
    """The JSON of a split, "train" or "val", below `root`, in one of the usual layouts. Raises MissingInputError."""
    require_folder(root)
    root = Path(root)
    for name in (split, *SPLIT_NAMES[split], *(["valid"] if split == "val" else [])):
        for found in (
            CocoSplit(root / "annotations" / f"{name}.json", root / name),
            CocoSplit(root / "annotations" / f"instances_{name}2017.json", root / f"{name}2017"),
            CocoSplit(root / name / "_annotations.coco.json", root / name),
            CocoSplit(root / "boxes.json", root, f"{name}/"),
        ):
            if found.annotations.is_file():
                return found
    raise MissingInputError(
        f"{root} has no boxes for {split}: expected {root}/annotations/{split}.json (COCO's format) with pictures in "
        f"{root}/{split}, or COCO's, Roboflow's or the generated folder's own names."
    )


def read_scenes(split: CocoSplit, classes: Sequence[str] = (), skip: bool = False) -> tuple[list[Scene], list[str]]:
    """The scenes of a split and its class names, in the order of their ids, or as `classes` gives them.

    Raises DataError for what cannot be trained on: broken JSON, a missing picture, a box that is degenerate or leaves
    its picture, an unknown category or picture, no box at all. With `skip` such pictures and boxes are left out, and
    told.
    """
    path = split.annotations
    try:
        content = json.loads(path.read_bytes())
        pictures = [entry for entry in content["images"] if entry["file_name"].startswith(split.prefix)]
        names = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda one: one["id"])}
        problems = _Problems(path, skip)
        labels = _labels_of(names, classes, problems)
        rows: dict[Any, list[tuple[list[float], int, bool]]] = {entry["id"]: [] for entry in pictures}
        elsewhere = {entry["id"] for entry in content["images"]} - rows.keys()
        sizes = {entry["id"]: (int(entry["height"]), int(entry["width"])) for entry in pictures}
        for entry in content["annotations"]:
            if entry["image_id"] in elsewhere:
                continue
            if problem := _problem(entry, sizes, labels):
                problems.add(problem)
                continue
            row = _inside(entry["bbox"], sizes[entry["image_id"]])
            rows[entry["image_id"]].append((row, labels[entry["category_id"]], bool(entry.get("iscrowd", 0))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is no COCO file: {what}; expected images, annotations and categories.") from error
    scenes = []
    for entry in pictures:
        file = split.folder / entry["file_name"]
        if file.is_file():
            scenes.append(_scene(str(file), sizes[entry["id"]], rows[entry["id"]]))
        else:
            problems.add(f"the picture {file} does not exist")
    problems.tell()
    if not any(len(scene.boxes) for scene in scenes):
        raise DataError(f"{path} has no box to learn from or to measure with ({len(scenes)} pictures); check the file.")
    return scenes, list(classes or names.values())


class _Problems:
    """What is wrong with a file: an error, or left out and counted."""

    def __init__(self, path: Path, skip: bool) -> None:
        self.path, self.skip = path, skip
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        if not self.skip:
            raise DataError(f"{self.path}: {problem}; repair the file, or leave such entries out with --on_bad skip.")
        self.found.append(problem)

    def tell(self) -> None:
        if self.found:
            count, first = len(self.found), self.found[0]
            logger.warning("%s: %d entries left out (--on_bad skip); the first: %s", self.path, count, first)


def _labels_of(names: Mapping[Any, str], classes: Sequence[str], problems: _Problems) -> dict[Any, int]:
    """Category id -> label. Ids need not be contiguous; what counts is the name's place in `classes`."""
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise DataError(f"{problems.path} names the category {twice[0]!r} twice; give each a name of its own.")
    known = list(classes or names.values())
    for name in set(names.values()) - set(known):
        problems.add(f"the category {name!r} is unknown to training, which has {', '.join(known)}")
    return {number: known.index(name) + 1 for number, name in names.items() if name in known}


def _problem(entry: Mapping[str, Any], sizes: Mapping[Any, ImageSize], labels: Mapping[Any, int]) -> str | None:
    """What is wrong with an annotation, in words, or None."""
    who, box = f"annotation {entry.get('id')}", entry["bbox"]
    if entry["image_id"] not in sizes:
        return f"{who} is of picture {entry['image_id']}, which is not listed"
    if entry["category_id"] not in labels:
        return f"{who} has the unknown category {entry['category_id']}"
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        return f"{who} has the box {box}, not (x, y, width, height)"
    (height, width), (x, y, across, down) = sizes[entry["image_id"]], box
    if across <= 0 or down <= 0:
        return f"{who} has the box {box}, of no area"
    if x < -OVERHANG or y < -OVERHANG or x + across > width + OVERHANG or y + down > height + OVERHANG:
        return f"{who} has the box {box} outside of its picture of {width} x {height} pixels"
    row = _inside(box, sizes[entry["image_id"]])
    return None if row[2] > row[0] and row[3] > row[1] else f"{who} has the box {box}, beside its picture"


def _inside(box: Sequence[float], size: ImageSize) -> list[float]:
    """(x, y, width, height) -> (x0, y0, x1, y1) within the picture."""
    (x, y, across, down), (height, width) = box, size
    return [max(x, 0.0), max(y, 0.0), min(x + across, float(width)), min(y + down, float(height))]


def _scene(path: str, size: ImageSize, rows: list[tuple[list[float], int, bool]]) -> Scene:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4)
    labels, crowd = torch.tensor([row[1:] for row in rows], dtype=torch.int64).view(-1, 2).unbind(1)
    return Scene(path, size, boxes, labels, crowd.bool())


# ---- what the network sees ----


class BoxTransform:
    """A picture and its boxes at the size of the network: fitted in whole, centred, black around.

    In training (`scale`: the range of the jitter, such as (0.5, 2.0)) first flipped by chance, scaled and cropped; a
    box of which less than a pixel is left is gone.
    """

    def __init__(self, size: ImageSize, scale: tuple[float, float] | None = None) -> None:
        self.size, self.scale = size, scale

    def __call__(self, picture: Image.Image, scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
        """float32 (3, H, W) in [0, 1], and the boxes, labels and crowd flags that are left."""
        (height, width), factor = scene.size, 1.0
        boxes: Tensor = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=scene.size)
        truth = {"boxes": boxes, "labels": scene.labels, "crowd": scene.crowd}
        image: Tensor = v2.functional.to_image(picture)
        if self.scale:
            image, truth = v2.RandomHorizontalFlip()(image, truth)
            factor = float(torch.empty(()).uniform_(*self.scale))
        factor *= min(self.size[0] / height, self.size[1] / width)
        scaled = [max(1, round(side * factor)) for side in (height, width)]
        # torchvision's ScaleJitter would do, if it did not take the height for the width.
        image, truth = v2.Resize(scaled, antialias=True)(image, truth)
        crop = v2.RandomCrop(self.size, pad_if_needed=True) if self.scale else v2.CenterCrop(self.size)
        image, truth = crop(image, truth)
        image, truth = v2.SanitizeBoundingBoxes(labels_getter=lambda pair: (pair[1]["labels"], pair[1]["crowd"]))(
            image, truth
        )
        return v2.functional.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), truth


class CocoImages(ImageSet):
    """Pictures with boxes; `classes[label - 1]` is a label's name. Raises what `read_scenes` does.

    `corrupted` gives the same pictures as a corruption leaves them, at their own size, before they are fitted.
    """

    corruption: tuple[str, int] | None = None

    def __init__(
        self, split: CocoSplit, view: BoxTransform, classes: Sequence[str] = (), on_bad: str = "fail", seed: int = 0
    ) -> None:
        super().__init__(split.folder, v2.functional.to_image, on_bad, seed)
        self.view = view  # in the place of the transform, which knows no boxes
        self.scenes, self.classes = read_scenes(split, classes, skip=on_bad == "skip")
        self.most = max(len(scene.boxes) for scene in self.scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def load_image(self, index: int) -> Image.Image:
        """As the base class; DataError also where its size is not what the JSON says, for then the boxes are wrong."""
        scene = self.scenes[index]
        picture = decode_file(scene.path)
        if picture.size != scene.size[::-1]:
            raise DataError(f"{scene.path} has {picture.size} pixels, its JSON says {scene.size[::-1]}; repair one.")
        if self.corruption is None:
            return picture
        name, severity = self.corruption
        seed = image_seed(self.seed, index, name, severity)
        return Image.fromarray(corrupt(np.asarray(picture), name, severity, seed))

    def label(self, index: int) -> int:
        """A picture as a whole has none."""
        return PADDING_LABEL

    def name_of(self, index: int) -> str:
        """The path."""
        return self.scenes[index].path

    def fingerprint(self) -> str:
        """Of names, boxes and labels."""
        rows = (f"{Path(one.path).name}\0{one.boxes.tolist()}\0{one.labels.tolist()}\0" for one in self.scenes)
        return hashlib.sha256("".join(rows).encode(errors="surrogateescape")).hexdigest()

    def corrupted(self, name: str, severity: int) -> Self:
        """The same pictures under a corruption; its chance depends on (seed, index, name, severity) alone."""
        other = copy.copy(self)
        other.corruption = (name, severity)
        return other

    def limited(self, count: int | None) -> Self:
        """`count` of the pictures, evenly spread; all if None."""
        other = copy.copy(self)
        other.scenes = [self.scenes[index] for index in evenly_spaced(len(self), count or len(self))]
        return other

    def make_sample(self, picture: Image.Image, index: int, skipped: int) -> BoxSample:
        """As the base class, with the boxes."""
        image, truth = self.view(picture, self.scenes[index])
        missing = self.most - len(truth["labels"])
        return BoxSample(
            image=image,
            label=PADDING_LABEL,
            index=index,
            skipped=skipped,
            boxes=torch.cat([truth["boxes"].as_subclass(Tensor), torch.zeros(missing, 4)]),
            labels=torch.cat([truth["labels"], torch.full((missing,), PADDING_LABEL)]),
            crowd=torch.cat([truth["crowd"], torch.zeros(missing, dtype=torch.bool)]),
        )
