"""The generated images as an ordinary image folder: written completely or not at all, and reused while it is valid."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dat.config.errors import OutputError
from mae_dat.data.generated.draw import DRAWING_VERSION, SHAPES, TEXTURES, GeneratedImage, draw_image
from mae_dat.storage.files import home_folder


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """What defines a generated image folder: images per split, seed, agreement of the texture, side in pixels."""

    train: int = 4000
    val: int = 1000
    conflict: int = 1000
    silhouette: int = 500
    seed: int = 0
    rho: float = 0.9
    size: int = 64

    def as_json(self) -> dict[str, int | float]:
        """Return the content of settings.json: these settings and the version of the drawing."""
        return {**dataclasses.asdict(self), "rho": float(self.rho), "drawing_version": DRAWING_VERSION}

    def counts(self) -> dict[str, int]:
        """Return the number of images of each split that is not empty."""
        counts = {split: getattr(self, split) for split in ("train", "val", "conflict", "silhouette")}
        return {split: count for split, count in counts.items() if count > 0}


def generated_root(settings: FolderSettings | None = None) -> Path:
    """Return the folder for these settings: `generated-<hash>` in $MAE_DAT_HOME or else ~/.cache/mae_dat."""
    text = json.dumps((settings or FolderSettings()).as_json(), sort_keys=True)
    return home_folder() / f"generated-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write_image_folder(root: str | os.PathLike[str], settings: FolderSettings | None = None) -> Path:
    """Write root/{train,val,conflict,silhouette}/<shape>/NNNNN.png and root/boxes.json (COCO, train and val).

    A complete copy with the same settings is reused. The folder appears only when it is complete: it is written under
    another name next to `root` and renamed. Raises OutputError if `root` holds anything else or cannot be written.
    """
    root, settings = Path(root), settings or FolderSettings()
    if _is_complete(root, settings):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(root)
        staging = root.parent / f".{root.name}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            _write_splits(staging, settings)
            staging.rename(root)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if _is_complete(root, settings):  # another process was faster
            return root
        raise OutputError(f"cannot write the generated images to {root}: {error}; choose a writable folder") from error
    return root


def _is_complete(root: Path, settings: FolderSettings) -> bool:
    """Return whether `root` holds exactly these images: False if it is empty, OutputError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        stored = json.loads((root / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{root} is there but holds no generated images; name a new or empty folder") from error
    expected = settings.as_json()
    if stored != expected:
        keys = [key for key in expected if not isinstance(stored, dict) or stored.get(key) != expected[key]]
        raise OutputError(f"{root} holds images generated with another {', '.join(keys)}; delete it or name a new one")
    for split, count in settings.counts().items():
        present = sum(1 for _ in (root / split).glob("*/*.png"))
        if present != count:
            raise OutputError(f"{root / split} has {present} of {count} images; delete {root} to write it anew")
    if settings.train and not _is_of_this_code(root, settings):
        raise OutputError(f"{root} was drawn by other code than this; delete it to write it anew")
    return True


def _is_of_this_code(root: Path, settings: FolderSettings) -> bool:
    """Return whether the first training image is what this code draws."""
    expected = draw_image(settings.seed, "train", 0, rho=settings.rho, size=settings.size).image
    with Image.open(root / "train" / SHAPES[0] / "00000.png") as first:
        return np.array_equal(np.asarray(first), expected)


def _delete_abandoned(root: Path) -> None:
    """Delete what killed runs left behind while they wrote `root`."""
    for path in root.parent.glob(f".{root.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > 3600:  # another process may still be writing a younger one
            shutil.rmtree(path, ignore_errors=True)


def _write_splits(root: Path, settings: FolderSettings) -> None:
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(SHAPES)]
    coco: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": categories}
    for split, count in settings.counts().items():
        for name in SHAPES[:count]:
            (root / split / name).mkdir(parents=True)
        # Conflict and silhouette images are variants of the val images, so that they compare one to one.
        source, variant = (split, "iid") if split in ("train", "val") else ("val", split)
        for index in range(count):
            generated = draw_image(settings.seed, source, index, variant=variant, rho=settings.rho, size=settings.size)
            name = SHAPES[generated.shape]
            prefix = f"{name}-{TEXTURES[generated.texture]}-" if variant == "conflict" else ""
            file = f"{split}/{name}/{prefix}{index:05d}.png"
            Image.fromarray(generated.image).save(root / file, compress_level=3)
            if variant == "iid":
                _annotate(coco, file, generated)
    (root / "boxes.json").write_text(json.dumps(coco))
    (root / "settings.json").write_text(json.dumps(settings.as_json(), indent=2))


def _annotate(coco: dict[str, list[dict[str, object]]], file: str, generated: GeneratedImage) -> None:
    """Add one image to a COCO dataset: its size, its class (ids from 1) and its box as (x, y, width, height)."""
    number = len(coco["images"]) + 1
    height, width = generated.mask.shape
    x0, y0, x1, y1 = generated.box
    coco["images"].append({"id": number, "file_name": file, "width": width, "height": height})
    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(generated.mask.sum()), "iscrowd": 0}
    coco["annotations"].append({"id": number, "image_id": number, "category_id": generated.shape + 1, **box})
