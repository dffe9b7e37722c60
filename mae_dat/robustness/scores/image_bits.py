"""One bit for each image of a cell, as text in results.json and in the cache, and what the predictions of a cell were.

The text is `1:` and, in base64, the zlib-compressed bits of the images in the order of their folder; 1 is the version.
50,000 images take 8 kB or less.
"""

import base64
import binascii
import functools
import zlib
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
_PREFIX = "1:"


class MostPredicted(TypedDict):
    """The class that a model predicted most often, over the images of a cell."""

    name: str
    images: int
    """Images with this prediction."""
    others: int
    """Images of other classes."""
    of_others: int
    """Those of them with this prediction."""


class CellImages(TypedDict):
    """What one model predicted for each image of a cell."""

    order: str
    """Hash of the names of the images in their order: the bits of two cells belong to the same images if it agrees."""
    correct: str
    """A bit for each image: whether the prediction was correct."""
    texture: NotRequired[str]
    """Cue conflict: whether it was the texture's class."""
    predicted: NotRequired[str]
    """The predicted class of each image (`predictions.unpack_predictions`); absent in results of older releases and for
    attacks on visual words."""
    most_predicted: NotRequired[MostPredicted]
    """Absent for attacks on visual words, which count hits alone."""


def pack_bits(bits: Bits) -> str:
    """Return bits (N,) as text."""
    return _PREFIX + base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


@functools.lru_cache(maxsize=4096)
def unpack_bits(text: str, count: int) -> Bits | None:
    """Return the bits (N,) of `count` images; None for a text of another version or length, or a damaged one."""
    if not text.startswith(_PREFIX):
        return None
    size = -(-count // 8)
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text[len(_PREFIX) :], validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error):
        return None
    if len(content) != size:
        return None
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=count).astype(bool)
    bits.setflags(write=False)  # it is shared by all callers
    return bits
