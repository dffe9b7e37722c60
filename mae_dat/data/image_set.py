"""Image sets: samples by index from a folder of images.

A sample is a pure function of (seed, epoch, index), whatever the number of workers. Image sets in shards are in
shards/reader.py; open.py chooses between the two.
"""

import contextlib
import copy
import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.paths import require_folder
from mae_dat.data.bands import load_bands
from mae_dat.data.class_names import check_known, warn_of_near_duplicates
from mae_dat.data.decode import decode_file, decode_pixels, read_bytes
from mae_dat.data.folders import IMAGE_EXTENSIONS, IgnoredFiles, class_folders, walk_images
from mae_dat.data.sampler import balanced_order, epoch_order

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Tensor]
"""Maps a decoded image to a sample's tensor."""


class PixelTransform:
    """A transform that also takes pixels, uint8 (H, W, C), which saves the conversion to a PIL image."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return the sample's image."""
        raise NotImplementedError


class Sample(TypedDict):
    """One image with its label.

    `image` (3, H, W) is float32 in [0, 1], or uint8 until `as_float`. `label` is -1 if unlabeled, `index` that of the
    file, `skipped` 1 if this image replaces an unreadable one, else 0.
    """

    image: Tensor
    label: int
    index: int
    skipped: int


class Batch(TypedDict):
    """Samples with a leading batch dimension: `image` (B, 3, H, W); the other fields int64 (B,)."""

    image: Tensor
    label: Tensor
    index: Tensor
    skipped: Tensor


def as_float(image: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]: 8-bit ones are divided by 255, others stay.

    Training images stay 8-bit until they are on the device, at a quarter of the memory.
    """
    return image.float() / 255 if image.dtype == torch.uint8 else image


def random_states() -> tuple[Any, Any, Tensor]:
    """Return the states of the global random generators of Python, NumPy and torch on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_states(states: tuple[Any, Any, Tensor]) -> None:
    """Set the states that `random_states` has returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed the global random states by these numbers alone inside the block, and restore them afterwards.

    timm draws from `random` and numpy, torchvision from torch. Only torch's CPU generator is touched:
    `torch.manual_seed` in a worker would queue a seed for CUDA each time.
    """
    states = random_states()
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest(), "big")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value % 2**63)
    try:
        yield
    finally:
        set_random_states(states)


class ImageSet(Dataset[Sample]):
    """Images by index, in a folder (`ImageFolder`) or in shards (`Shards`).

    `classes` are the names of the labels. A key is an index, or (epoch, index), which seeds the augmentation.

    `on_bad="skip"` replaces an unreadable image by the next readable one and marks the sample as `skipped`, so that an
    evaluation can ignore it. `max_skips` unreadable images in a row (default: a tenth of the set, at least 10) are
    allowed; one more raises DataError.
    """

    classes: list[str]
    class_names_from: str = "folder names, sorted"
    """Where the names of the classes and their order come from, unless they are given."""
    channels: int | None = None
    """Channels to decode without conversion of colors (`decode_bands`); None for RGB."""
    is_balanced = False
    """Whether an epoch has as many images of each class (`balanced_order`)."""
    packed_size: int | None = None
    """Shorter side in pixels to which larger images were shrunk when they were packed into shards."""

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
        self.root, self.transform = str(root), transform
        self.on_bad, self.seed, self.max_skips = on_bad, seed, max_skips
        self.ignored_files = IgnoredFiles()
        """What lies in the folder and is not read."""

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int, epoch: int) -> Any:
        """Decode what the transform takes: a PIL image, pixels for a `PixelTransform`, or `channels` other than colors.

        Every epoch has the same images here; subclasses may choose by the epoch. Raises DataError, StorageError.
        """
        if self.channels:
            return self.load_bands(index, self.channels)
        return self.load_pixels(index) if isinstance(self.transform, PixelTransform) else self.load_image(index)

    def load_image(self, index: int) -> Image.Image:
        """Decode an image, RGB. Raises DataError, StorageError."""
        raise NotImplementedError

    def load_pixels(self, index: int) -> np.ndarray:
        """Decode an image to the pixels of `load_image`, uint8 (H, W, 3)."""
        return np.array(self.load_image(index))

    def load_bands(self, index: int, channels: int) -> np.ndarray:
        """Decode an image to its own channels, uint8 (H, W, channels). Raises ConfigError if that is not supported."""
        raise ConfigError(f"--in_chans {channels}: {self.root} holds color images: use a folder of image files.")

    def label(self, index: int) -> int:
        """Return the number of an image's class; -1 if unlabeled."""
        raise NotImplementedError

    def class_counts(self) -> list[int]:
        """Return the number of images of every class, in the order of `classes`; empty if there are no labels."""
        counts = [0] * len(self.classes)
        for index in range(len(self) if counts else 0):
            if (label := self.label(index)) >= 0:
                counts[label] += 1
        return counts

    def describe_storage(self) -> str:
        """Return how the images are stored, if they are not single files."""
        return ""

    def read_folders(self) -> list[str]:
        """Return the folders that it reads, for a summary of what is not read."""
        return [self.root]

    def name_of(self, index: int) -> str:
        """Return where an image is, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a sha256 of the images' names, labels and order, but not of their pixels or of the root's path."""
        raise NotImplementedError

    def content_files(self) -> list[str]:
        """Return the paths of the files that hold the images, in order.

        Files whose content is verified elsewhere are left out.
        """
        return [self.name_of(index) for index in range(len(self))]

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """Return the order of an epoch's samples as indices, int64, a pure function of its arguments.

        Consecutive `batch_size` indices form a global batch.
        """
        return epoch_order(len(self), seed, epoch)

    def epoch_order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """Return `order`, or with `is_balanced` indices that have as many of each class."""
        if not self.is_balanced:
            return self.order(seed, epoch, batch_size)
        return balanced_order(torch.tensor([self.label(index) for index in range(len(self))]), seed, epoch)

    def with_transform(self, transform: Transform) -> Self:
        """Return the same images with another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def make_sample(self, image: Any, index: int, skipped: int) -> Sample:
        """Transform a decoded image (or its pixels, for a `PixelTransform`) to a sample."""
        return Sample(image=self.transform(image), label=self.label(index), index=index, skipped=skipped)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, start = key if isinstance(key, tuple) else (0, key)
        max_skips = max(10, len(self) // 10) if self.max_skips is None else self.max_skips
        for skips in range(min(max_skips + 1, len(self))):
            index = (start + skips) % len(self)
            try:
                image = self.load(index, epoch)
            except DataError as error:
                if self.on_bad == "fail":
                    raise
                logger.warning("skipped: %s", error)
                continue
            # Seeded by the requested index, so a replacement is augmented as the unreadable image would have been.
            with seeded(self.seed, epoch, start):
                return self.make_sample(image, index, int(skips > 0))
        raise DataError(
            f"{self.root}: {skips + 1} unreadable images in a row, starting at {self.name_of(start)}; check the folder "
            "with mae-dat scan"
        )


class ImageFolder(ImageSet):
    """Images below `root`: root/<class>/** if `labeled`, any folder otherwise.

    `classes` fixes the names and order of the labels, for instance to those of the training set: a class without a
    folder here is accepted, a folder that is not in the list is an error. See `ImageSet` for the other arguments.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform,
        classes: Sequence[str] | None = None,
        on_bad: str = "fail",
        labeled: bool = True,
        seed: int = 0,
        max_skips: int | None = None,
    ) -> None:
        super().__init__(root, transform, on_bad=on_bad, seed=seed, max_skips=max_skips)
        self.classes = list(classes or [])
        if labeled:
            self.samples = self._labeled_samples()
        else:
            visited = {os.path.realpath(self.root)}
            self.samples = [(path, -1) for path in walk_images(self.root, visited, self.ignored_files)]
        if dangling := self.ignored_files.dangling:
            logger.warning(
                "%s: %d links lead nowhere and are left out, first %s; is a disk not mounted?",
                self.root,
                len(dangling),
                dangling[0],
            )
        if not self.samples:
            raise DataError(
                f"{root} contains no images ({', '.join(IMAGE_EXTENSIONS)}){self._other_contents()}; check the path"
            )

    def _other_contents(self) -> str:
        """Return what was found instead of images, for messages."""
        text = self.ignored_files.describe(self.root)
        return f", but other files: {text}" if text else ""

    def _labeled_samples(self) -> list[tuple[str, int]]:
        """Return path and label of every image. Sets `classes` if they are not given."""
        folders, visited = class_folders(self.root, self.ignored_files)
        layout = f"expected one folder per class: {self.root}/<class>/*.jpg"
        if not folders:
            raise DataError(f"{self.root} has no class folders; {layout}")
        if lost := [path for path in self.ignored_files.dangling if not os.path.splitext(path)[1]]:
            raise DataError(
                f"the class {lost[0]} is a link to a folder that does not exist; mount it, or delete the link"
            )
        self.classes = self.classes or list(folders)
        check_known(self.root, folders, self.classes, "training")
        warn_of_near_duplicates(self.root, list(folders))
        samples: list[tuple[str, int]] = []
        for name, folder in folders.items():
            label = self.classes.index(name)
            other_files = IgnoredFiles()
            paths = list(walk_images(folder, visited, other_files))
            self.ignored_files.update(other_files)
            if not paths:
                files = f" but {other_files.describe(folder)}" if other_files.counts else ""
                raise DataError(f"the class {folder} has no image{files}; delete the folder or fill it; {layout}")
            samples += [(path, label) for path in paths]
        return samples

    def __len__(self) -> int:
        return len(self.samples)

    def load_image(self, index: int) -> Image.Image:
        """Decode an image file, RGB. Raises DataError, StorageError."""
        return decode_file(self.samples[index][0])

    def load_pixels(self, index: int) -> np.ndarray:
        """Decode an image file, uint8 (H, W, 3)."""
        path = self.samples[index][0]
        return decode_pixels(read_bytes(path), path)

    def load_bands(self, index: int, channels: int) -> np.ndarray:
        """Decode an image file to its own channels, uint8 (H, W, channels). Raises DataError, StorageError."""
        return load_bands(self.samples[index][0], channels)

    def label(self, index: int) -> int:
        """Return the number of an image's class; -1 if unlabeled."""
        return self.samples[index][1]

    def class_counts(self) -> list[int]:
        """Return the number of images of every class, in the order of `classes`; empty if there are no labels."""
        counts = Counter(label for _, label in self.samples)
        return [counts[number] for number in range(len(self.classes))]

    def fingerprint(self) -> str:
        """Return a sha256 of the paths below the root, with their labels."""
        names = (f"{path.removeprefix(self.root)}\0{label}\0" for path, label in self.samples)
        return hashlib.sha256("".join(names).encode(errors="surrogateescape")).hexdigest()

    def name_of(self, index: int) -> str:
        """Return the path."""
        return self.samples[index][0]
