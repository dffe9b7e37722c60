"""Image sets in tar shards, read by their index, in an order that reads each shard once.

Each image is one read, so a run can resume in the middle of an epoch, and no archive is parsed during training.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import DataError, UserError
from mae_dat.data.class_names import check_known
from mae_dat.data.decode import decode_bytes, decode_pixels, image_error, with_retries
from mae_dat.data.image_set import ImageSet, Transform
from mae_dat.data.sampler import epoch_order
from mae_dat.data.shards.cache import download_shard, origin_of
from mae_dat.data.shards.index import BLOCK, INDEX_FILE, Shard, read_index
from mae_dat.runtime.inputs import count_of, describe_bytes

LANES = 64
_OPEN_FILES = 80  # more than there are lanes


# ---- the order of samples ----


def shard_order(images: Sequence[int], seed: int, epoch: int, batch_size: int) -> Tensor:
    """Return an epoch's indices over shards of `images[i]` images, int64 (N // batch_size * batch_size,).

    The shards, in random order and each in random order inside, form one row of images. The row is cut into equal
    pieces, the lanes (`count_lanes`), and every global batch takes equally many images of each lane, lane after lane. A
    rank's part of a global batch is contiguous, so ranks own whole lanes and read different shards, except that a shard
    at a cut is read from both sides. A batch's images do not depend on the number of ranks.
    """
    count = count_lanes(batch_size, len(images))
    starts = torch.tensor([0, *images]).cumsum(0)
    row = torch.cat(
        [
            starts[shard] + epoch_order(images[shard], seed, (epoch << 32) + shard)
            for shard in epoch_order(len(images), seed, epoch).tolist()
        ]
    )
    batches = len(row) // batch_size
    length = len(row) // count
    pieces = row[: length * count].view(count, length)[:, : batches * (batch_size // count)]
    return pieces.reshape(count, batches, -1).transpose(0, 1).reshape(-1)


def count_lanes(batch_size: int, shards: int) -> int:
    """Return from how many shards a global batch draws at a time.

    The largest power of two that divides the batch, up to 64 and to the number of shards.
    """
    count = 1
    while batch_size % (2 * count) == 0 and 2 * count <= min(LANES, shards):
        count *= 2
    return count


# ---- the images ----


class Shards(ImageSet):
    """The images of the tar shards in `root`, which also contains their index.

    `classes` fixes the names and order of the labels, as with `ImageFolder`; without `labeled` all labels are -1. Each
    process keeps some shards open. See `ImageSet` for the other arguments. Raises DataError, naming shard and member.
    """

    class_names_from = f"from {INDEX_FILE}"

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
        self.index = read_index(Path(root))
        self.packed_size = self.index.packed_size
        self.starts = torch.tensor([0, *(shard.images for shard in self.index.shards)]).cumsum(0)
        if len(self) == 0:
            raise DataError(f"{root}: the shards hold no images; check the path")
        self.classes = list(classes or self.index.classes or [])
        self.labels = self._labels() if labeled else torch.full((len(self),), -1)
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        """File descriptors of open shards by number, the most recently used last."""

    def _labels(self) -> Tensor:
        """Return the label of every image in the order of `classes`, int64 (N,)."""
        names = self.index.classes
        if names is None or bool((self.index.label < 0).any()):
            raise DataError(
                f"{self.root}: the shards contain images without a label (.cls, or `label` in .json): they can be used "
                "for pretraining only"
            )
        used = self.index.label.unique().tolist()
        check_known(self.root, [names[label] for label in used], self.classes, "training", "classes")
        numbers = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([numbers.get(name, -1) for name in names])[self.index.label]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """Return an epoch's order; see `shard_order`."""
        return shard_order([shard.images for shard in self.index.shards], seed, epoch, batch_size)

    def label(self, index: int) -> int:
        """Return the number of an image's class; -1 if unlabeled."""
        return int(self.labels[index])

    def class_counts(self) -> list[int]:
        """Return the number of images of every class, in the order of `classes`; empty if there are no labels."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=len(self.classes)).tolist()[: len(self.classes)]

    def describe_storage(self) -> str:
        """Return the number and size of the shards, and the size to which images were shrunk."""
        size = sum(shard.bytes for shard in self.index.shards)
        shrunk = f", shrunk to {self.packed_size} px" if self.packed_size else ""
        return f"{count_of(len(self.index.shards), 'shard')}, {describe_bytes(size)}{shrunk}"

    def load_image(self, index: int) -> Image.Image:
        """Decode an image, RGB. Raises DataError, DownloadError, StorageError."""
        return decode_bytes(*self.read_file(index))

    def load_pixels(self, index: int) -> np.ndarray:
        """Decode an image, uint8 (H, W, 3)."""
        return decode_pixels(*self.read_file(index))

    def fingerprint(self) -> str:
        """Return the hash of the index: names, sizes and sha256 of the shards, labels."""
        return self.index.sha256()

    def content_files(self) -> list[str]:
        """Return the paths of the shards; none for a cache of downloads, which are compared with their sha256."""
        root = Path(self.root)
        return [] if origin_of(root) else [str(root / shard.name) for shard in self.index.shards]

    def name_of(self, index: int, header: tarfile.TarInfo | None = None) -> str:
        """Return the shard's path and the member's name in it, for messages."""
        location, header = self._locate(index), header or self._header(index)
        member = f", member {header.name!r}" if header else ""
        return f"{location.path}{member} at byte {location.offset}"

    def member_path(self, index: int) -> str:
        """Return SHARD.tar/MEMBER, for tables; the position instead of the member if its header cannot be read."""
        location, header = self._locate(index), self._header(index)
        return f"{location.path}/{header.name}" if header else f"{location.path} at byte {location.offset}"

    def _header(self, index: int) -> tarfile.TarInfo | None:
        """Read the header of an image's member; None if that fails."""
        location = self._locate(index)
        try:
            header = self._read(location.shard, location.offset - BLOCK, BLOCK)
            return tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except (OSError, tarfile.HeaderError, UserError):
            return None

    def _locate(self, index: int) -> "_Location":
        shard = int(torch.searchsorted(self.starts, index, right=True)) - 1
        path = Path(self.root) / self.index.shards[shard].name
        return _Location(shard, path, int(self.index.offset[index]), int(self.index.size[index]))

    def read_file(self, index: int) -> tuple[bytes, str]:
        """Return the content of an image's file, and the image's name for messages."""
        shard, path, offset, size = self._locate(index)
        place = f"{path} at byte {offset}"
        try:
            # The member's header is read and checked too: the index of other shards would point at arbitrary bytes.
            content = with_retries(lambda: self._read(shard, offset - BLOCK, size + BLOCK), place)
            header = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "surrogateescape")
        except OSError as error:
            raise image_error(place, f"cannot be read ({error.strerror})") from error
        except tarfile.HeaderError as error:
            raise DataError(f"{place}: no member of the archive starts there; {self._advice()}") from error
        if header.size != size or len(content) != size + BLOCK:
            raise DataError(f"{place}: the member has {header.size} bytes, the index says {size}; {self._advice()}")
        return content[BLOCK:], self.name_of(index, header)

    def _advice(self) -> str:
        return f"fetch the shard again, or write the index again: mae-dat pack --index {self.root}"

    def _read(self, shard: int, offset: int, count: int) -> bytes:
        """Read bytes of a shard. Raises OSError, and DataError if the shard has another length than in the index."""
        if shard not in self._descriptors:
            self._descriptors[shard] = self._open_shard(self.index.shards[shard])
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        try:
            return os.pread(self._descriptors[shard], count, offset)
        except OSError:  # a stale handle stays stale
            os.close(self._descriptors.pop(shard))
            raise

    def _open_shard(self, shard: Shard) -> int:
        """Return a file descriptor of the shard, after downloading it if the folder is a cache."""
        path, origin = Path(self.root) / shard.name, origin_of(Path(self.root))
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except FileNotFoundError:
                if origin is None:
                    raise
                download_shard(origin, path, shard.bytes, shard.sha256)
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            os.close(descriptor)
            raise DataError(f"{path} has {size:,} bytes, the index says {shard.bytes:,}; {self._advice()}")
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}  # another process opens its own

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class _Location(NamedTuple):
    """Where an image's file lies: number and path of the shard, offset and size in bytes."""

    shard: int
    path: Path
    offset: int
    size: int
