"""The images to predict, in order: from files, folders of any depth, shards, and memory.

Whatever is wrong with a path raises an error here, before anything is computed. An image that cannot be decoded is
found later, when it is read.
"""

import bisect
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import ConfigError, DataError, MissingInputError
from mae_dat.config.flags import expand_home
from mae_dat.config.groups import DEMO
from mae_dat.config.paths import require_folder
from mae_dat.data.decode import (
    decode_bytes,
    decode_file,
    decode_oriented,
    exif_orientation,
    orientation_of,
    to_rgb,
    turn_upright,
)
from mae_dat.data.folders import IMAGE_EXTENSIONS, IgnoredFiles, count_ignored, visible_entries
from mae_dat.data.open import image_root
from mae_dat.data.shards.cache import is_remote, remote_root
from mae_dat.data.shards.index import INDEX_FILE
from mae_dat.data.shards.reader import Shards

_ADVICE = "give files, folders or shards, such as `mae-dat predict --checkpoint OUT photo.jpg DIR`"


class ImagePart(Protocol):
    """A part of the images: files, shards, or images in memory."""

    def __len__(self) -> int: ...

    def load_image(self, index: int, upright: bool) -> Image.Image:
        """Return an image, 8-bit RGB, if `upright` turned by its EXIF orientation. Raises DataError, StorageError."""

    def image_name(self, index: int) -> str:
        """Return the image's name in the results."""


class InputImages:
    """Images by index, from one part after the other."""

    def __init__(
        self, parts: Sequence[ImagePart], paths: Sequence[str] = (), ignored_files: IgnoredFiles | None = None
    ) -> None:
        self.parts, self.paths = list(parts), list(paths)
        self.ignored_files = ignored_files or IgnoredFiles()
        """What lies in the folders `paths` and is not read."""
        self.upright = False
        """Whether images are turned upright by their EXIF orientation, as detectors see them."""
        self.starts = [0, *itertools.accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def load_image(self, index: int) -> Image.Image:
        """Decode an image as 8-bit RGB. Raises DataError, StorageError."""
        part, position = self._locate(index)
        return part.load_image(position, self.upright)

    def image_name(self, index: int) -> str:
        """Return the image's name in the results: its path as given, SHARD.tar/MEMBER, or `image N` in memory."""
        part, position = self._locate(index)
        return part.image_name(position)

    def files(self) -> Iterator[str]:
        """Yield the paths of all images that are files of their own."""
        for part in self.parts:
            if isinstance(part, ImageFiles):
                yield from part.paths

    def _locate(self, index: int) -> tuple[ImagePart, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return self.parts[number], index - self.starts[number]


class ImageFiles:
    """Image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int, upright: bool) -> Image.Image:
        """Decode a file as 8-bit RGB."""
        return turn_upright(*decode_oriented(self.paths[index])) if upright else decode_file(self.paths[index])

    def image_name(self, index: int) -> str:
        """Return the path."""
        return self.paths[index]


class ShardImages:
    """Images of a folder of shards, or of one of its shards."""

    def __init__(self, shards: Shards, indices: range | None = None) -> None:
        self.shards, self.indices = shards, range(len(shards)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int, upright: bool) -> Image.Image:
        """Decode a member as 8-bit RGB."""
        content, name = self.shards.read_file(self.indices[index])
        image = decode_bytes(content, name)
        return turn_upright(image, exif_orientation(content)) if upright else image

    def image_name(self, index: int) -> str:
        """Return SHARD.tar/MEMBER."""
        return self.shards.member_path(self.indices[index])


class MemoryImages:
    """Images in memory, converted to 8-bit RGB; of one that cannot be converted, the reason."""

    def __init__(self, images: Sequence[Any], first: int = 0) -> None:
        """`first` is the number of the first of them among all images in memory."""
        self.images = [_rgb_or_error(image) for image in images]
        self.orientations = [orientation_of(image) if isinstance(image, Image.Image) else 1 for image in images]
        self.first = first

    def __len__(self) -> int:
        return len(self.images)

    def load_image(self, index: int, upright: bool) -> Image.Image:
        """Return an image, 8-bit RGB."""
        image = self.images[index]
        if isinstance(image, DataError):
            raise image
        return turn_upright(image, self.orientations[index]) if upright else image

    def image_name(self, index: int) -> str:
        """Return `image N`."""
        return f"image {self.first + index}"


# ---- from arguments to parts ----


def open_inputs(images: Any) -> InputImages:
    """Open images: a path, a PIL image, an array, a tensor, or several of these in a list or another iterable.

    A path is an image file, a folder of any depth, a folder of shards or one shard, the address of shards, or `demo`.
    A path given twice is read once. Arrays are uint8, or float in [0, 1], of shape (H, W), (H, W, 3) or (B, H, W, 3);
    tensors (3, H, W) or (B, 3, H, W), with 1 channel for gray.

    Raises ConfigError for no images or another type, MissingInputError, DataError for a folder without images.
    """
    is_one = isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor)
    given = [images] if is_one or not isinstance(images, Iterable) else list(images)
    if not given:
        raise ConfigError(f"no images: {_ADVICE}.")
    parts: list[ImagePart] = []
    ignored_files = IgnoredFiles()
    in_memory = 0
    for image in given:
        if isinstance(image, str | os.PathLike):
            parts += _open_path(expand_home(image), ignored_files)
        else:
            memory = MemoryImages(_split_batch(image), in_memory)
            in_memory += len(memory)
            parts.append(memory)
    paths = [expand_home(image) for image in given if isinstance(image, str | os.PathLike)]
    opened = InputImages(_merge_files(parts), paths, ignored_files)
    if not len(opened):
        raise ConfigError(f"no images: {_ADVICE}.")
    return opened


def _merge_files(parts: Sequence[ImagePart]) -> list[ImagePart]:
    """Merge neighboring parts of files, and leave out files that came before."""
    merged: list[ImagePart] = []
    known: set[str] = set()
    for part in parts:
        if not isinstance(part, ImageFiles):
            merged.append(part)
            continue
        new = [path for path in dict.fromkeys(part.paths) if path not in known]
        known.update(new)
        if merged and isinstance(merged[-1], ImageFiles):
            merged[-1].paths += new
        else:
            merged.append(ImageFiles(new))
    return merged


def _open_path(path: str, ignored_files: IgnoredFiles) -> list[ImagePart]:
    if path == DEMO and not os.path.exists(path):
        path = str(image_root(DEMO) / "val")
    elif is_remote(path):
        path = str(remote_root(path))
    if os.path.isdir(path):
        return _open_folder(path, ignored_files)
    if not os.path.exists(path):
        require_folder(path)  # raises the error, with the folder that may have been meant
    if not path.lower().endswith(".tar"):
        return [ImageFiles([path])]
    folder, name = os.path.split(path)
    if not os.path.isfile(os.path.join(folder, INDEX_FILE)):
        raise MissingInputError(f"{path} is a shard without its index: mae-dat pack --index {folder or '.'}")
    shards = _open_shards(folder or ".")
    numbers = {shard.name: number for number, shard in enumerate(shards.index.shards)}
    if name not in numbers:
        raise DataError(
            f"{path} is not in the index of its folder; write it again: mae-dat pack --index {folder or '.'}"
        )
    start, stop = shards.starts[numbers[name] : numbers[name] + 2].tolist()
    return [ShardImages(shards, range(start, stop))]


def _open_shards(folder: str) -> Shards:
    return Shards(folder, _no_transform, labeled=False)


def _no_transform(image: Image.Image) -> Tensor:
    raise AssertionError("images are prepared by the model's own transform")


def _open_folder(root: str, ignored_files: IgnoredFiles) -> list[ImagePart]:
    """Return the images of a folder of any depth; add other files to `ignored_files`. Raises DataError if none is an
    image."""
    others = IgnoredFiles()
    parts = list(_walk(root, {os.path.realpath(root)}, others))
    if not parts:
        files = f", only other files: {others.describe(root)}" if others.counts else ""
        raise DataError(f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)}){files}; check the path")
    ignored_files.update(others)
    return parts


def _walk(folder: str, visited: set[str], others: IgnoredFiles) -> Iterator[ImagePart]:
    """Yield the images below a folder, sorted by folder and name; count other files in `others`.

    `visited` contains the real paths of the folders that were seen, because links may form loops.
    """
    if os.path.isfile(os.path.join(folder, INDEX_FILE)):
        yield ShardImages(_open_shards(folder))
        return
    files: list[str] = []
    shards = ""
    for entry in visible_entries(folder, others):
        extension = Path(entry.name).suffix.lower()
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in visited:
                visited.add(real)
                if files:
                    yield ImageFiles(files)
                    files = []
                yield from _walk(entry.path, visited, others)
        elif extension in IMAGE_EXTENSIONS:
            files.append(entry.path)
        else:
            count_ignored([entry], others)
            shards = entry.path if extension == ".tar" else shards
    if files:
        yield ImageFiles(files)
    elif shards:
        raise MissingInputError(f"{folder} contains shards without their index: mae-dat pack --index {folder}")


# ---- images in memory ----


def _split_batch(image: Any) -> list[Any]:
    """Return the single images of a PIL image, an array or a tensor. Raises ConfigError for anything else."""
    if isinstance(image, Image.Image):
        return [image]
    if isinstance(image, Tensor | np.ndarray):
        return [*image] if image.ndim == 4 else [image]
    raise ConfigError(
        f"images of type {type(image).__name__} are not supported: give paths, PIL images, arrays (H, W, 3) or tensors "
        "(3, H, W)."
    )


def _rgb_or_error(image: Any) -> Image.Image | DataError:
    """Convert an image in memory to 8-bit RGB; return the error for one that cannot be decoded.

    Raises ConfigError for a wrong shape, type or range: a mistake of the caller.
    """
    if not isinstance(image, Image.Image):
        return Image.fromarray(_to_uint8(image)).convert("RGB")
    try:
        return to_rgb(image)
    except DataError as error:
        return error
    except Exception as error:  # a lazily opened file is decoded here, and PIL raises nearly every type of exception
        return DataError(f"the image is damaged or truncated ({error})")


def _to_uint8(image: np.ndarray | Tensor) -> np.ndarray:
    """Return pixels as uint8 (H, W) or (H, W, 3). Raises ConfigError."""
    shape = tuple(image.shape)
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ConfigError(f"a tensor of shape {shape} is no image: give (3, H, W), or (1, H, W) for gray.")
        image = (image.float() if image.is_floating_point() else image).detach().cpu().permute(1, 2, 0).numpy()
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
        raise ConfigError(f"an array of shape {shape} is no image: give (H, W, 3), or (H, W) for gray.")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise ConfigError(f"pixels of type {image.dtype} are not supported: give uint8, or float in [0, 1].")
    if not (image.min() >= 0 and image.max() <= 1):  # NaN fails both
        raise ConfigError(f"float pixels must be in [0, 1], not {image.min():.4g} to {image.max():.4g}.")
    return np.ascontiguousarray(np.rint(image.astype(np.float32) * 255).astype(np.uint8))
