"""Images with boxes from COCO's JSON, at a fixed size, with flips and scale jitter of images and boxes.

A sample is a pure function of (seed, epoch, index), as for classifiers. Boxes are (x0, y0, x1, y1) in pixels of the
image that the detector sees; labels start at 1, since 0 is torchvision's background.
"""

import copy
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.config.groups import ImageSize
from mae_dat.config.paths import require_folder
from mae_dat.data.class_names import describe_difference
from mae_dat.data.folders import SPLIT_NAMES, IgnoredFiles
from mae_dat.data.image_set import Batch, ImageSet, Sample
from mae_dat.data.sampler import evenly_spaced
from mae_dat.detection.annotation_checks import (
    Problems,
    annotation_problem,
    clip_box,
    decode_upright,
    images_of_other_size,
    is_crowd,
    usable_images,
)
from mae_dat.robustness.corruptions import corrupt_image, image_seed
from mae_dat.runtime.inputs import count_of
from mae_dat.storage.json_files import read_json

logger = logging.getLogger(__name__)

_MAX_JSON = 1 << 31  # bytes; that of COCO's training images has 448 MB
PADDING_LABEL = -1  # label of the rows that pad the boxes of an image to the largest number of the set


class BoxSample(Sample):
    """A sample with `boxes` float32 (M, 4), `labels` int64 (M,) and `crowd` bool (M,).

    M is the largest number of boxes of any image of the set; rows beyond the image's own have PADDING_LABEL.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor


class BoxBatch(Batch):
    """A `BoxSample` with a leading batch dimension."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor


class CocoSplit(NamedTuple):
    """The files of a split: its JSON, the folder that file names are relative to, and the prefix of its file names."""

    annotations: Path
    folder: Path
    prefix: str = ""


@dataclass(frozen=True)
class Scene:
    """An image's file, its (height, width) by the JSON, and its boxes (N, 4), labels (N,) and crowd flags (N,)."""

    path: str
    size: ImageSize
    boxes: Tensor
    labels: Tensor
    crowd: Tensor


# ---- from COCO's JSON to scenes ----


class _CocoImage(TypedDict):
    id: int | str
    file_name: str


class _CocoCategory(TypedDict):
    id: int | str
    name: str


class _CocoFile(TypedDict):
    """What a COCO file must have. Sizes and annotations are checked one by one, because they may be skipped."""

    images: list[_CocoImage]
    annotations: list[dict[str, Any]]
    categories: list[_CocoCategory]


def find_annotations(root: str | os.PathLike[str], split: str) -> CocoSplit:
    """Find the JSON of a split, "train" or "val", below `root`, in one of the usual layouts. Raises
    MissingInputError."""
    require_folder(root)
    root = Path(root)
    spellings = [spelling for name in SPLIT_NAMES[split] for spelling in (name, name.capitalize())]
    for name in spellings:
        for candidate in (
            CocoSplit(root / "annotations" / f"{name}.json", root / name),
            CocoSplit(root / "annotations" / f"instances_{name}2017.json", root / f"{name}2017"),
            CocoSplit(root / name / "_annotations.coco.json", root / name),
            CocoSplit(root / "boxes.json", root, f"{name}/"),
        ):
            if candidate.annotations.is_file():
                if split == "val" and name.lower() == "test":
                    logger.warning("%s has no split val or valid: its split %s serves as validation.", root, name)
                return candidate
    raise MissingInputError(
        f"{root} has no boxes for {split}: expected {root}/annotations/{split}.json (COCO's format) with images in "
        f"{root}/{split}, or the file names of COCO, of Roboflow or of the generated folder."
    )


def read_scenes(
    split: CocoSplit, classes: Sequence[str] = (), skip: bool = False, ignored_files: IgnoredFiles | None = None
) -> tuple[list[Scene], list[str]]:
    """Read the scenes of a split and its class names, in the order of their ids, or as `classes` gives them.

    Raises DataError for invalid JSON, a missing image, an image without size or id of its own or of another size, a
    box that is relative, without area or outside of its image, an unknown category or image, or no box that is not a
    crowd. With `skip`, such images and boxes are skipped, logged and counted in `ignored_files`.
    """
    path, problems = split.annotations, Problems(split.annotations, skip)
    try:
        content = read_json(path, _CocoFile, "a COCO file", DataError, _MAX_JSON)
        entries = [entry for entry in content["images"] if entry["file_name"].startswith(split.prefix)]
        every_id = {entry["id"] for entry in content["images"]}
        entries = usable_images(entries, problems)
        sizes = {entry["id"]: (int(entry["height"]), int(entry["width"])) for entry in entries}
        names = {entry["id"]: entry["name"] for entry in sorted(content["categories"], key=lambda entry: entry["id"])}
        labels = _labels_by_category(names, classes, problems)
        rows = _boxes_by_image(content, sizes, labels, problems, every_id - sizes.keys())
    except (ValueError, TypeError, OverflowError) as error:  # such as ids of different types, which have no order
        raise DataError(f"{path} is not a COCO file: {error}.") from error
    scenes = []
    for entry in entries:
        file = split.folder / entry["file_name"]
        if os.path.isfile(file):  # unlike Path.is_file also for names that no file can have
            scenes.append(_make_scene(str(file), sizes[entry["id"]], rows[entry["id"]]))
        else:
            problems.add(f"the image {file} does not exist")
    different = images_of_other_size([(scene.path, scene.size) for scene in scenes], problems)
    scenes = [scene for scene in scenes if scene.path not in different]
    problems.log()
    if problems.messages and ignored_files is not None:
        ignored_files.add("entries of the JSON", problems.messages[0], len(problems.messages))
    if not any(len(scene.boxes) for scene in scenes):
        raise DataError(f"{path} has no usable box ({count_of(len(scenes), 'image')}): check the file.")
    if all(bool(scene.crowd.all()) for scene in scenes):
        raise DataError(
            f"{path} has no usable box: all {sum(len(scene.boxes) for scene in scenes)} are crowds (iscrowd 1), which "
            "are neither trained on nor measured; if they are single objects, set iscrowd to 0."
        )
    return scenes, list(classes or names.values())


def _labels_by_category(names: Mapping[Any, str], classes: Sequence[str], problems: Problems) -> dict[Any, int]:
    """Map category ids to labels. Ids need not be contiguous: a label is the position of the name in `classes`."""
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise DataError(f"{problems.path} has two categories {twice[0]!r}: give each its own name.")
    classes = list(classes or names.values())
    for name in set(names.values()) - set(classes):
        near = [
            f"; {other!r} differs only in {text}" for other in classes if (text := describe_difference(name, other))
        ]
        problems.add(f"the category {name!r} is not one of the training's, {', '.join(classes)}{''.join(near)}")
    return {number: classes.index(name) + 1 for number, name in names.items() if name in classes}


_BoxRow = tuple[list[float], int, bool]
"""A box, its label, and whether it is a crowd."""


def _boxes_by_image(
    content: Mapping[str, Any],
    sizes: Mapping[Any, ImageSize],
    labels: Mapping[Any, int],
    problems: Problems,
    others: set[Any],
) -> dict[Any, list[_BoxRow]]:
    """Collect the boxes of every image in `sizes`; those of `others`, of other splits or skipped, are ignored."""
    rows: dict[Any, list[_BoxRow]] = {number: [] for number in sizes}
    for entry in content["annotations"]:
        if isinstance(number := entry.get("image_id"), int | str) and number in others:
            continue
        if problem := annotation_problem(entry, sizes, labels):
            problems.add(problem)
            continue
        box = clip_box(entry["bbox"], sizes[entry["image_id"]])
        rows[entry["image_id"]].append((box, labels[entry["category_id"]], is_crowd(entry)))
    return rows


def _make_scene(path: str, size: ImageSize, rows: list[_BoxRow]) -> Scene:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4)
    labels, crowd = torch.tensor([row[1:] for row in rows], dtype=torch.int64).view(-1, 2).unbind(1)
    return Scene(path=path, size=size, boxes=boxes, labels=labels, crowd=crowd.bool())


# ---- from scenes to the input of the detector ----


class BoxTransform:
    """Fit an image and its boxes into the size of the detector: the whole image, centered, with black borders.

    For training (`scale`: the range of the jitter, such as (0.5, 2.0)) the image is first flipped at random, scaled and
    cropped; boxes smaller than a pixel afterwards are removed.
    """

    def __init__(self, size: ImageSize, scale: tuple[float, float] | None = None) -> None:
        self.size, self.scale = size, scale

    def __call__(self, image: Image.Image, scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, float32 (3, H, W) in [0, 1], and the remaining boxes, labels and crowd flags."""
        factor = 1.0
        boxes: Tensor = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=scene.size)
        truth = {"boxes": boxes, "labels": scene.labels, "crowd": scene.crowd}
        pixels: Tensor = v2.functional.to_image(image)
        if self.scale:
            pixels, truth = v2.RandomHorizontalFlip()(pixels, truth)
            factor = float(torch.empty(()).uniform_(*self.scale))
        # torchvision's ScaleJitter is not used, because it swaps height and width.
        pixels, truth = v2.Resize(self._scaled_size(scene.size, factor), antialias=True)(pixels, truth)
        crop = v2.RandomCrop(self.size, pad_if_needed=True) if self.scale else v2.CenterCrop(self.size)
        pixels, truth = crop(pixels, truth)
        sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda pair: (pair[1]["labels"], pair[1]["crowd"]))
        pixels, truth = sanitize(pixels, truth)
        return v2.functional.to_dtype(pixels, torch.float32, scale=True).as_subclass(Tensor), truth

    def _scaled_size(self, size: ImageSize, factor: float = 1.0) -> list[int]:
        """Return height and width of an image of this size, fitted into that of the detector, times `factor`."""
        factor *= min(self.size[0] / size[0], self.size[1] / size[1])
        return [max(1, round(side * factor)) for side in size]

    def original_boxes(self, boxes: Tensor, size: ImageSize) -> Tensor:
        """Convert boxes (N, 4) in pixels of the transformed image to pixels of the image of (height, width) `size`.

        They are clipped to the image. Only for a transform without `scale`.
        """
        (height, width), (scaled_H, scaled_W) = size, self._scaled_size(size)
        left, top = (self.size[1] - scaled_W) // 2, (self.size[0] - scaled_H) // 2
        offset = boxes.new_tensor([left, top, left, top])
        stretch = boxes.new_tensor([width / scaled_W, height / scaled_H] * 2)
        limit = boxes.new_tensor([width, height] * 2)
        return ((boxes - offset) * stretch).clamp(min=0).minimum(limit)


class CocoImages(ImageSet):
    """Images with boxes; `classes[label - 1]` is the name of a label. Raises the errors of `read_scenes`.

    `corrupted` returns the same images under a corruption, which is applied at their original size, before the
    transform.
    """

    corruption: tuple[str, int] | None = None

    def __init__(
        self,
        split: CocoSplit,
        box_transform: BoxTransform,
        classes: Sequence[str] = (),
        on_bad: str = "fail",
        seed: int = 0,
    ) -> None:
        super().__init__(split.folder, v2.functional.to_image, on_bad, seed)
        self.box_transform = box_transform  # instead of the transform of image sets without boxes
        self.annotations = split.annotations
        self.scenes, self.classes = read_scenes(split, classes, on_bad == "skip", self.ignored_files)
        self.max_boxes = max(len(scene.boxes) for scene in self.scenes)

    def __len__(self) -> int:
        return len(self.scenes)

    def load_image(self, index: int) -> Image.Image:
        """Load an image as the base class does, turned upright by its EXIF orientation if its JSON has that size.

        Also raises DataError if its size differs from the one in the JSON, because then the boxes are wrong.
        """
        scene = self.scenes[index]
        image = decode_upright(scene.path, scene.size)
        if self.corruption is None:
            return image
        name, severity = self.corruption
        seed = image_seed(self.seed, index, name, severity)
        return Image.fromarray(corrupt_image(np.asarray(image), name, severity, seed))

    def label(self, index: int) -> int:
        """Return PADDING_LABEL: an image as a whole has no label."""
        return PADDING_LABEL

    def class_counts(self) -> list[int]:
        """Return the number of boxes of every class, in the order of `classes`."""
        labels = torch.cat([scene.labels for scene in self.scenes])
        return torch.bincount(labels, minlength=len(self.classes) + 1)[1:].tolist()

    def read_folders(self) -> list[str]:
        """Return the folders of the images and of the JSON."""
        return [self.root, str(self.annotations.parent)]

    def name_of(self, index: int) -> str:
        """Return the path of an image."""
        return self.scenes[index].path

    def fingerprint(self) -> str:
        """Return the sha256 of the file names, boxes and labels."""
        rows = (f"{Path(scene.path).name}\0{scene.boxes.tolist()}\0{scene.labels.tolist()}\0" for scene in self.scenes)
        return hashlib.sha256("".join(rows).encode(errors="surrogateescape")).hexdigest()

    def corrupted(self, name: str, severity: int) -> Self:
        """Return the same images under a corruption; its randomness depends on (seed, index, name, severity) only."""
        other = copy.copy(self)
        other.corruption = (name, severity)
        return other

    def limited(self, count: int | None) -> Self:
        """Return `count` of the images, evenly spread; all if None."""
        other = copy.copy(self)
        other.scenes = [self.scenes[index] for index in evenly_spaced(len(self), count or len(self))]
        return other

    def make_sample(self, image: Image.Image, index: int, skipped: int) -> BoxSample:
        """Make a sample as the base class does, with the boxes, padded to `max_boxes` rows."""
        pixels, truth = self.box_transform(image, self.scenes[index])
        padding = self.max_boxes - len(truth["labels"])
        return BoxSample(
            image=pixels,
            label=PADDING_LABEL,
            index=index,
            skipped=skipped,
            boxes=torch.cat([truth["boxes"].as_subclass(Tensor), torch.zeros(padding, 4)]),
            labels=torch.cat([truth["labels"], torch.full((padding,), PADDING_LABEL)]),
            crowd=torch.cat([truth["crowd"], torch.zeros(padding, dtype=torch.bool)]),
        )
