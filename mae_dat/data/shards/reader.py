"""Images in tar shards, by their index: the order that reads them shard by shard, and the data set.

Any picture is one read, so a run resumes in the middle of an epoch, and no archive is parsed while training.
"""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import DataError, UserError
from mae_dat.data.decode import ADVICE, decode_bytes, decode_pixels, with_retries
from mae_dat.data.image_set import ImageSet, Transform
from mae_dat.data.sampler import epoch_order
from mae_dat.data.shards.cache import download_shard, origin_of
from mae_dat.data.shards.index import BLOCK, Shard, read_index

LANES = 64
_OPEN_FILES = 80  # more than there are lanes


# ---- the order of samples ----


def count_lanes(batch_size: int, shards: int) -> int:
    """How many shards a global batch draws from at a time: the largest power of two that divides the batch, up to 64
    and to the number of shards."""
    count = 1
    while batch_size % (2 * count) == 0 and 2 * count <= min(LANES, shards):
        count *= 2
    return count


def shard_order(images: Sequence[int], seed: int, epoch: int, batch_size: int) -> Tensor:
    """The indices of an epoch over shards of so many images each, int64 (N // batch_size * batch_size,).

    Shards in random order, with a random order inside each, make one row of images; it is cut into `count_lanes` equal
    pieces, and every global batch takes equally many images of each lane, lane after lane. A rank's part of a global
    batch is contiguous, so ranks own whole lanes: they read different shards (but for those at a cut, of which each
    side reads its part), and a batch's images do not depend on the number of ranks.
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


# ---- the pictures ----


class Shards(ImageSet):
    """The images of the tar shards in `root`, which holds their index.

    `classes` fixes names and order of the labels, as with `ImageFolder`; without `labelled` all labels are -1. Each
    process keeps some shards open. The rest is said at `ImageSet`. Raises DataError naming shard and member.
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
        self.index = read_index(Path(root))
        self.packed_size = self.index.packed_size
        self.starts = torch.tensor([0, *(shard.images for shard in self.index.shards)]).cumsum(0)
        if len(self) == 0:
            raise DataError(f"{root}: the shards hold no images; check the path")
        self.classes = list(classes or self.index.classes or [])
        self.labels = self._labels() if labelled else torch.full((len(self),), -1)
        self._open: OrderedDict[int, int] = OrderedDict()

    def _labels(self) -> Tensor:
        names = self.index.classes
        if names is None or bool((self.index.label < 0).any()):
            raise DataError(
                f"{self.root}: the shards hold images without a label (.cls, or `label` in .json): they serve for "
                "pretraining only"
            )
        used = self.index.label.unique().tolist()
        if unknown := [names[label] for label in used if names[label] not in self.classes]:
            raise DataError(f"{self.root} has classes unknown to training: {', '.join(unknown[:5])}")
        place = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([place.get(name, -1) for name in names])[self.index.label]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """As `shard_order`."""
        return shard_order([shard.images for shard in self.index.shards], seed, epoch, batch_size)

    def shard_of(self, index: int) -> int:
        """The number of the shard that holds an image."""
        return int(torch.searchsorted(self.starts, index, right=True)) - 1

    def label(self, index: int) -> int:
        """As the base class."""
        return int(self.labels[index])

    def load_image(self, index: int) -> Image.Image:
        """As the base class."""
        return decode_bytes(*self._file(index))

    def load_pixels(self, index: int) -> np.ndarray:
        """As the base class."""
        return decode_pixels(*self._file(index))

    def _file(self, index: int) -> tuple[bytes, str]:
        """A picture's file, and where it is."""
        number, offset, size = self.shard_of(index), int(self.index.offset[index]), int(self.index.size[index])
        place = f"{Path(self.root) / self.index.shards[number].name} at byte {offset}"
        try:
            # The member's header lies before it, and must be there: an index of other shards would give any bytes.
            read = with_retries(lambda: self._read(number, offset - BLOCK, size + BLOCK), place)
            header = tarfile.TarInfo.frombuf(read[:BLOCK], "utf-8", "surrogateescape")
        except OSError as error:
            raise DataError(f"{place}: cannot be read ({error.strerror}); {ADVICE}") from error
        except tarfile.HeaderError as error:
            raise DataError(f"{place}: no member of the archive begins there; {self._advice()}") from error
        if header.size != size or len(read) != size + BLOCK:
            raise DataError(f"{place}: the member has {header.size} bytes, the index says {size}; {self._advice()}")
        return read[BLOCK:], self.name_of(index, header)

    def fingerprint(self) -> str:
        """Of the index: names, sizes and sha256 of the shards."""
        return self.index.sha256()

    def name_of(self, index: int, header: tarfile.TarInfo | None = None) -> str:
        """The shard's path and the member's name in it."""
        number, offset = self.shard_of(index), int(self.index.offset[index])
        path = Path(self.root) / self.index.shards[number].name
        try:
            header = header or tarfile.TarInfo.frombuf(self._read(number, offset - BLOCK, BLOCK), "utf-8", "replace")
            return f"{path}, member {header.name!r} at byte {offset}"
        except (OSError, tarfile.HeaderError, UserError):
            return f"{path} at byte {offset}"

    def _advice(self) -> str:
        return f"fetch the shard again, or write the index anew: python -m mae_dat pack --index {self.root}"

    def _read(self, number: int, offset: int, count: int) -> bytes:
        """Bytes of a shard. Raises OSError, and DataError if the shard is not of the length that the index tells."""
        if number not in self._open:
            self._open[number] = self._open_shard(self.index.shards[number])
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        try:
            return os.pread(self._open[number], count, offset)
        except OSError:  # a stale handle stays stale
            os.close(self._open.pop(number))
            raise

    def _open_shard(self, shard: Shard) -> int:
        path, origin = Path(self.root) / shard.name, origin_of(Path(self.root))
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except FileNotFoundError:
                if origin is None:
                    raise
                download_shard(origin, path, shard.bytes, shard.sha256)
        if (found := os.fstat(descriptor).st_size) != shard.bytes:
            os.close(descriptor)
            raise DataError(f"{path} has {found:,} bytes, the index says {shard.bytes:,}; {self._advice()}")
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
