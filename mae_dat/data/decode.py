"""From a file to 8-bit RGB pixels: reading that outlasts a file server's hiccup, and decoding that refuses what it does
not know.

EXIF orientation is ignored, in training as in evaluation: the convention of ImageNet.
"""

import errno
import io
import logging
import os
import random
import struct
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from mae_dat.config.errors import DataError, StorageError

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 28  # of a picture's file
RETRIES = 3
_PAUSE_S = 0.5  # before the first of them, doubled for each further
# What a network file system gets over.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO}
_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's markers of a frame, which tells the size
ADVICE = "delete or replace it, or pass --on_bad skip"

Result = TypeVar("Result")


def with_retries(read: Callable[[], Result], what: str) -> Result:
    """What `read` returns, tried again after I/O errors that may pass (a file server that restarts).

    Raises StorageError naming `what` after 3 further failures, with longer and longer pauses between them.
    """
    for failures in range(RETRIES + 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            cause = error
        if failures < RETRIES:
            log.warning("%s: %s; trying again", what, cause.strerror)
            # The share of chance keeps a hundred ranks from asking at once; the run's own generators are left alone.
            time.sleep(_PAUSE_S * 2**failures * random.SystemRandom().uniform(0.5, 1.5))
    raise StorageError(
        f"{what}: {cause.strerror}, {RETRIES + 1} times in a row; check the disk or the file server, then start again"
    ) from cause


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A picture's whole file. Raises DataError (also above 256 MiB), StorageError."""

    def read() -> bytes:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise DataError(f"{path}: the file has more than the {MAX_BYTES >> 20} MiB allowed; {ADVICE}")
            return file.read()

    try:
        return with_retries(read, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from error


def decode_file(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in `path` as 8-bit RGB; see `decode_bytes`. Raises DataError, StorageError."""
    return decode_bytes(read_bytes(path), str(path))


def decode_bytes(content: bytes, name: str) -> Image.Image:
    """The picture in a file's content as 8-bit RGB.

    Grey, 1-bit, palette, CMYK and YCbCr are converted; transparency is laid onto white; 16-bit grey is divided by 257.
    DataError giving `name` for anything else: float, 32-bit or animated pictures, more than 100 megapixels (seen in
    the header, nothing is decoded), damaged files and files that are no pictures.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd but harmless metadata, one for each image and epoch
            with Image.open(io.BytesIO(content)) as image:
                return _to_rgb(image)
    except Exception as error:  # PIL's decoders raise nearly every type of exception on damaged files
        raise DataError(f"{name}: {_cause(content, error)}; {ADVICE}") from error


def decode_pixels(content: bytes, name: str) -> np.ndarray:
    """The pixels of `decode_bytes`, uint8 (H, W, 3), of ordinary JPEGs in two thirds of the time.

    Both decoders are libjpeg-turbo, and what OpenCV's gives up is left to PIL's, so that files are refused for the
    same reasons. Raises what `decode_bytes` raises.
    """
    size = _colour_jpeg(content)
    if size and size[0] * size[1] <= MAX_PIXELS:
        import cv2  # a fifth of a second that whoever reads no pictures is spared

        as_stored = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), as_stored)
        if pixels is not None:
            return pixels
    return np.array(decode_bytes(content, name))


def _colour_jpeg(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG of three 8-bit components, from its header; None for anything else."""
    at = 2
    while content[:2] == b"\xff\xd8" and at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAME:
            depth, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            return (height, width) if (depth, components) == (8, 3) and height and width else None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


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


def _cause(content: bytes, error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MAX_PIXELS // 10**6} megapixels allowed"
    head = content[:256].lstrip()
    if not head:
        return "the file is empty"
    if head.startswith(b"<"):
        return "it is a web page or XML, not a picture"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture that can be read"
    return f"the picture is damaged or truncated ({error})"
