"""From what a user names to images: a path, an address of shards, the environment's default, or `demo` for the
generated pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

from mae_dat.config.errors import MissingInputError
from mae_dat.config.groups import data_root
from mae_dat.data.generated.folder import default_root, write_image_folder
from mae_dat.data.image_set import ImageFolder, ImageSet, Transform
from mae_dat.data.shards.cache import is_remote, remote_root
from mae_dat.data.shards.index import INDEX
from mae_dat.data.shards.reader import Shards

DEMO = "demo"


def image_root(data_path: str | None) -> Path:
    """The root folder of images; `demo` draws the generated ones first, once; for an address of shards, the folder that
    stands for it. Raises ConfigError when nothing is named, DownloadError."""
    root = data_root(data_path)
    if is_remote(root):
        return remote_root(root)
    return write_image_folder(default_root()) if root == DEMO else Path(root)


def open_images(
    root: str | os.PathLike[str],
    transform: Transform,
    classes: Sequence[str] | None = None,
    on_bad: str = "fail",
    labelled: bool = True,
    seed: int = 0,
) -> ImageSet:
    """The images of one split: `Shards` where the folder holds some, else an `ImageFolder`. Raises what these raise."""
    if (Path(root) / INDEX).is_file():
        return Shards(root, transform, classes, on_bad, labelled, seed)
    if holds_shards(root):
        raise MissingInputError(f"{root} holds shards without their index: python -m mae_dat.pack --index {root}")
    return ImageFolder(root, transform, classes, on_bad, labelled, seed)


def holds_shards(root: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of shards, with their index or without."""
    return (Path(root) / INDEX).is_file() or any(Path(root).glob("*.tar"))
