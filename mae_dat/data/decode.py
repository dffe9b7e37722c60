"""Decoding of image files to 8-bit RGB pixels.

Reading survives short I/O errors of a file server. Decoding rejects everything that it does not know. EXIF orientation
is ignored by classifiers in training and in evaluation, as is the convention for ImageNet. Detectors see images
upright, as label tools show them.
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
from PIL import Image, PngImagePlugin

from mae_dat.config.errors import ConfigError, DataError, StorageError

logger = logging.getLogger(__name__)

MEGAPIXELS_VARIABLE, WHITE_VARIABLE = "MAE_DAT_MAX_MEGAPIXELS", "MAE_DAT_WHITE_LEVEL"
"""Environment variables: the largest image in megapixels (default: 100), and the value of white in 16-bit gray images
(default: 65535; 4095 for images of 12 bits)."""
MAX_PIXELS = 100_000_000
_WHITE = 65535.0
_DARK_MAXIMUM = 1 << 14  # a 16-bit image whose values all stay below it is nearly black
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # color profiles of printers have more than Pillow's 1 MiB
MAX_BYTES = 1 << 28  # of an image file
RETRIES = 3
_PAUSE_S = 0.5  # before the first retry, doubled for each further one
# I/O errors from which a network file system recovers.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO}
_ORIENTATION = 0x0112  # the EXIF tag
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers of a frame header, which contains the size

Result = TypeVar("Result")


def max_pixels() -> int:
    """Return how many pixels an image may have. Raises ConfigError for a wrong environment variable."""
    megapixels = _number_from_environment(MEGAPIXELS_VARIABLE)
    return MAX_PIXELS if megapixels is None else int(megapixels * 1e6)


def decoding_settings() -> dict[str, str]:
    """Return the environment variables that change how images are decoded, with their values; empty by default.

    Raises ConfigError for a wrong one.
    """
    defaults = {WHITE_VARIABLE: _WHITE, MEGAPIXELS_VARIABLE: MAX_PIXELS / 1e6}
    values = {name: _number_from_environment(name) for name in defaults}
    return {name: f"{value:g}" for name, value in values.items() if value not in (None, defaults[name])}


def describe_decoding() -> str:
    """Return the environment variables that change how images are decoded, in words; empty by default."""
    return ", ".join(f"${name}={value}" for name, value in decoding_settings().items())


def white_level() -> float | None:
    """Return the value of white in 16-bit images; None if it is not set. Raises ConfigError for a wrong one."""
    return _number_from_environment(WHITE_VARIABLE)


def _number_from_environment(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"${name} must be a number above 0, got {text!r}.")
    return value


class ImageError(DataError):
    """An image file that cannot be used. The message ends with advice for a training; `problem` is the part before."""

    problem = ""


def image_error(name: str, cause: str) -> ImageError:
    """Return the error of the image `name`."""
    problem = f"{name}: {cause}"
    error = ImageError(f"{problem}; delete or replace it, or pass --on_bad skip")
    error.problem = problem
    return error


def with_retries(read: Callable[[], Result], what: str) -> Result:
    """Call `read` and return its result; try again after I/O errors that may be transient (a restarting file server).

    The pause doubles from retry to retry. Raises StorageError, naming `what`, after 3 failed retries.
    """
    for failures in range(RETRIES + 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            cause = error
        if failures < RETRIES:
            logger.warning("%s: %s; trying again", what, cause.strerror)
            # Random pauses keep a hundred ranks from retrying at once. SystemRandom leaves the run's generators alone.
            time.sleep(_PAUSE_S * 2**failures * random.SystemRandom().uniform(0.5, 1.5))
    raise StorageError(
        f"{what}: {cause.strerror}, {RETRIES + 1} times in a row; check the disk or the file server, then start again"
    ) from cause


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a whole image file. Raises DataError (also above 256 MiB), StorageError."""

    def read() -> bytes:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise image_error(str(path), f"the file has more than the allowed {MAX_BYTES >> 20} MiB")
            return file.read()

    try:
        return with_retries(read, str(path))
    except OSError as error:
        raise image_error(str(path), f"cannot be read ({error.strerror})") from error


def decode_file(path: str | os.PathLike[str]) -> Image.Image:
    """Decode the image file `path` as 8-bit RGB; see `decode_bytes`. Raises DataError, StorageError."""
    return decode_bytes(read_bytes(path), str(path))


def decode_oriented(path: str | os.PathLike[str]) -> tuple[Image.Image, int]:
    """Decode an image file as `decode_file` does; also return its EXIF orientation, 1 if it has none."""
    content = read_bytes(path)
    return decode_bytes(content, str(path)), exif_orientation(content)


def exif_orientation(content: bytes) -> int:
    """Return the EXIF orientation in the content of an image file: 2 to 8, or 1 for upright and unreadable ones."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return orientation_of(image)
    except Exception:  # decoding reports what is wrong
        return 1


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image: 2 to 8, or 1 for upright and damaged ones."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of a PNG it may follow the pixels, which PIL decodes first: decoding reports what is wrong
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURN else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image of this EXIF orientation as it is seen upright."""
    return image.transpose(_TURN[orientation]) if orientation in _TURN else image


def decode_bytes(content: bytes, name: str) -> Image.Image:
    """Decode the content of an image file as 8-bit RGB.

    Gray, 1-bit, palette, CMYK and YCbCr images are converted; transparency is blended with white; 16-bit gray is
    divided by 257, or scaled so that $MAE_DAT_WHITE_LEVEL becomes 255. Raises DataError, naming `name`, for anything
    else: float, 32-bit or animated images, more than 100 megapixels or $MAE_DAT_MAX_MEGAPIXELS (read from the header,
    without decoding), damaged files and files that are no images.
    """
    if Image.MAX_IMAGE_PIXELS and max_pixels() > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow's own limit would come first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd but harmless metadata would warn for each image and epoch
            with Image.open(io.BytesIO(content)) as image:
                return to_rgb(image, name)
    except ConfigError:
        raise
    except Exception as error:  # PIL's decoders raise nearly every type of exception on damaged files
        raise image_error(name, describe_problem(content, error)) from error


def decode_pixels(content: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file to the pixels of `decode_bytes`, uint8 (H, W, 3).

    For ordinary JPEGs this takes two thirds of the time. Both decoders are libjpeg-turbo. Files that OpenCV's cannot
    decode are passed to PIL's, so the same files are rejected, for the same reasons. Raises what `decode_bytes` raises.
    """
    size_HW = _color_jpeg_size(content)
    if size_HW and size_HW[0] * size_HW[1] <= max_pixels():
        import cv2  # takes a fifth of a second, which programs that read no images need not spend

        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if pixels is not None:
            return pixels
    return np.array(decode_bytes(content, name))


def _color_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return the height and width of a JPEG of three 8-bit components, from its header; None for anything else."""
    at = 2
    while content[:2] == b"\xff\xd8" and at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _JPEG_FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            return (height, width) if (depth, components) == (8, 3) and height and width else None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def to_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Convert an opened image to 8-bit RGB, as `decode_bytes` describes. Raises DataError without the image's name."""
    width, height = image.size
    if width * height > max_pixels():
        raise DataError(f"{width} x {height} pixels are more than {_describe_limit()}")
    # A phone's multi-picture JPEG (MPO) is no animation: its first frame is the photo.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"it is animated or has several pages ({getattr(image, 'n_frames', 'many')} frames)")
    if image.mode.startswith("I"):
        return _from_16_bit(image, name)
    if image.mode not in {"RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBA", "RGBa", "LA", "La", "PA"}:
        raise DataError(f'pixels of the mode "{image.mode}" are not supported, only 8-bit color and 8- or 16-bit gray')
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _describe_limit() -> str:
    return f"the {max_pixels() / 1e6:g} megapixels allowed (set ${MEGAPIXELS_VARIABLE} to allow more)"


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    """Convert 16-bit gray to RGB by numpy, because PIL's own conversion saturates at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("it is 32-bit gray, with values beyond 0 to 65535")
    white = white_level()
    if white is None:
        white = _WHITE
        if 0 < values.max() < _DARK_MAXIMUM:
            _warn_of_dark_images(name, int(values.max()))
    return Image.fromarray(np.rint(values.clip(max=white) * (255 / white)).astype(np.uint8)).convert("RGB")


_dark_images_were_reported = False


def _warn_of_dark_images(name: str, highest: int) -> None:
    """Warn once in a process, since all images of a set have the same depth."""
    global _dark_images_were_reported
    if not _dark_images_were_reported:
        _dark_images_were_reported = True
        bits = highest.bit_length()
        logger.warning(
            "%s is a 16-bit image with values up to %d only, so it becomes nearly black. If its white is %d (%d bits), "
            "set $%s=%d; this is reported once.",
            name,
            highest,
            (1 << bits) - 1,
            bits,
            WHITE_VARIABLE,
            (1 << bits) - 1,
        )


def describe_problem(content: bytes, error: Exception) -> str:
    """Describe why a file could not be decoded."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {_describe_limit()}"
    if "MAX_TEXT" in str(error):
        return "its color profile or text has more than 64 MiB; its pixels may be good: save it without metadata"
    head = content[:256].lstrip()
    if not head:
        return "the file is empty"
    if head.startswith(b"<"):
        return "it is a web page or XML, not an image"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image that can be read"
    if isinstance(error, MemoryError):
        return "there was not enough memory to decode it, or it is damaged"
    return f"the image is damaged or truncated ({error})"
