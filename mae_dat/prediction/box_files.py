"""The files of a detector beside the tables: boxes as COCO JSON, and images with drawn boxes."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torchvision.utils import draw_bounding_boxes

from mae_dat.detection.box_gallery import BOX_COLORS
from mae_dat.prediction.predictions import ImageBoxes
from mae_dat.storage.files import atomic_write

DRAWN_FOLDER = "images"
_DARK_TEXT = ("#e69f00", "#56b4e9", "#f0e442", "#009e73", "#cc79a7")  # colors on which black is easier to read
_SIDES = (640, 1600)  # range in pixels of the longer side of a drawn image
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


class CocoResults:
    """Boxes in COCO's format: detections.json for `loadRes` of pycocotools, and images.json with the images and the
    categories that it refers to."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
        self.images: list[dict[str, Any]] = []
        self.detections: list[dict[str, Any]] = []

    def add(self, name: str, found: ImageBoxes) -> None:
        """Add the boxes of an image. Its id is its number among all inputs, from 1."""
        image_id, (height, width) = found.number + 1, found.size
        self.images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for box, label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True):
            x, y, right, bottom = (round(value, 2) for value in box)
            self.detections.append(
                {
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x, y, round(right - x, 2), round(bottom - y, 2)],
                    "score": round(score, 6),
                }
            )

    def write(self, folder: Path) -> None:
        """Write both files, atomically. Raises StorageError."""
        dataset = {"images": self.images, "annotations": [], "categories": self.categories}
        for name, content in (("images.json", dataset), ("detections.json", self.detections)):
            with atomic_write(folder / name) as file:
                file.write(json.dumps(content).encode() + b"\n")


class BoxDrawer:
    """Draws boxes on images and writes them as JPEG, one file for each image, named like it."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self.names: set[str] = set()

    def draw(self, name: str, image: Image.Image, found: ImageBoxes) -> Path:
        """Draw the boxes of one image, 8-bit RGB, and return the path of the file. Raises StorageError."""
        path = self.folder / self._unused_name(name)
        self.folder.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        draw_found(image, found, self.classes).save(buffer, "JPEG", quality=90)
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
        return path

    def _unused_name(self, name: str) -> str:
        stem = Path(name).stem.encode(errors="replace").decode()[:200]
        unused, count = f"{stem}.jpg", 1
        while unused.lower() in self.names:
            count += 1
            unused = f"{stem}-{count}.jpg"
        self.names.add(unused.lower())
        return unused


def draw_found(image: Image.Image, found: ImageBoxes, classes: Sequence[str]) -> Image.Image:
    """Draw boxes with class and score on an 8-bit RGB image, resized so that its longer side is 640 to 1600 pixels.

    The box of the highest score is drawn last.
    """
    longer = max(image.size)
    scale = min(max(longer, _SIDES[0]), _SIDES[1]) / longer
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = image.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else image
    if not len(found.labels):
        return canvas
    labels, scores = found.labels[::-1].tolist(), found.scores[::-1].tolist()
    colors = [BOX_COLORS[label % len(BOX_COLORS)] for label in labels]
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    drawn = draw_bounding_boxes(
        pixels,
        torch.from_numpy(found.boxes[::-1].copy()) * scale,
        [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        colors,
        width=max(2, max(width, height) // 320),
        font=str(_FONT),
        font_size=max(12, max(width, height) // 50),
        label_colors=["black" if color in _DARK_TEXT else "white" for color in colors],
        fill_labels=True,
    )
    return Image.fromarray(drawn.permute(1, 2, 0).numpy())
