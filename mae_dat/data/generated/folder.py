"""The generated pictures as an ordinary image folder, written whole or not at all and reused while it is what this code
draws."""

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
    """What defines a generated image folder: pictures a split, seed, agreement of the texture, side in pixels."""

    train: int = 4000
    val: int = 1000
    conflict: int = 1000
    silhouette: int = 500
    seed: int = 0
    rho: float = 0.9
    size: int = 64

    def as_json(self) -> dict[str, int | float]:
        """What settings.json holds: these settings and the version of the drawing."""
        return {**dataclasses.asdict(self), "rho": float(self.rho), "drawing_version": DRAWING_VERSION}

    def counts(self) -> dict[str, int]:
        """Pictures of each split that is not empty."""
        counts = {"train": self.train, "val": self.val, "conflict": self.conflict, "silhouette": self.silhouette}
        return {split: count for split, count in counts.items() if count > 0}


def generated_root(settings: FolderSettings | None = None) -> Path:
    """Where the pictures of these settings live: `generated-<hash>` in $MAE_DAT_HOME or else ~/.cache/mae_dat."""
    text = json.dumps((settings or FolderSettings()).as_json(), sort_keys=True)
    return home_folder() / f"generated-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write_image_folder(
    root: str | os.PathLike[str],
    train: int = FolderSettings.train,
    val: int = FolderSettings.val,
    conflict: int = FolderSettings.conflict,
    silhouette: int = FolderSettings.silhouette,
    seed: int = FolderSettings.seed,
    rho: float = FolderSettings.rho,
    size: int = FolderSettings.size,
) -> Path:
    """Write root/{train,val,conflict,silhouette}/<shape>/NNNNN.png and root/boxes.json (COCO, train and val).

    A complete copy with the same settings is reused. The folder appears whole or not at all: it is written beside
    itself and renamed. OutputError if `root` holds anything else or cannot be written.
    """
    root, settings = Path(root), FolderSettings(train, val, conflict, silhouette, seed, rho, size)
    if _is_complete(root, settings):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _sweep_stale(root)
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
    """Whether `root` holds exactly these pictures: False if it holds nothing, OutputError if something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{root} is there but holds no generated images; name a new or empty folder") from error
    wanted = settings.as_json()
    if found != wanted:
        keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        raise OutputError(f"{root} holds images generated with another {', '.join(keys)}; delete it or name a new one")
    for split, count in settings.counts().items():
        present = sum(1 for _ in (root / split).glob("*/*.png"))
        if present != count:
            raise OutputError(f"{root / split} has {present} of {count} pictures; delete {root} to write it anew")
    if settings.train and not _is_of_this_code(root, settings):
        raise OutputError(f"{root} was drawn by other code than this; delete it to write it anew")
    return True


def _is_of_this_code(root: Path, settings: FolderSettings) -> bool:
    with Image.open(root / "train" / SHAPES[0] / "00000.png") as first:
        return np.array_equal(
            np.asarray(first), draw_image(settings.seed, "train", 0, rho=settings.rho, size=settings.size).image
        )


def _sweep_stale(root: Path) -> None:
    """Remove what runs killed while writing `root` left behind."""
    for path in root.parent.glob(f".{root.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > 3600:  # younger ones may be in the making
            shutil.rmtree(path, ignore_errors=True)


def _write_splits(root: Path, settings: FolderSettings) -> None:
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(SHAPES)]
    coco: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": categories}
    for split, count in settings.counts().items():
        for name in SHAPES[:count]:
            (root / split / name).mkdir(parents=True)
        # conflict and silhouette pictures are variants of the val pictures, so that they compare one to one
        source, variant = (split, "iid") if split in ("train", "val") else ("val", split)
        for index in range(count):
            picture = draw_image(settings.seed, source, index, variant, settings.rho, settings.size)
            name = SHAPES[picture.shape]
            prefix = f"{name}-{TEXTURES[picture.texture]}-" if variant == "conflict" else ""
            file = f"{split}/{name}/{prefix}{index:05d}.png"
            Image.fromarray(picture.image).save(root / file, compress_level=3)
            if variant == "iid":
                _annotate(coco, file, picture)
    (root / "boxes.json").write_text(json.dumps(coco))
    (root / "settings.json").write_text(json.dumps(settings.as_json(), indent=2))


def _annotate(coco: dict[str, list[dict[str, object]]], file: str, picture: GeneratedImage) -> None:
    """Add one picture to a COCO dataset: its size, its class (ids from 1) and its box as (x, y, width, height)."""
    number = len(coco["images"]) + 1
    height, width = picture.mask.shape
    x0, y0, x1, y1 = picture.box
    coco["images"].append({"id": number, "file_name": file, "width": width, "height": height})
    where = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(picture.mask.sum()), "iscrowd": 0}
    coco["annotations"].append({"id": number, "image_id": number, "category_id": picture.shape + 1, **where})
