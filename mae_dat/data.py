"""Image folders and decoding.

What a sample looks like is a pure function of (seed, epoch, index), whatever the number of workers.
EXIF orientation is ignored, in training as in evaluation: the convention of ImageNet.
"""

import contextlib
import difflib
import hashlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.errors import DataError, MissingInputError

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
LAYOUT = "expected one folder per class: {root}/<class>/*.jpg"
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}

Transform = Callable[[Image.Image], Tensor]
Size = tuple[int, int]  # height, width


class Sample(TypedDict):
    """`image` float32 (3, H, W) in [0, 1]; `label` -1 if unlabelled; `index` of the file; `skipped` 0 or 1."""

    image: Tensor
    label: int
    index: int
    skipped: int


class Batch(TypedDict):
    """A `Sample` with a leading batch dimension; the numbers are int64 of shape (B,)."""

    image: Tensor
    label: Tensor
    index: Tensor
    skipped: Tensor


# ---- decoding ----


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in `path` as 8-bit RGB.

    Grey, 1-bit, palette, CMYK and YCbCr are converted; transparency is laid onto white; 16-bit grey is divided by 257.
    DataError naming the file for anything else: float, 32-bit or animated pictures, more than 100 megapixels (seen in
    the header, nothing is decoded), damaged files and files that are no pictures.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd but harmless metadata, one for each image and epoch
            with Image.open(path) as image:
                return _to_rgb(image)
    except Exception as error:  # PIL's decoders raise nearly every type of exception on damaged files
        raise DataError(f"{path}: {_cause(path, error)}; delete or replace it, or pass --on_bad skip") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than the {MAX_PIXELS // 10**6} megapixels allowed")
    # a phone's multi-picture JPEG is no animation: its first frame is the photo
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"it is animated or has several pages ({getattr(image, 'n_frames', 'many')} frames)")
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode not in {"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBA", "RGBa", "LA", "La", "PA"}:
        raise DataError(f'pixels of the mode "{image.mode}" are not supported, only 8-bit colour and 8- or 16-bit grey')
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB through numpy, because PIL's own conversion saturates at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("it is 32-bit grey, with values beyond 0 to 65535")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")


def _cause(path: str | os.PathLike[str], error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MAX_PIXELS // 10**6} megapixels allowed"
    try:
        with open(path, "rb") as file:
            head = file.read(256).lstrip()
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    if not head:
        return "the file is empty"
    if head.startswith(b"<"):
        return "it is a web page or XML, not a picture"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture that can be read"
    return f"the picture is damaged or truncated ({error})"


# ---- folders ----


def _visible(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, without dot files: .ipynb_checkpoints is no class, ._x.jpg no picture."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Paths of all pictures below `folder`, sorted, without the folders in `seen` (real paths): links may loop."""
    for entry in _visible(folder):
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                yield from _walk(entry.path, seen)
        elif entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
            yield entry.path


def _class_folders(root: str) -> tuple[dict[str, str], set[str]]:
    """Class names to paths, and the real paths that were seen. A link to a class that is there already is left out."""
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    found: dict[str, str] = {}
    seen = {os.path.realpath(root)}
    for entry in sorted(folders, key=lambda entry: entry.is_symlink()):  # a link must not take a real folder's place
        real = os.path.realpath(entry.path)
        if real in seen:
            log.warning("%s is a link to a folder that is read already; it is no class of its own", entry.path)
            continue
        seen.add(real)
        found[entry.name] = entry.path
    return dict(sorted(found.items())), seen


def _require_folder(root: str | os.PathLike[str]) -> None:
    path = Path(root)
    if path.is_dir():
        return
    if path.exists():
        raise MissingInputError(f"{root} is a file, not a folder; name the folder that holds the images")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings)
    hint = f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else "check the path"
    raise MissingInputError(f"{root} does not exist; {hint}")


def find_split(
    root: str | os.PathLike[str], split: str, labelled: bool = True, names: Sequence[str] | None = None
) -> Path:
    """The folder of a split, "train" or "val", below `root`; for val also validation or test, or the `names` given.

    Without split folders the whole of `root` serves as unlabelled training data (pretraining); otherwise
    MissingInputError.
    """
    _require_folder(root)
    wanted = tuple(names) if names else SPLIT_NAMES[split]
    for name in wanted:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    if split == "train" and not labelled:
        return Path(root)
    raise MissingInputError(
        f"{root} has no folder {' or '.join(wanted)}; expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg"
    )


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Global random states that depend on these numbers alone; the states from before come back afterwards.

    timm draws from `random` and numpy, torchvision from torch. Only torch's CPU generator is touched: a manual_seed
    of a worker would queue one for CUDA each time.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest(), "big")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value % 2**63)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ImageFolder(Dataset[Sample]):
    """Images below `root`: root/<class>/** if `labelled`, any folder at all otherwise.

    `classes` fixes names and order of the labels, for instance those of the training set: a class without a folder here
    is fine, a folder beyond the list is not. `on_bad="skip"` puts the next readable image in the place of a bad one and
    says so in `skipped`, so that an evaluation can leave it out; `max_skips` bad ones in a row (default: a tenth of the
    folder, at least 10) are an error. Keys are an index, or (epoch, index), which sets the augmentation.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform,
        classes: Sequence[str] | None = None,
        on_bad: str = "fail",
        labelled: bool = True,
        seed: int = 0,
        max_skips: int | None = None,
    ) -> None:
        if on_bad not in ("fail", "skip"):
            raise ValueError(f"on_bad must be 'fail' or 'skip', not {on_bad!r}")
        _require_folder(root)
        self.root, self.transform, self.on_bad, self.seed = str(root), transform, on_bad, seed
        self.classes: list[str] = list(classes or [])
        if labelled:
            self.samples = self._labelled_samples()
        else:
            self.samples = [(path, -1) for path in _walk(self.root, {os.path.realpath(self.root)})]
        if not self.samples:
            raise DataError(f"{root} holds no images ({', '.join(IMG_EXTENSIONS)}); check the path")
        self.max_skips = max(10, len(self.samples) // 10) if max_skips is None else max_skips

    def _labelled_samples(self) -> list[tuple[str, int]]:
        found, seen = _class_folders(self.root)
        layout = LAYOUT.format(root=self.root)
        if not found:
            raise DataError(f"{self.root} has no class folders; {layout}")
        self.classes = self.classes or list(found)
        if unknown := [name for name in found if name not in self.classes]:
            raise DataError(f"{self.root} has class folders unknown to training: {', '.join(unknown[:5])}; {layout}")
        samples: list[tuple[str, int]] = []
        for name, folder in found.items():
            label, before = self.classes.index(name), len(samples)
            samples += [(path, label) for path in _walk(folder, seen)]
            if len(samples) == before:
                raise DataError(f"the class {folder} has no image; delete the folder or fill it; {layout}")
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, start = key if isinstance(key, tuple) else (0, key)
        for tries in range(min(self.max_skips + 1, len(self))):
            index = (start + tries) % len(self)
            path, label = self.samples[index]
            try:
                picture = decode(path)
            except DataError as error:
                if self.on_bad == "fail":
                    raise
                log.warning("skipped: %s", error)
                continue
            with _seeded(self.seed, epoch, start):
                image = self.transform(picture)
            return Sample(image=image, label=label, index=index, skipped=int(tries > 0))
        raise DataError(f"{self.root}: {tries + 1} bad images in a row, from {self.samples[start][0]}; repair it")
