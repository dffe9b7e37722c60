"""Image sets and image folders.

What a sample looks like is a pure function of (seed, epoch, index), whatever the number of workers.
"""

import contextlib
import copy
import difflib
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.decode import decode_file, decode_pixels, read_bytes

log = logging.getLogger(__name__)

LAYOUT = "expected one folder per class: {root}/<class>/*.jpg"
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}

Transform = Callable[[Image.Image], Tensor]


class PixelTransform:
    """A transform that takes uint8 (H, W, 3) as well as pictures, and is spared the way through PIL."""

    def __call__(self, picture: Image.Image | np.ndarray) -> Tensor:
        """The sample's image."""
        raise NotImplementedError


class Sample(TypedDict):
    """`image` (3, H, W), float32 in [0, 1], or uint8 on its way to `as_float`; `label` -1 if unlabelled; `index` of the
    file; `skipped` 0 or 1."""

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


def as_float(image: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: 8-bit ones are divided by 255, others stay. Training pictures travel as 8 bits, a
    quarter of the memory, until they are on the device."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


# ---- folders ----


def visible_entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, without dot files: .ipynb_checkpoints is no class, ._x.jpg no picture."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error


def walk_images(folder: str, seen: set[str]) -> Iterator[str]:
    """Paths of all pictures below `folder`, sorted, without the folders in `seen` (real paths): links may loop."""
    for entry in visible_entries(folder):
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                yield from walk_images(entry.path, seen)
        elif entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
            yield entry.path


def _class_folders(root: str) -> tuple[dict[str, str], set[str]]:
    """Class names to paths, and the real paths that were seen. A link to a class that is there already is left out."""
    folders = [entry for entry in visible_entries(root) if entry.is_dir()]
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


def require_folder(root: str | os.PathLike[str]) -> None:
    """Raises MissingInputError, with what may have been meant, unless `root` is a folder."""
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
    require_folder(root)
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


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `length` samples in this epoch, int64 (length,), a pure function of its arguments."""
    value = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(value, "big") % 2**63)
    return torch.randperm(length, generator=generator)


class ImageSet(Dataset[Sample]):
    """Images wherever they lie: `ImageFolder`, or `Shards` of mae_dat/data/shards/reader.py.

    `classes` are the names of the labels. `on_bad="skip"` puts the next readable image in the place of a bad one and
    says so in `skipped`, so that an evaluation can leave it out; `max_skips` bad ones in a row (default: a tenth of the
    set, at least 10) are an error. Keys are an index, or (epoch, index), which sets the augmentation.
    """

    classes: list[str]
    packed_size: int | None = None
    """Shorter side in pixels that larger pictures were shrunk to when they were packed."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform,
        on_bad: str = "fail",
        seed: int = 0,
        max_skips: int | None = None,
    ) -> None:
        if on_bad not in ("fail", "skip"):
            raise ValueError(f"on_bad must be 'fail' or 'skip', not {on_bad!r}")
        require_folder(root)
        self.root, self.transform, self.on_bad, self.seed, self.max_skips = (
            str(root),
            transform,
            on_bad,
            seed,
            max_skips,
        )

    def __len__(self) -> int:
        raise NotImplementedError

    def load_image(self, index: int) -> Image.Image:
        """The decoded picture, RGB. Raises DataError, StorageError."""
        raise NotImplementedError

    def load_pixels(self, index: int) -> np.ndarray:
        """The pixels of `load_image`, uint8 (H, W, 3)."""
        return np.array(self.load_image(index))

    def label(self, index: int) -> int:
        """The number of its class; -1 if unlabelled."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """Where the picture is, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The same for the same images with the same labels in the same order, wherever they lie: a sha256 of names,
        not of their pixels."""
        raise NotImplementedError

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """The indices of an epoch, int64, in which global batches of `batch_size` are taken one after the other; a pure
        function of its arguments."""
        return epoch_order(len(self), seed, epoch)

    def with_transform(self, transform: Transform) -> Self:
        """The same images with another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def make_sample(self, picture: Any, index: int, skipped: int) -> Sample:
        """What becomes of a decoded picture (or of its pixels, for a `PixelTransform`), with the sample's own
        chance."""
        return Sample(image=self.transform(picture), label=self.label(index), index=index, skipped=skipped)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, start = key if isinstance(key, tuple) else (0, key)
        most = max(10, len(self) // 10) if self.max_skips is None else self.max_skips
        for tries in range(min(most + 1, len(self))):
            index = (start + tries) % len(self)
            try:
                fast = isinstance(self.transform, PixelTransform)
                picture = self.load_pixels(index) if fast else self.load_image(index)
            except DataError as error:
                if self.on_bad == "fail":
                    raise
                log.warning("skipped: %s", error)
                continue
            with _seeded(self.seed, epoch, start):
                return self.make_sample(picture, index, int(tries > 0))
        raise DataError(f"{self.root}: {tries + 1} bad images in a row, from {self.name_of(start)}; repair it")


class ImageFolder(ImageSet):
    """Images below `root`: root/<class>/** if `labelled`, any folder at all otherwise.

    `classes` fixes names and order of the labels, for instance those of the training set: a class without a folder here
    is fine, a folder beyond the list is not. The rest is said at `ImageSet`.
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
        super().__init__(root, transform, on_bad, seed, max_skips)
        self.classes = list(classes or [])
        if labelled:
            self.samples = self._labelled_samples()
        else:
            self.samples = [(path, -1) for path in walk_images(self.root, {os.path.realpath(self.root)})]
        if not self.samples:
            raise DataError(f"{root} holds no images ({', '.join(IMG_EXTENSIONS)}); check the path")

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
            samples += [(path, label) for path in walk_images(folder, seen)]
            if len(samples) == before:
                raise DataError(f"the class {folder} has no image; delete the folder or fill it; {layout}")
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def load_image(self, index: int) -> Image.Image:
        """As the base class."""
        return decode_file(self.samples[index][0])

    def load_pixels(self, index: int) -> np.ndarray:
        """As the base class."""
        path = self.samples[index][0]
        return decode_pixels(read_bytes(path), path)

    def label(self, index: int) -> int:
        """As the base class."""
        return self.samples[index][1]

    def fingerprint(self) -> str:
        """Of the paths below the root."""
        names = (f"{path.removeprefix(self.root)}\0{label}\0" for path, label in self.samples)
        return hashlib.sha256("".join(names).encode(errors="surrogateescape")).hexdigest()

    def name_of(self, index: int) -> str:
        """The path."""
        return self.samples[index][0]
