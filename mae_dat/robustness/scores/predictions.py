"""The class that a model predicted for each image, and the names and labels of these images, as text in results.json.

The text is a version and, in base64, zlib-compressed data: little-endian integers for classes, JSON for names. Of a
correct prediction only that it was correct is stored, so that 50,000 images take about 30 kB.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]
NO_PREDICTED_CLASS = -1
_CORRECT, _OFFSET = 0, 2  # a wrong prediction of class c is stored as c + 2, one of none of the classes as 1
_NUMBERS, _NAMES = "n1:", "t1:"


class ImageSetFacts(TypedDict):
    """The images behind the bits and predictions of a cell, in their order."""

    classes: list[str]
    """Names of the classes that labels and predictions count."""
    labels: str
    """The first correct class of each image (`unpack_numbers`); -1 is none."""
    names: str
    """Path of each image below its folder (`unpack_names`)."""
    root: str
    """The folder."""


ImageSets = dict[str, dict[str, ImageSetFacts]]
"""By suite, then by `CellImages.order`."""


def pack_numbers(numbers: Classes) -> str:
    """Return integers (N,), each at least -2, as text."""
    return _NUMBERS + _compress((numbers + _OFFSET).astype("<u4").tobytes())


def unpack_numbers(text: str, count: int) -> Classes | None:
    """Return the integers (N,) of `count` images; None for a text of another version or length, or a damaged one."""
    content = _decompress(text, _NUMBERS, 4 * count)
    if content is None or len(content) != 4 * count:
        return None
    return np.frombuffer(content, dtype="<u4").astype(np.int64) - _OFFSET


def pack_predictions(predicted: Classes, correct: NDArray[np.bool_]) -> str:
    """Return predicted classes (N,) as text; of the correct ones only that they are."""
    return pack_numbers(np.where(correct, _CORRECT - _OFFSET, predicted))


def unpack_predictions(text: str, labels: Classes) -> Classes | None:
    """Return the predicted classes (N,) of images with these labels; None for a text that cannot be read."""
    numbers = unpack_numbers(text, len(labels))
    return None if numbers is None else np.where(numbers == _CORRECT - _OFFSET, labels, numbers)


def pack_names(names: Sequence[str]) -> str:
    """Return names as text."""
    return _NAMES + _compress(json.dumps(list(names)).encode())


def unpack_names(text: str, count: int) -> list[str] | None:
    """Return the names of `count` images; None for a text of another version or length, or a damaged one."""
    content = _decompress(text, _NAMES, 4096 * count)
    try:
        names = json.loads(content or b"null")
    except ValueError:
        return None
    return [str(name) for name in names] if isinstance(names, list) and len(names) == count else None


def image_labels(facts: ImageSetFacts, count: int) -> Classes | None:
    """Return the labels (N,) of `count` images; None where they cannot be read or are not among the classes."""
    labels = unpack_numbers(facts["labels"], count)
    return labels if labels is not None and (labels < len(facts["classes"])).all() else None


def known_set(sets: Mapping[str, Mapping[str, ImageSetFacts]], suite: str, order: str) -> ImageSetFacts | None:
    """Return the facts of the images of a cell; None for results of older releases."""
    return sets.get(suite, {}).get(order)


def _compress(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _decompress(text: str, prefix: str, most: int) -> bytes | None:
    if not text.startswith(prefix):
        return None
    try:
        return zlib.decompressobj().decompress(base64.b64decode(text[len(prefix) :], validate=True), most + 1)
    except (binascii.Error, ValueError, zlib.error):
        return None
